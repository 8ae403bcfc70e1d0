"""An adapter: everything that one file holds, parsed, none of it dropped in silence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_locon.errors import FileChanged, FileError
from lib_locon.families import ALPHA, RESHAPE, SCALE, UNSUPPORTED
from lib_locon.families.build import Hints, Unread, build_layers, scale
from lib_locon.families.layer import Layer
from lib_locon.files import kinds
from lib_locon.files.dialects import ModuleName, is_peft, module_name, split_key
from lib_locon.files.embeddings import PREFIX, Embedding, read_embeddings
from lib_locon.files.hints import dora_side, rank_of
from lib_locon.files.peft_config import PeftConfig, read_config
from lib_locon.files.pickled import TensorFile, open_adapter
from lib_locon.files.reader import FileIdentity, SafetensorsFile, is_shape, shown
from lib_locon.files.trainer_marks import TrainerMarks, read_marks
from lib_locon.terminal import printable

MAX_AXES = 5  # of a weight: out, in, and a kernel of three
_WRAPPER = re.compile(r"\.modules_to_save(\.[^.]+)?")
"""The level of a module that PEFT trains whole, with the name of the adapter."""
MORE_ATTEMPTS = 2
"""At a file that is written while it is read. A trainer that saves is slower: the third time it is somebody's turn to
look."""


@dataclass(frozen=True)
class Unmatched:
    """A key (or a module) of the file that changes nothing, and why."""

    key: str
    reason: str

    def __str__(self) -> str:
        """In one line: a key may hold anything, also what clears a terminal or turns the direction of writing."""
        return printable(f"{self.key}: {self.reason}")


@dataclass(frozen=True, eq=False)
class Module:
    """One module of an adapter: its layers (one for the weight, one for the bias at most) and what was not read."""

    name: ModuleName
    layers: tuple[Layer, ...]
    unread: tuple[Unmatched, ...]


@dataclass(frozen=True, eq=False)
class Adapter:
    """`unknown` are the keys that belong to no module. Read with `header_only`, its factors are on the meta device.

    `notes` are sentences about choices that the file left open.
    """

    name: str
    identity: FileIdentity
    metadata: Mapping[str, str]
    modules: tuple[Module, ...]
    unknown: tuple[Unmatched, ...]
    embeddings: tuple[Embedding, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Source:
    """What reading one module needs: the file, its open data (None: header only), and what concerns all modules."""

    file: TensorFile
    data: Any
    header_only: bool
    config: PeftConfig
    hints: Hints
    marks: TrainerMarks

    def tensor(self, key: str) -> Tensor:
        """With the header only: its shape."""
        tensor: Tensor = self.file.meta(key) if self.header_only else self.data.get_tensor(key)
        return tensor

    def number(self, key: str) -> float | None:
        """The tensor's one number, also with the header only; None where it is not one number."""
        return float(self.data.get_tensor(key)) if self.file.entries[key].shape in ((), (1,)) else None

    def shape(self, key: str) -> tuple[int, ...]:
        """A shape that is stored as a tensor; empty where it is none."""
        entry = self.file.entries[key]
        if len(entry.shape) != 1 or not 0 < entry.shape[0] <= MAX_AXES:
            return ()
        numbers = self.data.get_tensor(key)
        # any kind of number may have been stored, and NaN or an infinity among them
        values = (numbers.double() if numbers.is_floating_point() else numbers).tolist()
        sizes = tuple(int(value) for value in values if math.isfinite(value) and value == int(value) and value > 0)
        return sizes if len(sizes) == len(values) and is_shape(sizes) else ()


def read_adapter(path: Path | str, *, header_only: bool = False, allow_pickle: bool = False) -> Adapter:
    """Reads and parses an adapter; factors stay in the file's dtype. Raises FileError.

    With `header_only` no tensor's data is read but alphas, and a few rows where the metadata says that q, k and v were
    trained apart: enough to inspect a file of any size at once. Pickled files (.pt, .ckpt, .bin) are refused without
    `allow_pickle`; `files/pickled.py` says what it allows. A file that is written meanwhile is read again.
    """
    for _ in range(MORE_ATTEMPTS):
        try:
            return _read(path, header_only=header_only, allow_pickle=allow_pickle)
        except FileChanged:
            continue
    return _read(path, header_only=header_only, allow_pickle=allow_pickle)


