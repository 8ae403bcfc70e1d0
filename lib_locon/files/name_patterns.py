"""Patterns of module names in a file's configuration, matched in time that a file cannot blow up.

PEFT runs them as regular expressions. A file must not choose what we execute, so a part of that language is read here:
characters, `.`, `\\.`, `\\d`, `\\w`, `\\s`, sets such as `[0-9]`, groups, `|`, the repeats `*`, `+`, `?`, `^` and `$`.
A pattern becomes a list of steps, and a name is matched by the set of steps that it can stand at: never more than
pattern · name of them, and what follows a set is worked out once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

LONGEST = 500
"""Characters of a pattern."""
DEEPEST = 20
"""Groups within groups."""
MOST_KNOWN = 5000
"""Sets of steps that are remembered with what follows them."""
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_SET = re.compile(r"\[(\^?)((?:[^\]\\]|\\.)+)\]")
_Code: TypeAlias = "list[_Step]"


class UnknownPattern(ValueError):
    """A pattern beyond what is read here."""


@dataclass(frozen=True)
class _Step:
    """Takes a character that `fits`; without that none, and goes on at each of `ways` (as far from here) that holds."""

    fits: Callable[[str], bool] | None = None
    ways: tuple[int, ...] = (1,)
    only_at: str = ""
    """`^` or `$`: goes on at the start or the end of the name only."""


class Pattern:
    """A compiled pattern. Raises UnknownPattern. `work` counts the steps that it looked at."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise UnknownPattern(f"a pattern of {len(text)} characters")
        self.work = 0
        self._steps = _Parser(text).all()
        self._first = self._reached([0], at="^")
        self._behind_a_dot = self._reached([0])
        self._following: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}

    def fits(self, name: str, *, whole: bool = False) -> bool:
        """Match the whole name, or (PEFT's rule, unless it must be `whole`) what follows one of its dots."""
        self.work += len(name)
        states = self._first
        for char in name:
            step = (states, char, whole)
            known = self._following.get(step)
            if known is None:
                if len(self._following) >= MOST_KNOWN:
                    self._following.clear()
                taken = (at + 1 for at in states if (fits := self._fitting(at)) is not None and fits(char))
                known = self._reached(taken)
                if char == "." and not whole:
                    known |= self._behind_a_dot
                self._following[step] = known
            states = known
        return len(self._steps) in self._reached(states, at="$" if name else "^$")

    def _fitting(self, at: int) -> Callable[[str], bool] | None:
        return self._steps[at].fits if at < len(self._steps) else None

    def _reached(self, states: Iterable[int], at: str = "") -> frozenset[int]:
        """With all states that steps without a character lead to. `at` are the ends of the name where this is."""
        found = set(states)
        waiting = list(found)
        while waiting:
            state = waiting.pop()
            self.work += 1
            if state == len(self._steps) or self._steps[state].fits is not None:
                continue
            step = self._steps[state]
            if step.only_at in at:
                new = {state + way for way in step.ways} - found
                found |= new
                waiting += new
        return frozenset(found)


class _Parser:
    """Reads a pattern from left to right into steps."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def all(self) -> Sequence[_Step]:
        """The steps of the whole pattern."""
        code = self._alternatives()
        if self._at < len(self._text):  # a bracket that nothing opened
            raise UnknownPattern(self._text)
        return code

    def _alternatives(self) -> _Code:
        code = self._sequence()
        while self._taken("|"):
            other = self._sequence()
            code = [_Step(ways=(1, len(code) + 2)), *code, _Step(ways=(len(other) + 1,)), *other]
        return code

    def _sequence(self) -> _Code:
        code: _Code = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            code += self._repeated(self._one())
        return code

    def _repeated(self, code: _Code) -> _Code:
        sign = next((sign for sign in "*+?" if self._taken(sign)), "")
        if sign and code[0].only_at:
            raise UnknownPattern(self._text)
        if sign:
            self._taken("?")  # a lazy repeat finds the same names
        if sign in ("*", "+"):
            code = [*code, _Step(ways=(-len(code), 1))]
        if sign in ("*", "?"):
            code = [_Step(ways=(1, len(code) + 1)), *code]
        return code

    def _one(self) -> _Code:
        text, at = self._text, self._at
        group = _SET.match(text, at)
        if group is not None:
            self._at = group.end()
            return [_Step(_set(group[1] == "^", group[2], text))]
        self._at += 1
        char = text[at]
        if char == "(":
            return self._group()
        if char in "^$":
            return [_Step(only_at=char)]
        if char == ".":
            return [_Step(lambda _: True)]
        if char == "\\" and self._at < len(text):
            self._at += 1
            return [_Step(_escaped(text[at + 1], text))]
        if char in "[]{}*+?\\":
            raise UnknownPattern(text)
        return [_Step(_is(char))]

    def _group(self) -> _Code:
        self._depth += 1
        if self._depth > DEEPEST or (self._taken("?") and not self._taken(":")):
            raise UnknownPattern(self._text)
        code = self._alternatives()
        if not self._taken(")"):
            raise UnknownPattern(self._text)
        self._depth -= 1
        return [_Step(), *code]  # never empty, so that a repeat has something to stand behind

    def _taken(self, char: str) -> bool:
        found = self._text.startswith(char, self._at)
        self._at += found
        return found


def _is(char: str) -> Callable[[str], bool]:
    return lambda c: c == char


def _escaped(char: str, pattern: str) -> Callable[[str], bool]:
    if char.isalnum() and char not in _CLASSES:
        raise UnknownPattern(pattern)
    return _CLASSES.get(char) or _is(char)


def _set(inverted: bool, inside: str, pattern: str) -> Callable[[str], bool]:
    members: list[Callable[[str], bool]] = []
    at = 0
    while at < len(inside):
        if inside[at] == "\\":
            members.append(_escaped(inside[at + 1], pattern))
            at += 2
        elif inside[at + 1 : at + 2] == "-" and at + 2 < len(inside):
            members.append(_between(inside[at], inside[at + 2], pattern))
            at += 3
        else:
            members.append(_is(inside[at]))
            at += 1
    return lambda c: any(fits(c) for fits in members) is not inverted


def _between(low: str, high: str, pattern: str) -> Callable[[str], bool]:
    if high == "\\" or low > high:
        raise UnknownPattern(pattern)
    return lambda c: low <= c <= high
