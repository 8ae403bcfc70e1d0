"""Sums with numbers that their dtype cannot hold: told by their extremes, and looked for where there can be any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lib_locon.patching.plan import Patch

_HARMLESS = {torch.float16: 8.0, torch.bfloat16: 2.0**100, torch.float32: 2.0**100, torch.float64: 2.0**900}
"""A change that no number of the dtype can leave its range by: under half of the step between its largest numbers."""

_USUAL = 2.0**16
"""Of a strength: beyond it the products on the way may overflow, though their sum does not."""


class Watch:
    """Notes the extremes of a sum, tile by tile, where they are needed: to look costs a third of the sum itself."""

    def __init__(self, out: Tensor, base: Tensor, patches: Sequence[Patch]) -> None:
        most, usual = 0.0, True
        for patch in patches:
            strength = abs(patch.strength)
            most += strength * patch.delta.bound()
            usual = usual and strength <= _USUAL
        self.needed = base.dtype != out.dtype or not (usual and most < _HARMLESS.get(out.dtype, 0.0))
        self._seen: list[Tensor] = []

    def look(self, tile: Tensor) -> None:
        """At a part of the sum, in the working dtype."""
        if self.needed:
            self._seen += torch.aminmax(tile)  # NaN where there is one

    def extremes(self) -> Tensor | None:
        """The least and the largest numbers; None where nothing needed to be looked at."""
        return torch.stack(self._seen) if self._seen else None


def overflows(extremes: Tensor, dtype: torch.dtype) -> bool:
    """Whether a sum with these extremes has numbers that `dtype` cannot hold, or NaN. Waits for the device."""
    return not bool((extremes.abs() <= torch.finfo(dtype).max).all())


def overflowing(noted: Mapping[str, tuple[Tensor, torch.dtype]]) -> list[str]:
    """Those of many sums, by name with their extremes and dtypes, that overflow. Waits once for each dtype and device,
    where all is well: a model may be on several."""
    alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, (extremes, dtype) in noted.items():
        alike.setdefault((dtype, extremes.device), []).append(name)
    bad: list[str] = []
    for (dtype, _), names in alike.items():
        if overflows(torch.cat([noted[name][0] for name in names]), dtype):
            bad += [name for name in names if overflows(noted[name][0], dtype)]
    return bad