def _read(path: Path | str, *, header_only: bool, allow_pickle: bool) -> Adapter:
    file = open_adapter(path, allow_pickle)
    grouped, unknown, plain = _group(file)
    by_peft = any(is_peft(key) for key in file.entries)
    config = read_config(file.path, file.metadata, _ranks(file, grouped) if by_peft else None)
    unknown += _take_replaced(plain, grouped, config)
    hints = dora_side(file.metadata, [file.meta(key) for key in file.entries if key.endswith(".dora_scale")])
    with file.tensors() as data:
        source = _Source(file, data, header_only, config, hints, read_marks(file.metadata, file.entries))
        modules = tuple(_module(written, keys, source) for written, keys in grouped.items())
        bundled = (key for key in file.entries if key.startswith(PREFIX))
        embeddings, unread = read_embeddings(bundled, source.tensor)
    unknown += [Unmatched(key, reason) for key, reason in unread]
    if not embeddings and not any(module.layers for module in modules):
        raise FileError(_nothing_found(file, modules, config))
    notes = dict.fromkeys(layer.note for module in modules for layer in module.layers)
    sentences = tuple(note for note in (config.note, config.refusals, *notes) if note)
    return Adapter(file.path.stem, file.identity, file.metadata, modules, tuple(unknown), embeddings, sentences)


def _group(file: TensorFile) -> tuple[dict[str, dict[str, str]], list[Unmatched], dict[str, str]]:
    """Module as written → suffix → key; the keys that are no module's; and those of plain weights and biases."""
    grouped: dict[str, dict[str, str]] = {}
    unknown: list[Unmatched] = []
    plain: dict[str, str] = {}
    for key in file.entries:
        if key.startswith(PREFIX):
            continue
        split = split_key(key)
        if split is None and key.endswith(".bias"):
            plain[key] = key.removesuffix(".bias")
        elif split is None:
            unknown.append(Unmatched(key, "no module's name with a known suffix"))
        elif split[1] in grouped.get(split[0], {}):
            unknown.append(Unmatched(key, f"a second {shown(split[1])} of the same module"))
        else:
            grouped.setdefault(split[0], {})[split[1]] = key
    # `weight` is IA3's, beside `on_input`; by itself it is any network's weight and no adapter's
    stray = [module for module, keys in grouped.items() if list(keys) == ["weight"]]
    plain |= {grouped.pop(module)["weight"]: module for module in stray}
    return grouped, unknown, plain


def _ranks(file: TensorFile, grouped: Mapping[str, Mapping[str, str]]) -> dict[str, int | None]:
    """Module as written → its rank, where one shows. Without those that are refused by name: PEFT lists their modules
    elsewhere."""
    return {
        written: rank_of({suffix: file.entries[key].shape for suffix, key in keys.items()})
        for written, keys in grouped.items()
        if not keys.keys() <= UNSUPPORTED.keys()
    }


def _take_replaced(plain: Mapping[str, str], grouped: dict[str, dict[str, str]], config: PeftConfig) -> list[Unmatched]:
    """Adds PEFT's replaced weights and biases to `grouped`; returns the plain ones that are none, with the reason.

    `plain` is key → module. PEFT saves modules that were trained whole (`modules_to_save`) and biases (`bias`) under
    the names of the model's own parameters, behind its prefix; the level of the wrapped layer may stand in between.
    """
    left: list[Unmatched] = []
    for key, written in plain.items():
        parameter = key.rpartition(".")[2]
        module = _WRAPPER.sub("", written).removesuffix(".base_layer")
        if not (".base_model.model." in f".{written}" or config.replaces(written)):
            left.append(Unmatched(key, "a plain weight, not an adapter's"))
        elif ".original_module" in written or (written.endswith(".base_layer") and parameter == "weight"):
            left.append(Unmatched(key, "the base's own weight, as it was before the training"))
        elif f"set_{parameter}" in grouped.setdefault(module, {}):
            left.append(Unmatched(key, f"a second {parameter} of the same module"))
        else:
            grouped[module][f"set_{parameter}"] = key
    return left


