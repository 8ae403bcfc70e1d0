"""Numbers in a tag, and curves: a strength that depends on the step. The meaning of curves is loractl's."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass

# Python's float() also takes "1_0", "nan" and "infinity", which nobody means as a strength
# `\d+\.?\d*` would try each way to part a row of digits in two: the square of its length
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"\d{1,9}", re.ASCII)
_ITEM = re.compile(r"[^,;]*")


@dataclass
class BadValue(Exception):
    """A value of a tag that cannot be read: why, and where in its text. Never leaves `prompt/`."""

    message: str
    at: int = 0


def parse_number(text: str, at: int = 0) -> float:
    """A finite number. Raises BadValue; `at` is where `text` stands in the whole value."""
    word = text.strip()
    if _NUMBER.fullmatch(word):
        value = float(word)
        if math.isfinite(value):
            return value
    raise BadValue(f"{word!r} is no number", at + _blanks(text))


def is_number(text: str) -> bool:
    """Whether `parse_number` reads it."""
    try:
        parse_number(text)
    except BadValue:
        return False
    return True


def parse_whole(text: str, what: str, least: int = 0) -> int:
    """A whole number of at most nine digits. Raises BadValue, with `what` as the sentence's subject."""
    if _WHOLE.fullmatch(text.strip()) and int(text) >= least:
        return int(text)
    bound = f" above {least - 1}" if least else ""
    raise BadValue(f"{what} must be a whole number{bound}, not {text.strip()!r}", _blanks(text))


def written(value: float) -> str:
    """The shortest text that is read as exactly this number."""
    return repr(value).removesuffix(".0")


@dataclass(frozen=True)
class Curve:
    """Strengths at positions, in between linear, outside as at the ends; one point is a constant."""

    points: tuple[tuple[float, float], ...]
    """(position, strength), by position; never empty."""

    @classmethod
    def constant(cls, value: float) -> Curve:
        """The same at all steps."""
        return cls(((0.0, value),))

    @property
    def fixed(self) -> bool:
        """Whether it does not depend on the step."""
        return len(self.points) == 1

    def at(self, step: int, steps: int) -> float:
        """The strength at `step`, counted from 0, of a pass of `steps`.

        Where the last position is at most 1, positions are parts of the pass, else they are steps.
        """
        if self.fixed:
            return self.points[0][1]
        # loractl's rule: 1 is reached one step before the last. It divides by zero for two steps
        x = step / max(steps - 2, 1) if self.points[-1][0] <= 1 else float(step)
        after = bisect_right(self.points, x, key=lambda point: point[0])
        if after == 0 or after == len(self.points):
            return self.points[max(after - 1, 0)][1]
        (x0, y0), (x1, y1) = self.points[after - 1 : after + 1]
        slope = (y1 - y0) / (x1 - x0)
        value = slope * (x - x0) + y0
        return value if math.isfinite(value) else y0  # numbers near the largest that a float holds

    def __str__(self) -> str:
        if self.fixed:
            return written(self.points[0][1])
        return ",".join(f"{written(value)}@{written(position)}" for position, value in self.points)


def parse_curve(text: str) -> tuple[Curve, str]:
    """A number, or `strength@position` (or `strength~position`) joined by `,` or `;`, and a warning or "".

    A missing position is 1. A first item without one makes the whole text a constant, as in loractl. Raises BadValue.
    """
    points: list[tuple[float, float]] = []
    bare: list[bool] = []
    for item, at in items(text):
        cut = next((i for i, mark in enumerate(item) if mark in "@~"), -1)
        value = parse_number(item if cut < 0 else item[:cut], at)
        points.append((1.0 if cut < 0 else parse_number(item[cut + 1 :], at + cut + 1), value))
        bare.append(cut < 0)
    if not bare[0]:
        points.sort(key=lambda point: point[0])
        same = len({value for _, value in points}) == 1
        return (Curve.constant(points[0][1]) if same else Curve(tuple(points))), ""
    first = points[0][1]
    ignored = (
        f"only {written(first)} of {text.strip()!r} counts: a curve is written as 0@0,1@0.5, a decimal with a point"
    )
    return Curve.constant(first), ignored if len(points) > 1 else ""


def items(text: str) -> list[tuple[str, int]]:
    """The parts of a list between `,` or `;`, each with its place; never empty."""
    found = []
    at = 0
    while True:
        match = _ITEM.match(text, at)
        assert match is not None  # the pattern matches nothing at all, too
        found.append((match[0], at))
        at = match.end() + 1
        if at > len(text):
            return found


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip())
