"""The sum as the webui's built-in Lora makes it: one adapter after the other, rounded after each.

For images that were made so. Each ΔW is taken from what the adapters before it left, and their order matters; the
engine's own sum (`compute`) knows neither. Only what rounds is followed, no mistake of the built-in's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lib_locon.arithmetic import working_dtype
from lib_locon.errors import one_of
from lib_locon.patching.compute import write_sum
from lib_locon.patching.plan import Patch
from lib_locon.patching.workspace import Workspace

Rounding: TypeAlias = Literal["exact", "builtin"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def rounding_named(name: str) -> Rounding:
    """One by its name. Raises ValueError."""
    return one_of(ROUNDINGS, name, "rounding")


def write_one_by_one(out: Tensor, base: Tensor, patches: Sequence[Patch], space: Workspace | None = None) -> Tensor:
    """out ← base, then one patch after the other in their order. As `write_sum`, within `exact_sums` too; `base` has
    the dtype of `out`."""
    space = space or Workspace()
    out.copy_(base)
    for patch in patches:
        part = patch.view.of(out)
        whole = patch.delta.unscaled(part)
        if whole is None:
            write_sum(out, out.clone(), [patch], space)
        else:
            _add(part, *whole, patch.strength, space)
    # widened first: torch 2.1 knows no extremes of fp16 on the CPU
    return torch.stack(torch.aminmax(out.to(working_dtype(out))))


def _add(part: Tensor, change: Tensor, scale: float, strength: float, space: Workspace) -> None:
    # three roundings, as there: of the scaled change, of that at its strength, and of the sum, all in the change's own
    # dtype, and the last one in the weight's too. Not into `change`, which may be the adapter's own tensor
    scaled = space.take("change", tuple(change.shape), change.dtype, change.device)
    torch.mul(change, scale, out=scaled).mul_(strength)
    if scaled.dtype == part.dtype:
        part.add_(scaled)
    else:
        part.copy_(scaled.add_(part.to(scaled.dtype)))
