"""What the base store says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StoreReport:
    """How the bases of the touched weights are kept: `weights` and `nbytes` by way (`checkpoint`, `ram`, `device`).

    `reasons` says why weights that might have been read back were copied, and for how many each; `file_changed` that
    the file that others are read from is not there any more as it was.
    """

    policy: str
    weights: Mapping[str, int]
    nbytes: Mapping[str, int]
    reasons: Mapping[str, int]
    file_changed: bool
    unused: int = 0
    """Bytes of copies that wait for the next adapter."""

    def __str__(self) -> str:
        """One line for the log."""
        where = {"checkpoint": "read back from the checkpoint", "ram": "copied to RAM", "device": "copied on the GPU"}
        parts = [
            f"{self.weights[way]} weights ({self.nbytes[way] / 2**20:.0f} MiB) {where[way]}"
            for way in where
            if self.weights.get(way)
        ]
        parts += [f"{count} not read back: {reason}" for reason, count in self.reasons.items()]
        parts += [f"{self.unused / 2**20:.0f} MiB of copies wait for the next adapter"] if self.unused else []
        parts += ["the checkpoint file is not there any more as it was"] if self.file_changed else []
        return f"base ({self.policy}): {'; '.join(parts) or 'nothing is kept'}"
