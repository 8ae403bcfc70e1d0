"""LoRA that was trained from a start other than zero: W − s·B₀·A₀ was its base, with A₀ and B₀ made from W itself.

PEFT's `init_lora_weights`. The file holds the trained A and B only, so the start is made again from the weight that it
is applied to: ΔW = s·B·A − s·B₀·A₀. Right on the checkpoint that it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.arithmetic import matrix
from lib_locon.errors import Unusable
from lib_locon.families.base import Family, factor


@dataclass(frozen=True, eq=False)
class StartedLoRA(Family):
    """Common base of PiSSA and OLoRA. Like PEFT, for linear layers alone."""

    needs_base = True
    up: Tensor = factor("lora_up.weight", "out r")
    down: Tensor = factor("lora_down.weight", "r n")

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise Unusable(f"{self.name} on a convolution is nothing that PEFT trains")
        super().check(shape)
        if self.sizes()["r"] > min(shape):
            raise Unusable(f"{self.name} of a rank beyond the sizes of the weight")

    def bound(self, peaks: Mapping[str, float]) -> float:
        del peaks
        return math.inf  # the start has no bound by the factors

    def start(self, base: Tensor, rank: int) -> Tensor:
        """B₀·A₀, (out, n)."""
        raise NotImplementedError

    def delta(self, base: Tensor) -> Tensor:
        return matrix(self.up) @ matrix(self.down) - self.start(base, matrix(self.down).shape[0])


@dataclass(frozen=True, eq=False)
class PiSSA(StartedLoRA):
    """Start: the truncated SVD of W, divided by the scale (`scale`, the marker, is alpha / r)."""

    name = "PiSSA"
    scale: Tensor = factor("start.pissa", "")

    def check(self, shape: tuple[int, ...]) -> None:
        if not self.scale.is_meta and not float(self.scale) > 0:
            raise Unusable(f"{self.name} at the scale {float(self.scale):g}, by which its start would be divided")
        super().check(shape)

    def start(self, base: Tensor, rank: int) -> Tensor:
        left, values, right = torch.linalg.svd(base, full_matrices=False)
        start: Tensor = (left[:, :rank] * (values[:rank] / float(self.scale))) @ right[:rank]
        return start


@dataclass(frozen=True, eq=False)
class OLoRA(StartedLoRA):
    """Start: the first columns of Q and rows of R, of W = Q·R."""

    name = "OLoRA"
    scale: Tensor = factor("start.olora", "")

    def start(self, base: Tensor, rank: int) -> Tensor:
        q, r = torch.linalg.qr(base)
        start: Tensor = q[:, :rank] @ r[:rank]
        return start