def _module(written: str, keys: Mapping[str, str], source: _Source) -> Module:
    name = source.marks.named(module_name(written))
    if name.dialect.rejected:
        return Module(name, (), (Unmatched(written, name.dialect.rejected),))
    refusal = source.config.refusal(written)
    if refusal and not keys.keys() <= {"set_weight", "set_bias"}:
        return Module(name, (), (Unmatched(written, refusal),))
    keys, clashes = _renamed(keys, name.dialect.renames)
    factors = {suffix: key for suffix, key in keys.items() if suffix not in (ALPHA, SCALE, RESHAPE)}
    unread: list[Unread] = []
    numbers: dict[str, float] = {}
    for suffix in (ALPHA, SCALE):
        if suffix in keys:
            number = source.number(keys[suffix])
            if number is None:
                unread.append(Unread(suffix, "it must be one number"))
            else:
                numbers[suffix] = number
    if not factors and SCALE in numbers:
        unread.append(Unread(SCALE, "a scale without factors"))
    shapes = {suffix: source.file.entries[key].shape for suffix, key in factors.items()}
    rank = rank_of(shapes)
    if SCALE in numbers:  # the built-in's rule: a written scale wins over alpha / rank
        hints = replace(source.hints, scale=numbers[SCALE])
    else:
        configured = None if ALPHA in numbers else source.config.scale(written, rank)
        hints = replace(source.hints, alpha=numbers.get(ALPHA), scale=configured)
        hints = source.marks.refine(hints, written, shapes, lambda suffix: source.data.get_tensor(factors[suffix]))
    if RESHAPE in keys:
        hints = replace(hints, reshape=source.shape(keys[RESHAPE]))
        if not hints.reshape:
            unread.append(Unread(RESHAPE, "it must be the sizes of a weight"))
        elif not factors:
            unread.append(Unread(RESHAPE, "a shape without factors"))
    markers = source.config.markers(written, scale(hints, rank)) if factors and not refusal else {}
    if source.header_only and isinstance(source.file, SafetensorsFile) and not markers:
        entries = ((suffix, source.file.entries[key]) for suffix, key in factors.items())
        known, left = _layers_of_shapes(tuple((s, entry.torch_dtype, entry.shape) for s, entry in entries), hints)
        layers = list(map(copy, known))  # two modules' layers are two layers
    else:
        layers, left = build_layers({suffix: source.tensor(key) for suffix, key in factors.items()} | markers, hints)
    mine = (Unmatched(keys[item.suffix], item.reason) for item in (*unread, *left) if item.suffix in keys)
    return Module(name, tuple(layers), (*clashes, *mine))


@lru_cache(maxsize=1000)  # hundreds of modules differ in nothing but their names
def _layers_of_shapes(
    factors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...], hints: Hints
) -> tuple[list[Layer], list[Unread]]:
    return build_layers(
        {suffix: torch.empty(shape, dtype=dtype, device="meta") for suffix, dtype, shape in factors}, hints
    )


def _renamed(keys: Mapping[str, str], renames: Mapping[str, str]) -> tuple[dict[str, str], list[Unmatched]]:
    """`keys` by the suffixes that the dialect means, and those whose place was taken already."""
    renamed: dict[str, str] = {}
    clashes: list[Unmatched] = []
    for suffix, key in keys.items():
        if renamed.setdefault(renames.get(suffix, suffix), key) is not key:
            clashes.append(Unmatched(key, f"a second {renames.get(suffix, suffix)} of the same module"))
    return renamed, clashes


def _nothing_found(file: TensorFile, modules: tuple[Module, ...], config: PeftConfig) -> str:
    if not file.entries:
        return f"{file.path} holds no tensors at all"
    kind = kinds.of_names(file.entries)
    if kind:
        return f"{file.path} {kind}"
    unread = (item.reason[:300] for module in modules[:50] for item in module.unread)
    reasons = list(dict.fromkeys([config.refusals, *unread] if config.refusals else unread))
    why = f": {'; '.join(reasons[:5])}" if reasons else ""
    return f"{file.path} holds no adapter that is known here (its first name is {shown(next(iter(file.entries)))}){why}"
