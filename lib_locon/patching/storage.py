"""How a weight is stored: whether it can hold a sum, what its numbers stand for, and by which way a ΔW reaches it.

Knows no quantiser by name: it looks at dtypes and at what the module itself keeps beside the weight.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lib_locon.errors import PatchError
from lib_locon.models.targets import View
from lib_locon.patching.eight_bits import (
    FORM,
    FP8,
    MOST_FORM_BYTES,
    PLAIN,
    SCALES,
    Cost,
    decoded,
    encoded,
    form_in,
    stretched,
    unknown_companion,
    unknown_form,
)

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GETATTR = nn.Module.__getattr__
"""torch's own: an extension may replace it."""
_READ_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
Way: TypeAlias = Literal["merge", "side", "requantise"]


@dataclass(frozen=True)
class Route:
    """The way of a ΔW into one weight, and why it is not the ordinary one. No path: it cannot be used, and why."""

    path: Way | None
    reason: str = ""
    rounds: bool = False
    """Whether the sum is rounded to 8 bits again."""


class Findings:
    """What was found of a model's weights: each is looked at once, at the first question about it.

    For the weights of one change, which live meanwhile; another change takes another look.
    """

    def __init__(self) -> None:
        self._reasons: dict[tuple[int, str], str | None] = {}
        self.costs: dict[str, Cost] = {}
        """By path, of the weights that were rounded to few bits again."""
        self._protected: list[tuple[int, int]] | None = None
        """First and last address of each span, in their order: to ask the system takes a millisecond."""

    def cannot_hold(self, module: nn.Module, name: str) -> str | None:
        """Why the parameter cannot hold base + ΔW without loss, as half a sentence; None where it can."""
        key = (id(module), name)
        if key not in self._reasons:
            self._reasons[key] = _cannot_hold(module, name, self)
        return self._reasons[key]

    def protects(self, address: int) -> bool:
        """Whether a write there would end the process, as into a file that is mapped for reading only."""
        if self._protected is None:
            self._protected = sorted(_protected_spans())
        before = bisect_right(self._protected, (address, sys.maxsize))
        return before > 0 and address <= self._protected[before - 1][1]


def _protected_spans() -> Iterator[tuple[int, int]]:
    if sys.platform.startswith("linux"):  # elsewhere nothing tells
        for line in Path("/proc/self/maps").read_text(encoding="utf8", errors="replace").splitlines():
            span, rights, *_ = line.split(maxsplit=2)
            if "w" not in rights:
                first, last = span.split("-")
                yield int(first, 16), int(last, 16) - 1


def which_path(
    module: nn.Module,
    name: str,
    view: View,
    *,
    branch: bool,
    parent: nn.Module | None = None,
    side: bool = False,
    findings: Findings | None = None,
) -> Route:
    """For the parameter `name` of `module`: merge where it can hold the sum, else beside it, else requantised.

    `branch` says whether the ΔW can run beside the weight; `side`, that the user wants so wherever it can.
    """
    findings = findings or Findings()
    why_not_merge = findings.cannot_hold(module, name)
    if why_not_merge is None and not (side and branch):
        return Route("merge")
    why_not_side = cannot_hook(module, name, view, parent)
    if branch and why_not_side is None:
        return Route("side", why_not_merge or "asked for")
    if why_not_merge is None:
        return Route("merge", str(why_not_side))
    if can_requantise(module, name, findings):
        return Route("requantise", why_not_merge, rounds=getattr(module, name).dtype not in PLAIN)
    if unknown := _unknown(module, name):
        why_not_merge += f", {unknown}"
    beside = why_not_side or "this kind of adapter needs the weight itself"
    return Route(None, f"{why_not_merge}, and {beside}")


def _cannot_hold(module: nn.Module, name: str, findings: Findings) -> str | None:
    weight: Tensor = getattr(module, name)
    if weight.is_meta:
        return "the model's weight has no data (meta device)"
    if type(weight) not in (nn.Parameter, Tensor) or hasattr(weight, "quant_state"):
        return f"the model's weight is stored in a form of its own ({type(weight).__name__})"
    if weight.dtype not in PLAIN:
        return f"the model's weight is stored as {str(weight.dtype).removeprefix('torch.')}"
    if name == "weight" and _stored_scale(module) is not None:
        return "the model's weight is stored with a scale beside it"
    return "the model's weight is read-only" if _read_only(weight, findings) else None


def _stored_scale(module: nn.Module) -> Any:
    """What lies beside the module's weight to be multiplied with it, in whatever form; None for nothing."""
    for name in SCALES:
        if _may_have(module, name):
            scale = getattr(module, name, None)
            if scale is not None:
                return scale
    return None


def _may_have(module: nn.Module, name: str) -> bool:
    """Whether `getattr` may find it. To find nothing takes `getattr` several times as long as this, for each module at
    each change. Nothing is remembered: classes change, and who keeps one may keep a model by it."""
    kind: Any = type(module)
    if kind.__getattr__ is not _GETATTR or kind.__getattribute__ is not object.__getattribute__ or hasattr(kind, name):
        return True
    return name in module.__dict__ or name in module._parameters or name in module._buffers or name in module._modules


