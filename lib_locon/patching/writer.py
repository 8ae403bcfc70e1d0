"""The numbers of one weight: base + patches, made by whichever way its form asks for.

What has been written, and what is to be done where that fails, is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lib_locon.patching.compute import only_product, patched, write_from_file, write_sum
from lib_locon.patching.overflow import overflowing, overflows
from lib_locon.patching.parameters import Parameters
from lib_locon.patching.plan import Delta, Patch, Plan
from lib_locon.patching.rounding import Rounding, write_one_by_one
from lib_locon.patching.storage import Findings, cost_of, decode, encode
from lib_locon.patching.store import BaseStore
from lib_locon.patching.workspace import Workspace

Send: TypeAlias = Callable[[Iterable[Any], torch.device], bool]
"""Brings what ΔWs are made of to a GPU, for many of them at a time, and says whether anything is on its way. What it
does not bring they bring themselves."""


class Writer:
    """For one change of one model's weights. `send` as the engine's."""

    def __init__(self, weights: Parameters, store: BaseStore, findings: Findings, send: Send) -> None:
        self._weights = weights
        self._store = store
        self._findings = findings
        self._send = send

    def prepare(self, weights: Mapping[str, Tensor], plan: Plan) -> None:
        """What is quicker done for all that will be written together, before the first of them: on GPUs, which else
        would be waited for at each."""
        there = {path: weight for path, weight in weights.items() if weight.is_cuda and path in plan}
        self._store.prove(there)
        needed: dict[torch.device, list[Delta]] = {}
        for path, weight in there.items():
            needed.setdefault(weight.device, []).extend(patch.delta for patch in plan[path])
        for device, deltas in needed.items():
            if self._send(deltas, device):
                self._store.under_way(device)

    def can_hold(self, path: str) -> bool:
        """Whether the weight itself can hold base + ΔW; of the others the module says what they stand for."""
        return self._findings.cannot_hold(*self._weights.owner(path)) is None

    def can_share(self, path: str, weight: Tensor) -> bool:
        """Whether workers may write this weight. Not those that run others' code, or on a GPU."""
        return weight.is_cpu and self.can_hold(path)

    def overflowing(self, extremes: Mapping[str, Tensor | None]) -> str:
        """The first of these weights whose sum its dtype cannot hold; "" for none. Waits for a GPU once."""
        noted = {p: (seen, self._weights.weight(p).dtype) for p, seen in extremes.items() if seen is not None}
        return next(filter(self._has_finite_base, overflowing(noted)), "")

    def ready(
        self, path: str, weight: Tensor, patches: Sequence[Patch], rounding: Rounding, space: Workspace | None
    ) -> Callable[[], Tensor | None]:
        """What writes the weight, and returns the extremes of the sum; its base is kept or found by now.

        Both within `writing`, with patches within `exact_sums` too. Raises BaseLost; what it returns does so where it
        reads the base by rows: the weight is then written in part.
        """
        by_rows = self._by_rows(path, weight, patches, rounding, space)
        if by_rows is not None:
            return by_rows
        if patches:
            pristine = self._store.fetch(path, weight)
            return partial(self.write_sum, path, weight.detach(), pristine, patches, rounding, space)
        return partial(self._store.put_back, weight, self._store.save(path, weight))

    def _by_rows(
        self, path: str, weight: Tensor, patches: Sequence[Patch], rounding: Rounding, space: Workspace | None
    ) -> Callable[[], None] | None:
        """Where the base is needed no more of at a time than some rows, and can be read so."""
        base = self._store.readable(path, weight) if weight.ndim and weight.is_contiguous() else None
        if base is None:
            return None
        if weight.is_cuda and not patches:
            return partial(self._store.put_back, weight, base)
        if space is None or rounding != "exact" or not weight.is_cpu or not self.can_hold(path):
            return None
        product = only_product(weight.detach(), patches, space) if patches else None
        if patches and product is None:
            return None
        return partial(write_from_file, weight.detach(), base, product, space)

    def write_sum(
        self,
        path: str,
        out: Tensor,
        base: Tensor,
        patches: Sequence[Patch],
        rounding: Rounding,
        space: Workspace | None = None,
    ) -> Tensor | None:
        """The sum into `out`, and its extremes. A weight of 8 bits is read and rounded as its module says.

        To be called within `exact_sums`.
        """
        if self.can_hold(path):
            write = write_sum if rounding == "exact" else write_one_by_one
            return write(out, base, patches, space)
        module, name = self._weights.owner(path)
        value = decode(module, name, base)
        total, extremes = patched(value, patches, torch.float32)
        if extremes is not None and overflows(extremes, torch.float32):
            raise OverflowError("at these strengths its numbers are beyond fp32")
        stored = encode(module, name, total, out.dtype)  # kept within its range
        self._findings.costs[path] = cost_of(module, name, base, stored, value, total)
        out.copy_(stored)
        return None

    def _has_finite_base(self, path: str) -> bool:
        # a checkpoint that has NaN in it was so before: not the adapter's doing, and no reason to refuse it
        return bool(torch.isfinite(self._store.save(path, self._weights.weight(path)).float()).all())


def writing(weight: Tensor) -> AbstractContextManager[object]:
    """What a weight is written within: one that was made in inference mode can be written in no other."""
    if weight.is_inference():
        return torch.inference_mode()
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()
