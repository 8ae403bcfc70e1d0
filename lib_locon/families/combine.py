"""Several branches on the same part of one layer, run together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib_locon.families.branch_of import branch_of, has_branch
from lib_locon.families.branches import Branch, LowRank
from lib_locon.families.convolve import apply_pointwise, apply_weight, per_group
from lib_locon.families.layer import FLOAT32_MAX
from lib_locon.uploads import moved

__all__ = ["Combined", "combine", "has_branch", "send"]
Kind = tuple[torch.device, torch.dtype]


@dataclass(frozen=True)
class _Ready:
    """The branches for one device and dtype. The low-rank ones stand side by side: one `down` for all of them."""

    down: Tensor | None
    ups: tuple[Tensor, ...]
    """One for each low-rank branch; in fp32 where there are several, which strengths have yet to be put into."""
    scales: tuple[float, ...]
    """What the product of each of these is to be multiplied by."""
    others: tuple[Branch, ...]


class Combined:
    """Σ strength · branch, the low-rank ones as one product. Immutable, but for what it converted once and keeps."""

    def __init__(
        self,
        branches: Sequence[Branch],
        strengths: Sequence[float],
        ready: dict[Kind, _Ready],
        sent: dict[torch.device, list[Branch]],
    ) -> None:
        self._branches = tuple(branches)
        self._low = [i for i, branch in enumerate(branches) if isinstance(branch, LowRank)]
        self._rest = [i for i in range(len(branches)) if i not in self._low]
        self._strengths = tuple(strengths)
        self._ready = ready
        self._sent = sent
        """The branches on devices where they are not ready yet, each in the dtypes of its file."""
        self._ups: dict[Kind, tuple[Tensor, float]] = {}

    def with_strengths(self, strengths: Sequence[float]) -> Combined:
        """The same at other strengths; no factor is read or converted again."""
        return Combined(self._branches, strengths, self._ready, self._sent)

    def tensors(self, device: torch.device) -> list[Tensor]:
        """What is to be brought to a device; nothing that is there already."""
        if device in self._sent or any(there == device for there, _ in self._ready):
            return []
        return [tensor for branch in self._branches for tensor in branch.tensors()]

    def receive(self, tensors: Iterator[Tensor], device: torch.device) -> None:
        """The same there."""
        self._sent[device] = [branch.with_tensors(tensors) for branch in self._branches]

    def run(self, x: Tensor, layer: nn.Module) -> list[tuple[Tensor, float]]:
        """Tensors in the dtype of `x`, each with the number it is to be multiplied by: their sum is the change."""
        kind = (x.device, x.dtype)
        ready = self._ready.get(kind)
        if ready is None:
            ready = self._ready[kind] = self._made_ready(*kind)
        found = []
        if ready.down is not None:
            hidden = apply_weight(x, layer, per_group(ready.down, layer))
            up, number = self._up(ready, kind)
            found.append((apply_pointwise(hidden, layer, up), number))
        for i, branch in zip(self._rest, ready.others, strict=True):
            found.append((branch.run(x, layer), self._number(i, branch.scale)))
        return found

    def _number(self, i: int, scale: float) -> float:
        """What the branch's output is to be multiplied by, as fp32 holds it."""
        return max(-FLOAT32_MAX, min(FLOAT32_MAX, self._strengths[i] * scale))

    def _made_ready(self, device: torch.device, dtype: torch.dtype) -> _Ready:
        branches = self._sent.pop(device, self._branches)
        others = tuple(branches[i].to(device, dtype) for i in self._rest)
        if not self._low:
            return _Ready(None, (), (), others)
        wide = torch.promote_types(dtype, torch.float32) if len(self._low) > 1 else dtype
        low = [branch.to(device, wide) for branch in branches if isinstance(branch, LowRank)]
        down = torch.cat([branch.down.to(dtype) for branch in low])
        return _Ready(down, tuple(branch.up for branch in low), tuple(branch.scale for branch in low), others)

    def _up(self, ready: _Ready, kind: Kind) -> tuple[Tensor, float]:
        """(out, all ranks) and a number for all of it; what each has of its own is in `up`, rounded once."""
        numbers = [self._number(i, scale) for i, scale in zip(self._low, ready.scales, strict=True)]
        if len(numbers) == 1:
            return ready.ups[0], numbers[0]
        found = self._ups.get(kind)
        if found is None:
            common = 2.0 ** (math.frexp(max(map(abs, numbers)))[1] - 1)
            parts = [number / common * part for number, part in zip(numbers, ready.ups, strict=True)]
            found = self._ups[kind] = torch.cat(parts, 1).to(kind[1]), common
        return found


def combine(layers: Sequence[object], strengths: Sequence[float]) -> Combined:
    """Σ strength · branch of the layers; raises ValueError for one that has no branch (ask `has_branch`)."""
    branches = [branch_of(layer) for layer in layers]
    # looked at now, not in the forward: to wait for a GPU there costs time, and torch.compile stops at it
    found = [branch.sized() for branch in branches if branch is not None]
    if len(found) != len(branches):
        raise ValueError("a layer whose ΔW needs the base weight cannot run beside it")
    return Combined(found, strengths, {}, {})


def send(sums: Iterable[Combined], device: torch.device) -> None:
    """Brings what many of them need to a GPU together, which the first run of each would wait for."""
    todo = [(combined, tensors) for combined in sums if (tensors := combined.tensors(device))]
    if todo:
        arrived = iter(moved([tensor for _, tensors in todo for tensor in tensors], device))
        torch.cuda.synchronize(device)  # whoever runs the layers may do so on a stream of his own
        for combined, _ in todo:
            combined.receive(arrived, device)
