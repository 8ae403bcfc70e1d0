"""What an adapter file is, from its header: for the command line now, and for whoever asks why it has no effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from lib_locon.checkpoint import Checkpoint
from lib_locon.files.adapter import Adapter, Module, Unmatched, read_adapter
from lib_locon.files.reader import SafetensorsFile
from lib_locon.models.base_family import base_family


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
    """Notes on the rounding of sums in the checkpoint's own storage."""


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
    weights = Checkpoint(checkpoint)
    found = weights.match(adapter)
    paths = {item.view.path for item in found.matched}
    entries = [checkpoint.entries[path] for path in paths]
    size = sum(prod(entry.shape) * entry.torch_dtype.itemsize for entry in entries)
    notes = weights.rounding(found)
    return BaseMatch(str(checkpoint.path), found.used, found.total, len(paths), size, found.unmatched, notes)


def _component(module: Module) -> str:
    components = module.name.dialect.components
    if len(components) == 1:
        return components[0]
    text = any(mark in module.name.body.replace(".", "_") for mark in ("encoder_layers", "text_model", "resblocks"))
    return "text encoder" if text else "unet"


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