def cannot_hook(module: nn.Module, name: str, view: View, parent: nn.Module | None = None) -> str | None:
    """Why nothing can run beside the module for this part of its parameter; None where it can."""
    kind = type(module).__name__
    if kind == "NonDynamicallyQuantizableLinear" or isinstance(parent, _READ_DIRECTLY):
        return f"its {type(parent).__name__ if parent else 'attention'} reads the weight without running the layer"
    if isinstance(module, torch.jit.ScriptModule):
        return "its layer is a compiled script"
    if name not in ("weight", "bias") or not (isinstance(module, CONVS) or _is_linear(module)):
        return f"nothing can run beside {name} of a {kind}"
    if view.transposed:
        return "the model holds it the other way round"
    if view.length >= 0 and isinstance(module, CONVS) and module.groups > 1:
        return "it is for a part of a grouped convolution"
    return None


def _is_linear(module: nn.Module) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, nn.Linear) or all(isinstance(size, int) for size in sizes)


def _read_only(weight: Tensor, findings: Findings) -> bool:
    """Whether a write would fail: numbers that share memory among themselves, or memory that the system protects."""
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        return True
    storage = weight.untyped_storage()
    owned = not hasattr(storage, "resizable") or storage.resizable()  # by torch, which allocates to write
    return not owned and weight.device.type == "cpu" and weight.numel() > 0 and findings.protects(weight.data_ptr())


def can_requantise(module: nn.Module, name: str, findings: Findings) -> bool:
    """Whether `decode` and `encode` know what the stored numbers stand for."""
    weight: Tensor = getattr(module, name)
    if weight.is_meta or type(weight) not in (nn.Parameter, Tensor) or hasattr(weight, "quant_state"):
        return False
    if tuple(weight.shape) != logical_shape(module, name) or _read_only(weight, findings):
        return False
    if _unknown(module, name):
        return False
    scaled = _scale(module, name) is not None
    return weight.dtype in FP8 or (scaled and weight.dtype in (torch.int8, *PLAIN))


def decode(module: nn.Module, name: str, stored: Tensor) -> Tensor:
    """What `stored`, the parameter's pristine numbers, stands for; a plain weight is returned as it is.

    Where the host keeps the weight as it was before it was rounded to 8 bits (`fp16_weight`), that is the better base.
    """
    kept = getattr(module, f"fp16_{name}", None)
    if stored.dtype in FP8 and isinstance(kept, Tensor) and kept.shape == stored.shape:
        return kept.to(stored.device)
    scale = _scale(module, name)
    return stored if scale is None else decoded(stored, scale)


def encode(module: nn.Module, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers to store for `value` (fp32), in the parameter's dtype: rounded once, and kept within its range."""
    return encoded(value, _scale(module, name), dtype)


def cost_of(module: nn.Module, name: str, before: Tensor, after: Tensor, base: Tensor, total: Tensor) -> Cost:
    """As `Cost.of`, with the module's own scale."""
    return Cost.of(before, after, base, total, _scale(module, name))


def _scale(module: nn.Module, name: str) -> Tensor | None:
    """What the stored numbers are multiplied by, in a shape that torch stretches to theirs; None where by nothing.

    Raises PatchError for one that is not known: one number for a block of them, say, which blocks nothing tells.
    """
    if name != "weight":
        return None
    scale = _stored_scale(module)
    if scale is None:
        return None
    if isinstance(scale, Tensor) and scale.dtype in PLAIN:
        shape = stretched(tuple(scale.shape), logical_shape(module, name))
        if shape is not None:
            return scale.reshape(shape)
    raise PatchError("the layout of its scale is not known")


def _unknown(module: nn.Module, name: str) -> str | None:
    """Of what its numbers stand for, that which is not known, as half a sentence; None where all is."""
    try:
        _scale(module, name)
    except PatchError as error:
        return str(error)
    if name != "weight":
        return None
    beside = unknown_companion((*module._parameters, *module._buffers))
    if beside is not None:
        return f"what its {beside} stands for is not known"
    form = getattr(module, FORM, None) if _may_have(module, FORM) else None
    if not isinstance(form, Tensor):
        return None
    readable = form.dtype == torch.uint8 and not form.is_meta and form.numel() <= MOST_FORM_BYTES
    named = unknown_form(form_in(bytes(form.detach().flatten().tolist())) if readable else None)
    return None if named is None else f"its form is {named}"


def logical_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Of the parameter as adapters mean it: packed 4-bit weights have another shape than the matrix in them."""
    weight: Tensor = getattr(module, name)
    shape = tuple(weight.shape)
    if name == "weight" and weight.dtype not in PLAIN and not isinstance(module, CONVS) and _is_linear(module):
        return int(getattr(module, "out_features", 0)), int(getattr(module, "in_features", 0))
    if name == "weight" and weight.dtype not in PLAIN and isinstance(module, CONVS):
        packed = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return shape if prod(shape) == prod(packed) else packed
    return shape


def logical_shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """By the parameter's path, for a table of names."""
    return {
        f"{prefix}.{name}" if prefix else name: logical_shape(module, name)
        for prefix, module in model.named_modules()
        for name, weight in module._parameters.items()
        if weight is not None
    }
