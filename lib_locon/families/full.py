"""Changes that are stored whole: full fine-tuning, norms, biases, and weights that replace the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lib_locon.families.base import Family, factor


@dataclass(frozen=True, eq=False)
class Full(Family):
    """ΔW = diff, in the weight's own shape. Extractors and full fine-tuning write it."""

    name = "Full"
    scaled = False
    diff: Tensor = factor("diff", "out n")

    def bound(self, peaks: Mapping[str, float]) -> float:
        return max(peaks.values())

    def delta(self, base: Tensor) -> Tensor:
        return self.diff.reshape(base.shape)


@dataclass(frozen=True, eq=False)
class FullBias(Full):
    """The same for a bias; may come without the weight's."""

    parameter = "bias"
    diff: Tensor = factor("diff_b", "out")


@dataclass(frozen=True, eq=False)
class NormWeight(Full):
    """A LayerNorm's or GroupNorm's weight; may come without its bias."""

    name = "Norm"
    diff: Tensor = factor("w_norm", "out")


@dataclass(frozen=True, eq=False)
class NormBias(Full):
    """A norm's bias."""

    name = "Norm"
    parameter = "bias"
    diff: Tensor = factor("b_norm", "out")


@dataclass(frozen=True, eq=False)
class LoRABias(Full):
    """PEFT's `lora_bias`: added to the module's bias with the scale of the LoRA beside it."""

    name = "LoRA"
    parameter = "bias"
    scaled = True
    diff: Tensor = factor("lora_B.bias", "out")


@dataclass(frozen=True, eq=False)
class SetWeight(Full):
    """The file's weight in place of the base: ΔW = set − W, so that strength 1 is the file's and 0 the base."""

    name = "Set"
    needs_base = True
    diff: Tensor = factor("set_weight", "out n")

    def bound(self, peaks: Mapping[str, float]) -> float:
        return math.inf  # W itself is in it

    def delta(self, base: Tensor) -> Tensor:
        return self.diff.reshape(base.shape) - base


@dataclass(frozen=True, eq=False)
class SetBias(SetWeight):
    """The same for a bias (PEFT's `bias` and `modules_to_save`)."""

    parameter = "bias"
    diff: Tensor = factor("set_bias", "out")
