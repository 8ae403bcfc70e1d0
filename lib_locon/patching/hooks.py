"""What stands on a module whose ΔW runs beside it.

The branch runs in the dtype of the layer's output, as the layer itself does under the host's casts; it is added in one
rounding. Where several products meet, they are added in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_locon.arithmetic import without_autocast
from lib_locon.errors import PatchError
from lib_locon.models.targets import View
from lib_locon.patching.plan import Patch
from lib_locon.patching.storage import CONVS


class Sum(Protocol):
    """Branches on one part of a layer, with their strengths."""

    def with_strengths(self, strengths: Sequence[float]) -> Sum:
        """The same branches at other strengths; cheap."""
        ...

    def run(self, x: Tensor, layer: nn.Module) -> list[tuple[Tensor, float]]:
        """Tensors, each with its factor, whose sum is to be added to the output."""
        ...


@dataclass(frozen=True, eq=False)
class Term:
    """Patches of one part of a module, and what is added to one part of a module's output."""

    patches: tuple[Patch, ...]
    sum: Sum

    @property
    def view(self) -> View:
        """The part."""
        return self.patches[0].view

    @property
    def sources(self) -> tuple[object, ...]:
        """Equal sources: the same but for the strengths."""
        return tuple((patch.source, patch.view) for patch in self.patches)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal keys add the same."""
        return tuple(patch.key for patch in self.patches)


class Hook:
    """The forward hook on one module. Without terms it does nothing, also where it could not be removed.

    Nothing runs beside a copy of the model (`copy.deepcopy`, a pickle): no Session of it could stop that.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.terms: tuple[Term, ...] = ()
        self.handle: RemovableHandle | None = None

    def __reduce__(self) -> Any:
        # Python's own function that takes anything and does nothing: a pickle is loaded where this package is not
        return getattr, (nullcontext(), "__exit__")

    @property
    def key(self) -> tuple[object, ...]:
        """Equal keys do the same."""
        return tuple(term.key for term in self.terms)

    def install(self) -> None:
        """Puts it on its module, once."""
        if self.handle is None:
            self.handle = self.module.register_forward_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """Takes it off, and lets go of the factors."""
        self.terms = ()
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        terms = self.terms
        if not terms:
            return output
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise PatchError(f"a {type(module).__name__} gave no tensor of numbers: nothing can run beside it")
        x = args[0] if args else next(iter(kwargs.values()))
        with without_autocast(output.device.type):  # the layer has run, and its output says in which dtype
            return _added(module, x.to(output.device, output.dtype), output, terms)


def _added(module: nn.Module, x: Tensor, output: Tensor, terms: Sequence[Term]) -> Tensor:
    """The output with all terms, in its own dtype; the layer's own tensor is not written to."""
    parts = [(term.view, *part) for term in terms for part in term.sum.run(_input_of(x, module, term.view), module)]
    if len(parts) == 1 and not _is_rows(parts[0][0]) and _holds(output.dtype, parts[0][2]):
        _, change, strength = parts[0]
        return torch.add(output, change, alpha=strength)
    total = output.to(torch.promote_types(output.dtype, torch.float32), copy=True)
    axis = _channel_axis(output, module)
    for view, change, strength in parts:
        place = total.narrow(axis, view.start, view.length) if _is_rows(view) else total
        place.add_(change, alpha=strength)
    return total.to(output.dtype)


def _holds(dtype: torch.dtype, number: float) -> bool:
    """Whether it is an ordinary one there: on the CPU torch rounds it to `dtype`, and refuses one that is too large."""
    limits = torch.finfo(dtype)
    return limits.tiny <= abs(number) <= limits.max


def _input_of(x: Tensor, module: nn.Module, view: View) -> Tensor:
    """What of the input the adapter knows: an inpainting model's first convolution has more channels."""
    if view.length < 0 or view.axis == 0:
        return x
    return x.narrow(_channel_axis(x, module), view.start, view.length)


def _is_rows(view: View) -> bool:
    return view.length >= 0 and view.axis == 0


def _channel_axis(x: Tensor, module: nn.Module) -> int:
    return x.ndim - 1 - (len(module.kernel_size) if isinstance(module, CONVS) else 0)
