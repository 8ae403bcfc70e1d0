"""What happened, for the user: one AdapterReport per tag, and the sentences about tags that could not be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lib_locon.files.adapter import Unmatched
from lib_locon.matching import WRONG_SHAPE, Match
from lib_locon.patching.eight_bits import Cost, share_lost
from lib_locon.prompt.request import Problem, Strengths
from lib_locon.terminal import printable


@dataclass(frozen=True)
class AdapterReport:
    """One adapter as it was applied."""

    name: str
    strengths: Strengths
    families: dict[str, int]
    """What a user calls the family → layers of it."""
    used: int
    total: int
    unmatched: tuple[Unmatched, ...]
    notes: tuple[str, ...] = ()
    """Choices that the file left open, and what was chosen; what the model's own storage does to the sum."""
    made_for: str = ""
    """The family of base models that the file was made for, where nothing of it fits this one."""
    lost: bool = False
    """True where rounding took all that it adds: the weights are stored in too few bits for it."""

    @classmethod
    def of(cls, name: str, strengths: Strengths, match: Match) -> AdapterReport:
        """From a match with the model."""
        families = dict(match.families)
        return cls(name, strengths, families, match.used, match.total, match.unmatched, match.notes, match.made_for)

    def with_costs(self, costs: Collection[Cost], others: int, least: float = 0) -> AdapterReport:
        """With what rounding took of all that is added to these weights, from the part `least` on.

        The adapter changes so many `others` too.
        """
        share = share_lost(costs)
        if not share or share < least:
            return self
        gone = not any(bool(cost.moved) for cost in costs)
        took = f"rounding takes {'all' if gone else f'{share:.0%}'} of what is added there"
        return replace(self, notes=(*self.notes, took), lost=gone and not others)

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = {**asdict(self), "strengths": self.strengths.as_json()}
        return {key: value for key, value in plain.items() if value or key not in ("notes", "made_for", "lost")}

    def __str__(self) -> str:
        """One line, whatever is in the names and texts of the file."""
        return printable("; ".join([self._change, *self.notes]))

    @property
    def _change(self) -> str:
        if not self.used and self.total:
            why = f"it was made for {self.made_for}; {summary(self.unmatched)}"
            return f"{self.name} changes nothing: none of its {self.total} layers fit this model ({why})"
        if self.lost:
            return f"{self.name} at {self.strengths} changes nothing in this model"
        families = ", ".join(self.families) or "no layers"
        line = f"{self.name} ({families}) at {self.strengths}: {self.used}/{self.total} layers"
        if self.unmatched:
            line += f"; not used: {summary(self.unmatched)}"
        return line


@dataclass(frozen=True)
class Report:
    """A whole set of adapters. `written` weights were changed for it; 0 when the model held the set already."""

    adapters: tuple[AdapterReport, ...] = ()
    problems: tuple[Problem, ...] = ()
    written: int = 0
    warnings: tuple[Problem, ...] = field(default=())

    def lines(self, which: str = "all") -> list[str]:
        """One sentence or line per adapter and per problem; of `problems` only, or `nothing`."""
        if which == "nothing":
            return []
        adapters = [
            adapter
            for adapter in self.adapters
            if which == "all" or adapter.unmatched or adapter.lost or not adapter.used
        ]
        return [*map(str, adapters), *map(str, self.problems), *map(str, self.warnings)]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def summary(unmatched: tuple[Unmatched, ...], most: int = 3) -> str:
    """By reason, the commonest first: `66 × the model has no te2, 1 × not finite …`."""
    # what exactly is wrong with a shape differs from layer to layer; that it is wrong is one reason
    reasons = Counter(WRONG_SHAPE if item.reason.startswith(WRONG_SHAPE) else item.reason for item in unmatched)
    parts = [f"{count} × {reason}" for reason, count in reasons.most_common(most)]
    if len(reasons) > most:
        parts.append(f"{sum(reasons.values()) - sum(n for _, n in reasons.most_common(most))} more for other reasons")
    return ", ".join(parts)
