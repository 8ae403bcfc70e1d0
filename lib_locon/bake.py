"""Bakes adapters into a checkpoint file: base + Σ strength · ΔW, written tensor by tensor into a new file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lib_locon.checkpoint import Checkpoint
from lib_locon.errors import FileError
from lib_locon.files.handles import fill, read_exactly
from lib_locon.files.hashes import hashes_of
from lib_locon.files.reader import Entry, SafetensorsFile
from lib_locon.files.writer import CHUNK, write_safetensors
from lib_locon.matching import Match, Matched
from lib_locon.models.targets import View
from lib_locon.patching.compute import patched
from lib_locon.patching.eight_bits import Cost, decoded, encoded, share_lost
from lib_locon.patching.overflow import overflows
from lib_locon.patching.plan import Patch, Plan, make_plan
from lib_locon.prompt.request import Strengths
from lib_locon.report import AdapterReport
from lib_locon.session import Use

RECIPE = "locon_recipe"
"""The metadata key that says how a file was baked."""
MOST_LOST = 0.2
"""Of an adapter's change to weights with a scale: what rounding may take before nothing is written."""
Progress = Callable[[int, int], None]
"""Bytes done, bytes in all."""


@dataclass(frozen=True)
class Baked:
    """What a bake did."""

    output: Path
    changed: int
    """Tensors that hold a sum now; all others are byte for byte those of the checkpoint."""
    total: int
    adapters: tuple[AdapterReport, ...]


def bake(
    checkpoint: SafetensorsFile,
    uses: Sequence[Use],
    out: Path,
    prompt: str,
    progress: Progress,
    *,
    skip_bad: bool = False,
    allow_loss: bool = False,
) -> Baked:
    """Writes `out`: the checkpoint with the adapters in it, dtypes, order and metadata kept, the recipe added.

    Weights of 8 bits are rounded to 8 bits once; their scales stay as they are. Needs the memory of the largest tensor
    in fp32 a few times over, whatever the file's size. Raises FileError, also for an adapter that would change nothing
    (unless `skip_bad`), for one of which rounding would take too much (unless `allow_loss`), and for strengths that
    depend on the step; `out` then does not exist, or is what it was.
    """
    for use in uses:
        if use.strengths.schedule:
            raise FileError(f"nothing was written: {no_steps(use.name or use.adapter.name, use.strengths)}")
    weights = Checkpoint(checkpoint)
    found = [weights.match(use.adapter) for use in uses]
    matches = [replace(each, notes=(*each.notes, *weights.rounding(each))) for each in found]
    reports = [use.report(found) for use, found in zip(uses, matches, strict=True)]
    useless = [report for report in reports if not report.used]
    if useless and not skip_bad:
        raise FileError(f"nothing was written: {useless[0]}")
    plan, grown = _plan(uses, matches, checkpoint)
    entries = {
        key: _resized(entry, grown[key]) if key in grown else entry
        for key, entry in sorted(checkpoint.entries.items(), key=lambda item: item[1].start)
    }
    total = sum(entry.end - entry.start for entry in entries.values())
    done = 0
    costs: dict[str, Cost] = {}
    last = next((key for key in reversed(entries) if key in plan and weights.is_coded(key)), None)

    def data(key: str) -> Iterator[bytes]:
        nonlocal done
        for chunk in _tensor_bytes(weights, key, entries[key].shape, plan.get(key, ()), costs):
            yield chunk
            done += len(chunk)
            progress(done, total)
        if key == last and not allow_loss:  # as soon as all of it is known
            for use, found in zip(uses, matches, strict=True):
                _refuse_loss(use, found, plan, costs, weights)

    write_safetensors(out, entries, {**checkpoint.metadata, RECIPE: _recipe(checkpoint, uses, prompt)}, data, RECIPE)
    changed = len(plan) - sum(not bool(cost.moved) for cost in costs.values())
    reports = [use.report_after(found, plan, costs) for use, found in zip(uses, matches, strict=True)]
    return Baked(out, changed, len(entries), tuple(reports))


def no_steps(name: str, strengths: Strengths) -> str:
    """Why strengths that depend on the step cannot be baked, as a sentence."""
    return f"a checkpoint has no steps, and {name} is to be used at {strengths}: give it strengths that stay the same"


def _refuse_loss(use: Use, found: Match, plan: Plan, costs: Mapping[str, Cost], weights: Checkpoint) -> None:
    """Raises FileError where so much is lost that the file would not hold the adapter that it is said to hold."""
    advice = "bake into the same checkpoint in fp16 or bf16, or say --allow-loss"
    report = use.report_after(found, plan, costs)
    if report.lost:
        raise FileError(f"nothing was written: {report}; {advice}")
    paths = {item.view.path for item in found.matched} & {path for path in costs if weights.has_scale(path)}
    share = share_lost(costs[path] for path in paths)
    if share > MOST_LOST:
        stored = " and ".join(sorted({weights.file.entries[path].dtype for path in paths}))
        raise FileError(
            f"nothing was written: this checkpoint stores weights as {stored} with a scale, and rounding to that would "
            f"take {share:.0%} of what {report.name} adds to {len(paths)} of them: {advice}"
        )


