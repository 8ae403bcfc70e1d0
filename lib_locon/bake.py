"""Bakes adapters into a checkpoint file: base + Σ strength · ΔW, written tensor by tensor into a new file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from lib_locon.errors import FileError
from lib_locon.files.handles import fill, read_exactly
from lib_locon.files.hashes import hashes_of
from lib_locon.files.reader import Entry, SafetensorsFile
from lib_locon.files.writer import CHUNK, write_safetensors
from lib_locon.inspection import checkpoint_table, unwritable
from lib_locon.matching import Match, Matched, match
from lib_locon.models.targets import View
from lib_locon.patching.compute import patched
from lib_locon.patching.overflow import overflows
from lib_locon.patching.plan import Patch, Plan, make_plan
from lib_locon.prompt.request import Strengths
from lib_locon.report import AdapterReport
from lib_locon.session import Use

RECIPE = "locon_recipe"
"""The metadata key that says how a file was baked."""
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
) -> Baked:
    """Writes `out`: the checkpoint with the adapters in it, dtypes, order and metadata kept, the recipe added.

    Needs the memory of the largest tensor in fp32 a few times over, whatever the file's size. Raises FileError, also
    for an adapter that would change nothing (unless `skip_bad`), and for strengths that depend on the step; `out` then
    does not exist, or is what it was.
    """
    for use in uses:
        if use.strengths.schedule:
            raise FileError(f"nothing was written: {no_steps(use.name or use.adapter.name, use.strengths)}")
    table = checkpoint_table(checkpoint)
    matches = [match(use.adapter, table, partial(unwritable, checkpoint), may_grow=True) for use in uses]
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

    def data(key: str) -> Iterator[bytes]:
        nonlocal done
        for chunk in _tensor_bytes(checkpoint, checkpoint.entries[key], entries[key].shape, plan.get(key, ())):
            yield chunk
            done += len(chunk)
            progress(done, total)

    write_safetensors(out, entries, {**checkpoint.metadata, RECIPE: _recipe(checkpoint, uses, prompt)}, data, RECIPE)
    return Baked(out, len(plan), len(entries), tuple(reports))


def no_steps(name: str, strengths: Strengths) -> str:
    """Why strengths that depend on the step cannot be baked, as a sentence."""
    return f"a checkpoint has no steps, and {name} is to be used at {strengths}: give it strengths that stay the same"


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
    checkpoint: SafetensorsFile, entry: Entry, shape: tuple[int, ...], patches: Sequence[Patch]
) -> Iterator[bytes]:
    """The bytes of one tensor of the new file, of the shape `shape` (that of the old one, or larger)."""
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
            base = torch.nn.functional.pad(base, _padding(entry.shape, shape))
        new, extremes = patched(base, patches)
    except Exception as error:  # whatever a family's arithmetic meets, the user gets a sentence and no half file
        what = str(error) or type(error).__name__
        raise FileError(f"a tensor of the shape {list(shape)} could not be patched: {what}") from error
    if extremes is not None and overflows(extremes, new.dtype) and bool(torch.isfinite(base.float()).all()):
        raise FileError(
            f"at these strengths a tensor of the shape {list(shape)} has numbers that {new.dtype} cannot hold"
        )
    yield new.reshape(-1).view(torch.uint8).numpy().tobytes()


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
