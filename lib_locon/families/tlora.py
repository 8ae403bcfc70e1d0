"""T-LoRA (LyCORIS 4): a low-rank product that was trained against the base weight's own top singular triple."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.arithmetic import matrix
from lib_locon.errors import Unusable
from lib_locon.families.base import Family, factor


@dataclass(frozen=True, eq=False)
class TLoRA(Family):
    """ΔW = p · diag(λ) · q − (the same of the start), the start being the rank-r truncated SVD of W.

    The start is not in the file: it is rebuilt from W, so the result is right on the checkpoint it was trained on (and
    for the trainer's default, the principal triple). On convolutions its training and its own merge disagree.
    """

    name = "T-LoRA"
    needs_base = True
    q: Tensor = factor("q_layer.weight", "r n")
    p: Tensor = factor("p_layer.weight", "out r")
    strengths: Tensor = factor("lambda_layer", "one r")

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise Unusable("T-LoRA on a convolution has no single meaning and is not applied")
        super().check(shape)

    def delta(self, base: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(base, full_matrices=False)
        rank = matrix(self.p).shape[1]
        start: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
        return (matrix(self.p) * self.strengths.reshape(1, -1)) @ matrix(self.q) - start
