"""Which families can run beside a layer, and as what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lib_locon.arithmetic import matrix
from lib_locon.families.base import Family
from lib_locon.families.branches import Branch, Hadamard, Kronecker, LowRank, Shift, Tucker, Whole
from lib_locon.families.full import Full, FullBias, LoRABias
from lib_locon.families.layer import Layer
from lib_locon.families.loha import LoHa, TuckerLoHa
from lib_locon.families.lokr import LoKr, TuckerLoKr
from lib_locon.families.lora import LoRA, SparseLoRA, TuckerLoRA
from lib_locon.families.rows import RowsLayer
from lib_locon.families.tucker import fold_core


def has_branch(layer: object) -> bool:
    """Whether `branch_of` makes one of it."""
    return type(layer) in (Layer, RowsLayer) and isinstance(layer, Layer) and type(layer.family) in _MAKERS


def branch_of(layer: object) -> Branch | None:
    """The branch of an additive layer; None where ΔW needs the base weight, or is of something else (a norm)."""
    if not has_branch(layer) or not isinstance(layer, Layer):
        return None
    branch = dataclasses.replace(_MAKERS[type(layer.family)](layer.family), scale=layer.scale)
    return branch.rows(layer.start, layer.length) if isinstance(layer, RowsLayer) else branch


def _lora(family: LoRA) -> Branch:
    return LowRank(up=matrix(family.up), down=matrix(family.down))


def _sparse(family: SparseLoRA) -> Branch:
    # made whole: what is left over of a weight has no structure to keep
    up, down = matrix(family.up).float(), matrix(family.down).float()
    wide = dataclasses.replace(family, up=up, down=down, values=family.values.float())
    return _whole(wide.delta(up.new_zeros(()).expand(up.shape[0], down.shape[1])))


def _tucker(family: TuckerLoRA) -> Branch:
    return Tucker(up=matrix(family.up), core=family.mid, down=matrix(family.down))


def _loha(family: LoHa) -> Branch:
    a1, b1, a2, b2 = (matrix(tensor) for tensor in (family.w1_a, family.w1_b, family.w2_a, family.w2_b))
    return Hadamard(length=a1.shape[0], a1=a1, b1=b1, a2=a2, b2=b2)


def _tucker_loha(family: TuckerLoHa) -> Branch:
    b1, b2 = (fold_core(t.float(), b.float()) for t, b in ((family.t1, family.w1_b), (family.t2, family.w2_b)))
    return Hadamard(length=family.w1_a.shape[1], a1=matrix(family.w1_a).T, b1=b1, a2=matrix(family.w2_a).T, b2=b2)


def _lokr(family: LoKr) -> Branch:
    if family.w2 is not None:
        return Kronecker(first=_first(family), second=_whole(matrix(family.w2)))
    assert family.w2_a is not None and family.w2_b is not None
    return Kronecker(first=_first(family), second=LowRank(up=matrix(family.w2_a), down=matrix(family.w2_b)))


def _tucker_lokr(family: TuckerLoKr) -> Branch:
    second = Tucker(up=matrix(family.w2_a).T, core=family.t2, down=matrix(family.w2_b))
    return Kronecker(first=_first(family), second=second)


def _first(family: LoKr | TuckerLoKr) -> Tensor:
    if family.w1 is not None:
        return matrix(family.w1)
    assert family.w1_a is not None and family.w1_b is not None
    return matrix(family.w1_a).float() @ matrix(family.w1_b).float()


def _whole(weight: Tensor) -> Whole:
    return Whole(length=weight.shape[0], weight=weight)


_MAKERS: dict[type[Family], Callable[[Any], Branch]] = {
    LoRA: _lora,
    SparseLoRA: _sparse,
    TuckerLoRA: _tucker,
    LoHa: _loha,
    TuckerLoHa: _tucker_loha,
    LoKr: _lokr,
    TuckerLoKr: _tucker_lokr,
    Full: lambda family: _whole(matrix(family.diff)),
    FullBias: lambda family: Shift(vector=family.diff.flatten()),
    LoRABias: lambda family: Shift(vector=family.diff.flatten()),
}
"""By exact class: a subclass that changes the formula must say its own branch, or have none."""