def _plan(
    uses: Sequence[Use], matches: Sequence[Match], checkpoint: SafetensorsFile
) -> tuple[Plan, dict[str, tuple[int, ...]]]:
    """The patches of each tensor, and the new shapes of the tensors that grow."""
    grown = _grown(item for found in matches for item in found.matched)
    patches: list[Patch] = []
    for use, found in zip(uses, matches, strict=True):
        for item, patch in zip(found.matched, use.patches(found), strict=True):
            if item.view.path in grown and item.reshape != grown[item.view.path]:
                old = item.reshape or checkpoint.entries[item.view.path].shape
                patch = patch._replace(view=_inside(item.view, old, grown[item.view.path]))
            patches.append(patch)
    return make_plan(patches), grown


def _inside(view: View, old: tuple[int, ...], new: tuple[int, ...]) -> View:
    """Where a change of the weight's old shape lies in the enlarged one."""
    axes = [axis for axis, (before, after) in enumerate(zip(old, new, strict=True)) if before != after]
    if view != View(view.path) or len(axes) != 1:
        raise FileError(f"two adapters want different shapes of {view.path}: bake them one after the other")
    return view._replace(axis=axes[0], start=0, length=old[axes[0]])


def _grown(matched: Iterable[Matched]) -> dict[str, tuple[int, ...]]:
    """Path → shape of the weights that an adapter needs enlarged; each axis the largest that any asks for."""
    grown: dict[str, tuple[int, ...]] = {}
    for item in matched:
        if item.reshape:
            grown[item.view.path] = tuple(map(max, item.reshape, grown.get(item.view.path, item.reshape)))
    return grown


def _resized(entry: Entry, shape: tuple[int, ...]) -> Entry:
    return replace(entry, shape=shape, end=entry.start + prod(shape) * entry.torch_dtype.itemsize)


def _tensor_bytes(
    weights: Checkpoint, key: str, shape: tuple[int, ...], patches: Sequence[Patch], costs: dict[str, Cost]
) -> Iterator[bytes]:
    """The bytes of one tensor of the new file, of the shape `shape` (that of the old one, or larger)."""
    checkpoint, entry = weights.file, weights.file.entries[key]
    if not patches:
        with checkpoint.opened() as file:
            for start in range(entry.start, entry.end, CHUNK):
                yield read_exactly(file, start, min(CHUNK, entry.end - start))
        return
    with checkpoint.opened() as file:
        base = torch.empty(entry.shape, dtype=entry.torch_dtype, device="cpu")
        fill(file, entry.start, base)
    try:
        if shape != entry.shape:
            base = _enlarged(base, shape)
        if weights.is_coded(key):
            new, costs[key] = _coded_sum(base, weights.scale(key), patches)
        else:
            new = _sum(base, patches, base.dtype)
    except FileError:
        raise
    except Exception as error:  # whatever a family's arithmetic meets, the user gets a sentence and no half file
        what = str(error) or type(error).__name__
        raise FileError(f"a tensor of the shape {list(shape)} could not be patched: {what}") from error
    yield new.reshape(-1).view(torch.uint8).numpy().tobytes()


def _coded_sum(base: Tensor, scale: Tensor | None, patches: Sequence[Patch]) -> tuple[Tensor, Cost]:
    """The sum of what `base` stands for and the patches, rounded once to numbers that stand for it; and what that took.

    A scale stays as it is: what it cannot reach is cut off, and counts as lost.
    """
    value = decoded(base, scale)
    total = _sum(value, patches, torch.float32)
    if scale is None:
        _refuse_overflow(torch.stack(torch.aminmax(total)), value, base.dtype)
    new = encoded(total, scale, base.dtype)
    return new, Cost.of(base, new, value, total, scale)


def _sum(base: Tensor, patches: Sequence[Patch], dtype: torch.dtype) -> Tensor:
    new, extremes = patched(base, patches, dtype)
    if extremes is not None:
        _refuse_overflow(extremes, base, dtype)
    return new


def _refuse_overflow(extremes: Tensor, base: Tensor, dtype: torch.dtype) -> None:
    if overflows(extremes, dtype) and bool(torch.isfinite(base.float()).all()):
        shape = list(base.shape)
        raise FileError(f"at these strengths a tensor of the shape {shape} has numbers that {dtype} cannot hold")


def _enlarged(base: Tensor, shape: tuple[int, ...]) -> Tensor:
    """With zeros where the larger shape has more; torch pads no fp8, but bytes."""
    numbers = base.view(torch.uint8) if base.dtype.itemsize == 1 else base
    return torch.nn.functional.pad(numbers, _padding(tuple(base.shape), shape)).view(base.dtype)


def _padding(old: tuple[int, ...], new: tuple[int, ...]) -> list[int]:
    """What torch's pad wants: (before, after) for each axis, the last axis first."""
    return [size for before, after in reversed(list(zip(old, new, strict=True))) for size in (0, after - before)]


def _recipe(checkpoint: SafetensorsFile, uses: Sequence[Use], prompt: str) -> str:
    adapters = [
        {
            "name": use.name or use.adapter.name,
            "sha256": hashes_of(use.adapter.identity).file,
            "strengths": use.strengths.as_json(),
            **({} if use.dyn is None else {"dyn": use.dyn}),
        }
        for use in uses
    ]
    recipe = {"checkpoint": checkpoint.path.name, "prompt": prompt, "adapters": adapters}
    if RECIPE in checkpoint.metadata:  # it was baked before: the history stays
        recipe["before"] = checkpoint.metadata[RECIPE]
    return json.dumps(recipe)
