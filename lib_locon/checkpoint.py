"""A checkpoint file as adapters meet it: its names, and how its weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from lib_locon.errors import FileError
from lib_locon.families.layer import Layer
from lib_locon.files.adapter import Adapter
from lib_locon.files.handles import read_exactly
from lib_locon.files.reader import Entry, SafetensorsFile
from lib_locon.matching import Match, match, rounds
from lib_locon.models.table import TargetTable
from lib_locon.models.targets import View
from lib_locon.patching.eight_bits import (
    FORM,
    FP8,
    MOST_FORM_BYTES,
    PLAIN,
    form_in,
    scale_names,
    stretched,
    unknown_companion,
    unknown_form,
)
from lib_locon.untrusted_json import parse

_FORMS = "_quantization_metadata"
"""In the file's metadata: the forms of its layers, by name."""


class Checkpoint:
    """Names and storage of a checkpoint's weights, from its header and the few bytes that name a form."""

    def __init__(self, file: SafetensorsFile) -> None:
        self.file = file

    @cached_property
    def table(self) -> TargetTable:
        """The names that it offers to adapters."""
        return TargetTable.of_shapes({key: entry.shape for key, entry in self.file.entries.items()})

    def match(self, adapter: Adapter) -> Match:
        """Match an adapter with the weights of the file, which `bake` may enlarge."""
        return match(adapter, self.table, self.cannot_hold, may_grow=True)

    def rounding(self, found: Match) -> tuple[str, ...]:
        """The note that some of the matched weights are summed in 8 bits; none where that is true of none."""
        return rounds(sum(map(self.in_8_bits, {item.view.path for item in found.matched})))

    def cannot_hold(self, view: View, layer: Layer) -> str | None:
        """Why a tensor cannot hold a sum with `layer`, as half a sentence; None where it can."""
        entry = self.file.entries[view.path]
        scales = self._scales(view.path)
        form = self._form(view.path)
        if form is not None:
            return f"the checkpoint stores it as {form}, of which no sum can be made here"
        if not (entry.torch_dtype in PLAIN | FP8 or (scales and entry.torch_dtype == torch.int8)):
            return f"the checkpoint stores it as {entry.dtype}{', with a scale beside it' if scales else ''}"
        if entry.torch_dtype in PLAIN and not scales:
            return None
        beside = unknown_companion(self._beside(view.path))
        if beside is not None:
            return f"the checkpoint has a {beside} beside it, and what that stands for is not known"
        if len(scales) > 1:
            return f"the checkpoint has more than one scale beside it: {' and '.join(scales)}"
        for key in scales:
            scale = self.file.entries[key]
            shape = stretched(scale.shape, entry.shape)
            if shape is None or scale.torch_dtype not in PLAIN:
                return f"the checkpoint stores it with a scale ({_written(scale)}) whose layout is not known"
            if layer.reshape and prod(shape) > 1:
                return "it needs its weight enlarged, and the checkpoint has no scale for what would be new"
        return None

    def is_coded(self, path: str) -> bool:
        """Tell whether a weight that can hold a sum stores its numbers coded: in fp8, or with a scale."""
        return self.file.entries[path].torch_dtype in FP8 or self.has_scale(path)

    def in_8_bits(self, path: str) -> bool:
        """Tell whether a sum is rounded to 8 bits there."""
        return self.file.entries[path].torch_dtype.itemsize == 1

    def has_scale(self, path: str) -> bool:
        """Tell whether its numbers are to be multiplied by others beside it."""
        return bool(self._scales(path))

    def scale(self, path: str) -> Tensor | None:
        """The scale of a weight that can hold a sum; None for one without. Raises FileError for NaN and infinity."""
        for key in self._scales(path):
            entry = self.file.entries[key]
            scale = torch.frombuffer(bytearray(self._bytes(entry)), dtype=entry.torch_dtype)
            if not bool(torch.isfinite(scale).all()):
                raise FileError(f"{self.file.path} is damaged: {key} is NaN or infinite")
            return scale.reshape(stretched(entry.shape, self.file.entries[path].shape) or ())
        return None

    def _scales(self, path: str) -> list[str]:
        module, _, name = path.rpartition(".")
        keys = (f"{module}.{scale}" if module else scale for scale in scale_names(name))
        return [key for key in keys if key in self.file.entries]

    def _beside(self, path: str) -> list[str]:
        module, _, name = path.rpartition(".")
        if name != "weight":  # a bare parameter has others beside it that are nothing to it
            return []
        ours = {key.rpartition(".")[2] for key in self._scales(path)}
        return [other for other in self._names.get(module, ()) if other != name and other not in ours]

    @cached_property
    def _names(self) -> Mapping[str, list[str]]:
        """Module → the names of its tensors."""
        names: dict[str, list[str]] = {}
        for key in self.file.entries:
            module, _, name = key.rpartition(".")
            names.setdefault(module, []).append(name)
        return names

    def _form(self, path: str) -> str | None:
        """The form that the file says that a weight has, where it is none of those that are known here."""
        module, _, name = path.rpartition(".")
        if name != "weight":
            return None
        form = self._forms.get(module)
        levels = module
        while form is None and levels and self._forms:  # some write the name without the model's part
            levels = levels.partition(".")[2]
            form = self._forms.get(levels)
        entry = self.file.entries.get(f"{module}.{FORM}")
        if form is None and entry is None:
            return None
        if form is None and entry is not None and entry.end - entry.start <= MOST_FORM_BYTES:
            form = form_in(self._bytes(entry))
        return unknown_form(form)

    @cached_property
    def _forms(self) -> Mapping[str, object]:
        try:
            layers = parse(self.file.metadata.get(_FORMS, "{}"))["layers"]
        except (KeyError, TypeError, ValueError):
            return {}
        return layers if isinstance(layers, dict) else {}

    def _bytes(self, entry: Entry) -> bytes:
        with self.file.opened() as file:
            return read_exactly(file, entry.start, entry.end - entry.start)


def _written(entry: Entry) -> str:
    return f"{' × '.join(map(str, entry.shape)) or 'one number'} of {entry.dtype}"
