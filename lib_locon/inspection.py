"""What an adapter file is, from its header: for the command line now, and for whoever asks why it has no effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from lib_locon.files.adapter import Adapter, Module, Unmatched, read_adapter
from lib_locon.files.reader import Entry, SafetensorsFile
from lib_locon.matching import Match, match, rounded_note
from lib_locon.models.base_family import base_family
from lib_locon.models.table import TargetTable
from lib_locon.models.targets import View
from lib_locon.patching.stored_scale import PLAIN, SCALES, is_known_layout


@dataclass(frozen=True)
class BaseMatch:
    """What an adapter would change in a checkpoint."""

    checkpoint: str
    used: int
    total: int
    weights: int
    """Parameters that would be changed."""
    bytes: int
    """Their size in the checkpoint."""
    unmatched: tuple[Unmatched, ...]
    notes: tuple[str, ...] = ()
    """What the checkpoint's own storage does to the sums."""


@dataclass(frozen=True)
class Inspection:
    """Counts by value: families, ranks and alphas count layers; dialects and components count modules."""

    name: str
    path: str
    size: int
    base: str
    dialects: dict[str, int]
    components: dict[str, int]
    families: dict[str, int]
    ranks: dict[str, int]
    alphas: dict[str, int]
    modules: int
    unread: tuple[Unmatched, ...]
    notes: tuple[str, ...]
    metadata: dict[str, str]
    match: BaseMatch | None

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def inspect(path: Path, checkpoint: SafetensorsFile | None = None, *, allow_pickle: bool = False) -> Inspection:
    """Reads the header of the adapter at `path` (and its alphas), no other tensor. Raises FileError."""
    adapter = read_adapter(path, header_only=True, allow_pickle=allow_pickle)
    layers = [layer for module in adapter.modules for layer in module.layers]
    return Inspection(
        name=adapter.name,
        path=str(path),
        size=adapter.identity.size,
        base=base_family(adapter),
        dialects=_counts(module.name.dialect.name for module in adapter.modules),
        components=_counts(_component(module) for module in adapter.modules),
        families=_counts(layer.label for layer in layers),
        ranks=_counts(str(layer.family.rank or "full") for layer in layers),
        alphas=_counts("none" if layer.alpha is None else f"{layer.alpha:g}" for layer in layers),
        modules=len(adapter.modules),
        unread=(*adapter.unknown, *(unread for module in adapter.modules for unread in module.unread)),
        notes=adapter.notes,
        metadata=dict(adapter.metadata),
        match=base_match(adapter, checkpoint) if checkpoint else None,
    )


def base_match(adapter: Adapter, checkpoint: SafetensorsFile) -> BaseMatch:
    """What `adapter` would change in `checkpoint`, from both headers."""
    found = match_checkpoint(adapter, checkpoint, checkpoint_table(checkpoint))
    paths = {item.view.path for item in found.matched}
    entries = [checkpoint.entries[path] for path in paths]
    size = sum(prod(entry.shape) * entry.torch_dtype.itemsize for entry in entries)
    notes = tuple(note for note in found.notes if note not in adapter.notes)
    return BaseMatch(str(checkpoint.path), found.used, found.total, len(paths), size, found.unmatched, notes)


def match_checkpoint(adapter: Adapter, checkpoint: SafetensorsFile, table: TargetTable) -> Match:
    """As `match`, with a checkpoint file of that table of names, and a note where sums are rounded to 8 bits."""
    found = match(adapter, table, partial(unwritable, checkpoint), may_grow=True)
    count = sum(is_rounded(checkpoint, path) for path in {item.view.path for item in found.matched})
    return replace(found, notes=(*found.notes, rounded_note(count))) if count else found


def checkpoint_table(checkpoint: SafetensorsFile) -> TargetTable:
    """The names that a checkpoint file offers to adapters."""
    return TargetTable.of_shapes({key: entry.shape for key, entry in checkpoint.entries.items()})


def unwritable(checkpoint: SafetensorsFile, view: View, _: object) -> str | None:
    """Why a tensor of a checkpoint cannot hold a sum; None where it can."""
    entry = checkpoint.entries[view.path]
    scale = scale_entry(checkpoint, view.path)
    if scale is not None and not is_known_layout(scale.shape, scale.torch_dtype, entry.shape):
        shape = " × ".join(map(str, scale.shape))
        return f"the checkpoint stores it as {entry.dtype} with a scale of a layout that is not known ({shape})"
    if entry.torch_dtype.is_floating_point or (entry.torch_dtype == torch.int8 and scale is not None):
        return None
    return f"the checkpoint stores it as {entry.dtype}"


def scale_entry(checkpoint: SafetensorsFile, path: str) -> Entry | None:
    """The scale that lies beside a weight of a checkpoint; None where there is none."""
    module, _, parameter = path.rpartition(".")
    names = (f"{module}.{name}" for name in SCALES) if parameter == "weight" else ()
    return next((checkpoint.entries[name] for name in names if name in checkpoint.entries), None)


def is_rounded(checkpoint: SafetensorsFile, path: str) -> bool:
    """Whether a sum in this tensor is rounded to 8 bits."""
    return checkpoint.entries[path].torch_dtype not in PLAIN


def _component(module: Module) -> str:
    components = module.name.dialect.components
    if len(components) == 1:
        return components[0]
    text = any(mark in module.name.body.replace(".", "_") for mark in ("encoder_layers", "text_model", "resblocks"))
    return "text encoder" if text else "unet"


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
