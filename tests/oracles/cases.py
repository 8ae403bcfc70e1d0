"""One layer, one adapter, and the ΔW that the adapter's own library computes for it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

KINDS = ("linear", "conv1d", "conv2d_1x1", "conv2d_3x3", "conv3d", "embedding", "layernorm", "groupnorm")


@dataclass(frozen=True, eq=False)
class Case:
    """An adapter on one layer and what it must do there at full strength.

    name         ``source/family/variant/kind``, unique
    family       key of ``naive.FAMILIES``
    kind         one of ``KINDS``
    source       ``lycoris`` or ``peft``: whose code computed ``delta``
    tensors      suffix -> tensor as the file holds it (``alpha`` only where the trainer writes one)
    base         the layer's weight, ``(out, in, *k)``; an embedding's is ``(num, dim)``, a norm's ``(C,)``
    delta        ΔW by the library at full strength, same shape as ``base``, float64 (float32 for OFT and BOFT)
    bias_delta   what the library adds to the layer's bias, ``(out,)``, or None where it leaves the bias alone
    config       what the tensors do not tell. Keys in use: ``scale`` (peft: alpha and r live in the config),
                 ``use_cayley_neumann``, ``feedforward``, ``base_bias`` (bias that a multiplicative family needs)
    tier         1: LoRA, LoCon, Tucker, LoHa, LoKr by LyCORIS, and plain PEFT LoRA; 2: all the rest
    """

    name: str
    family: str
    kind: str
    source: str
    tensors: Tensors
    base: Tensor
    delta: Tensor
    bias_delta: Tensor | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tier: int = 1

    def prefixed(self, module: str) -> Tensors:
        """The tensors under file keys: ``<module>.<suffix>``."""
        return {f"{module}.{suffix}": tensor for suffix, tensor in self.tensors.items()}


def seeded(name: str) -> torch.Generator:
    """A generator that depends on the name alone, so adding a case changes no other."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value; infinite when shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), 1e-30)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of both libraries, the same at every call and on every machine with the same library versions."""
    from . import lycoris_oracle, peft_oracle

    with torch.random.fork_rng(devices=[]):
        cases = (*lycoris_oracle.cases(), *peft_oracle.cases())
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise AssertionError(f"case names repeat: {sorted(n for n in names if names.count(n) > 1)}")
    return cases


def select(
    tier: int | None = None,
    family: str | Iterable[str] | None = None,
    kind: str | None = None,
    source: str | None = None,
) -> list[Case]:
    """The cases that fit every filter given."""
    families = {family} if isinstance(family, str) else None if family is None else set(family)
    return [
        case
        for case in all_cases()
        if (tier is None or case.tier == tier)
        and (families is None or case.family in families)
        and (kind is None or case.kind == kind)
        and (source is None or case.source == source)
    ]
