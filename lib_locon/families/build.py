"""One module's tensors → its layers, and what is left over, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from lib_locon.errors import ShapeError
from lib_locon.families import ALPHA, FAMILIES, MAGNITUDES, UNSUPPORTED
from lib_locon.families.base import Family
from lib_locon.families.dora import DoRALayer, magnitude_side
from lib_locon.families.full import LoRABias
from lib_locon.families.layer import Layer
from lib_locon.families.lora import EmbeddingLoRA


@dataclass(frozen=True)
class Unread:
    """A suffix of a module that became part of no layer, and why."""

    suffix: str
    reason: str


@dataclass(frozen=True)
class Hints:
    """What a module's own tensors do not tell."""

    alpha: float | None = None
    """The file's alpha of this module."""
    scale: float | None = None
    """Known from a configuration: used where there is no alpha."""
    dora_on_output: bool | None = None
    """The side of DoRA where its shape leaves it open, from the metadata or the file's other layers."""
    dora_why: str = "LyCORIS' default"
    """Where that is known from."""
    reshape: tuple[int, ...] = ()
    """The shape that the weight must be enlarged to before its change is added."""
    parts: int = 1
    """The number of pairs that were put together as one; `alpha` is that of each, with its part of the rank."""
    root_of_rank: bool = False
    """True where the scale is alpha / √rank (rank-stabilised), not alpha / rank."""
    note: str = ""
    """A sentence for the report about where the scale is from."""


def build_layers(tensors: Mapping[str, Tensor], hints: Hints) -> tuple[list[Layer], list[Unread]]:
    """The layers that one module's tensors (suffix → tensor, without alpha) make, and what is left over."""
    foreign = [suffix for suffix in tensors if suffix in UNSUPPORTED]
    if foreign:  # what remains of such a module may look like a family that is read, and mean something else
        return [], [Unread(suffix, f"{UNSUPPORTED[foreign[0]]} is not supported") for suffix in tensors]
    left = dict(tensors)
    if hints.alpha is not None:
        left[ALPHA] = torch.tensor(hints.alpha)  # a family may read it in its own way (OFT's constraint)
    magnitudes = {suffix: left.pop(suffix) for suffix in MAGNITUDES if suffix in left}
    layers: list[Layer] = []
    unread: list[Unread] = []
    if not tensors and hints.alpha is not None:
        unread.append(Unread(ALPHA, "an alpha without factors"))
    while (found := _next_family(left)) is not None:
        kind, own, error = found
        for suffix in own:
            left.pop(suffix)
        if isinstance(kind, Family):
            layers += [_layer(family, layers, hints) for family in (kind, *kind.companions())]
        else:
            unread += [Unread(suffix, f"{kind.name} with wrong shapes: {error}") for suffix in own]
    left.pop(ALPHA, None)
    for suffix, magnitude in magnitudes.items():
        unread += _wrap(layers, suffix, magnitude, hints)
    unread += [Unread(suffix, _why_unread(suffix, left)) for suffix in left]
    return layers, unread


def _next_family(left: Mapping[str, Tensor]) -> tuple[Family | type[Family], list[str], str] | None:
    """The first family that the tensors make, with its suffixes. Of kinds with equal suffixes the shapes choose.

    A class instead of an instance: the tensors can only be of this kind, but their shapes are wrong.
    """
    failed: tuple[type[Family], list[str], str] | None = None
    for kind, own in _kinds(tuple(left)):
        if failed is not None and not set(own) & (set(failed[1]) - {ALPHA}):
            continue
        try:
            return kind.build({suffix: left[suffix] for suffix in own}), own, ""
        except ShapeError as error:
            failed = failed or (kind, own, str(error))
    return failed


@lru_cache(maxsize=500)
def _kinds(present: tuple[str, ...]) -> list[tuple[type[Family], list[str]]]:
    """The families that these suffixes are enough for, each with those of them that are its own."""
    return [
        (kind, [suffix for suffix in kind.suffixes() if suffix in present])
        for kind in FAMILIES
        if not kind.missing(present)
    ]


def _layer(family: Family, before: list[Layer], hints: Hints) -> Layer:
    if isinstance(family, LoRABias):
        beside = [layer.scale for layer in before if layer.parameter == "weight"]
        return Layer(family, hints.alpha, beside[0] if beside else 1.0)
    reshape = hints.reshape if family.parameter == "weight" else ()
    factor = scale(hints, family.rank) if family.scaled else 1.0
    return Layer(family, hints.alpha, factor, hints.note if family.scaled else "", reshape=reshape)


def scale(hints: Hints, rank: int | None) -> float:
    """alpha / rank, or the configuration's scale where the file has no alpha.

    1 where the family uses none, nothing says it, or alpha is 0 (trainers read 0 as "same as the rank").
    """
    if hints.alpha is None and hints.scale is not None:
        return hints.scale
    if rank is None or not hints.alpha:
        return 1.0
    return hints.alpha / (math.sqrt(rank) if hints.root_of_rank else rank / hints.parts)


def _wrap(layers: list[Layer], suffix: str, magnitude: Tensor, hints: Hints) -> list[Unread]:
    """Puts the DoRA magnitude around the weight's layer, in place."""
    for i, layer in enumerate(layers):
        if layer.parameter == "weight" and type(layer) is Layer:
            side, note = _magnitude_side(layer, suffix, magnitude, hints)
            plain = {field.name: getattr(layer, field.name) for field in fields(Layer)}
            note = "; ".join(filter(None, (layer.note, note)))
            layers[i] = DoRALayer(**{**plain, "note": note}, magnitude=magnitude, on_output=side)
            return []
    return [Unread(suffix, "a DoRA magnitude without factors")]


def _magnitude_side(layer: Layer, suffix: str, magnitude: Tensor, hints: Hints) -> tuple[bool, str]:
    """Whether the magnitude is of the output rows, and the note that says so where it had to be decided."""
    if isinstance(layer.family, EmbeddingLoRA):
        return False, ""  # an embedding is held the other way round: (num, dim), the outputs on axis 1
    side = MAGNITUDES[suffix]
    side = magnitude_side(magnitude) if side is None else side
    if side is not None:
        return side, ""
    side = True if hints.dora_on_output is None else hints.dora_on_output
    return side, f"DoRA on the {'output' if side else 'input'} side by {hints.dora_why}, where its shape leaves it open"


def _why_unread(suffix: str, present: Mapping[str, Tensor]) -> str:
    kinds = [kind for kind in FAMILIES if suffix in kind.suffixes()]
    if not kinds:
        return f"no known family has a factor {suffix!r}"
    kind = min(kinds, key=lambda kind: len(kind.missing(present)))
    missing = kind.missing(present)
    return f"incomplete {kind.name}: {', '.join(missing)} missing" if missing else f"{kind.name}: one factor too many"
