"""The Tucker (CP) recomposition that LoCon, LoHa and LoKr share."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_locon.arithmetic import matrix


def fold_core(core: Tensor, down: Tensor) -> Tensor:
    """`core` (p, q, *k) times `down` (q, in) → a matrix (p, in·k): what a plain k×k `down` would have been."""
    kernel = core.reshape(*core.shape[:2], -1)
    return torch.einsum("pqk,qi->pik", kernel, matrix(down)).reshape(core.shape[0], -1)


def rebuild(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Σ_pq up[o,p] · core[p,q,…] · down[q,i] as a matrix (out, in·k)."""
    return matrix(up) @ fold_core(core, down)
