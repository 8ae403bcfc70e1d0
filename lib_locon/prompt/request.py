"""What a prompt asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Strengths(NamedTuple):
    """How strongly an adapter acts: 1 is as trained, 0 is not at all; any finite number is allowed."""

    te: float = 1.0
    unet: float = 1.0

    @classmethod
    def both(cls, strength: float) -> Strengths:
        """The same for all components."""
        return cls(strength, strength)

    def of(self, component: str) -> float:
        """The strength for a component of the model: "unet", "te1", "te2", …; a model without parts counts as UNet."""
        return self.te if component.startswith("te") else self.unet


@dataclass(frozen=True)
class Request:
    """One tag: an adapter's name as written, its strengths, and `dyn`, the ranks to keep (None: all)."""

    name: str
    strengths: Strengths = Strengths()
    dyn: int | None = None


@dataclass(frozen=True)
class Problem:
    """A sentence about a tag, and the tag with a caret under the place."""

    message: str
    tag: str = ""
    position: int = 0

    def __str__(self) -> str:
        if not self.tag:
            return self.message
        return f"{self.message}\n  {self.tag}\n  {' ' * self.position}^"
