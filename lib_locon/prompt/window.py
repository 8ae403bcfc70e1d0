"""`start`, `stop` and `step`: the steps at which an adapter acts. The meaning is lora-block-weight's on A1111."""

from __future__ import annotations

import re
from typing import NamedTuple

from lib_locon.prompt.numbers import BadValue

_RANGE = re.compile(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*", re.ASCII)


class Window(NamedTuple):
    """Active from step `start` on, up to the step before `stop`; here the first step of a pass is number 1."""

    start: int = 0
    stop: int | None = None

    @property
    def always(self) -> bool:
        """Whether it is active at every step."""
        return self.start <= 1 and self.stop is None

    @property
    def never(self) -> bool:
        """Whether it is active at no step."""
        return self.stop is not None and self.stop <= max(self.start, 1)

    def active(self, step: int) -> bool:
        """At `step`, counted from 0 as the host's samplers do."""
        return self.start <= step + 1 and (self.stop is None or step + 1 < self.stop)

    def __str__(self) -> str:
        if self.always or self.never:
            return "at every step" if self.always else "at no step"
        if self.stop is None:
            return f"from step {self.start} on"
        first, last = max(self.start, 1), self.stop - 1
        return f"at step {first}" if first == last else f"at steps {first}–{last}"


def parse_range(text: str) -> Window:
    """`A-B`: start=A, stop=B. Raises BadValue."""
    match = _RANGE.fullmatch(text)
    if match is None:
        raise BadValue(f"step is a range such as 5-20, not {text.strip()!r}")
    return Window(int(match[1]), int(match[2]))
