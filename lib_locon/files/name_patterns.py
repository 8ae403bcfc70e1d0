"""Patterns of module names in a file's configuration, matched in time that a file cannot blow up.

PEFT runs them as regular expressions. A file must not choose what we execute, so a small part of that language is read
here: characters, `.`, `\\.`, `\\d`, `\\w`, sets such as `[0-9]`, the repeats `*`, `+`, `?` behind one of these, `|`
between whole patterns, and `^` and `$` at the ends. It is matched by a set of states: pattern · name steps, never more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

LONGEST = 500
"""Characters of a pattern."""
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdigit,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_SPECIAL = frozenset("()[]{}|^$*+?")
_SET = re.compile(r"\[(\^?)((?:[^\]\\]|\\.)+)\]")


class UnknownPattern(ValueError):
    """A pattern beyond what is read here."""


@dataclass(frozen=True)
class _Step:
    """One character of a name, and how often."""

    fits: Callable[[str], bool]
    optional: bool
    many: bool


def matches(pattern: str, name: str) -> bool:
    """PEFT's rule: the pattern fits the whole name, or what follows one of its dots. Raises UnknownPattern."""
    return any(_fits(steps, anchored, name) for steps, anchored in _compiled(pattern))


@lru_cache(maxsize=4000)
def _compiled(pattern: str) -> list[tuple[tuple[_Step, ...], bool]]:
    """Steps of each alternative, and whether it begins at the start of the name only."""
    if len(pattern) > LONGEST:
        raise UnknownPattern(f"a pattern of {len(pattern)} characters")
    found = []
    for part in pattern.split("|"):
        anchored = part.startswith("^")
        found.append((tuple(_steps(part.removeprefix("^").removesuffix("$"), pattern)), anchored))
    return found


def _steps(part: str, pattern: str) -> list[_Step]:
    steps: list[_Step] = []
    at = 0
    while at < len(part):
        char = part[at]
        group = _SET.match(part, at)
        if group is not None:
            fits, at = _set(group[1] == "^", group[2], pattern), group.end()
        elif char == "\\" and at + 1 < len(part):
            following = part[at + 1]
            if following.isalnum() and following not in _CLASSES:
                raise UnknownPattern(pattern)
            fits, at = _CLASSES.get(following) or _is(following), at + 2
        elif char == ".":
            fits, at = (lambda _: True), at + 1
        elif char in _SPECIAL or char == "\\":
            raise UnknownPattern(pattern)
        else:
            fits, at = _is(char), at + 1
        repeat = part[at] if at < len(part) and part[at] in "*+?" else None
        if repeat is not None:
            at += 1 + (part[at + 1 : at + 2] == "?")  # a lazy repeat finds the same names
        steps.append(_Step(fits, optional=repeat in ("*", "?"), many=repeat in ("*", "+")))
    return steps


def _is(char: str) -> Callable[[str], bool]:
    return lambda c: c == char


def _set(inverted: bool, inside: str, pattern: str) -> Callable[[str], bool]:
    ranges: list[tuple[str, str]] = []
    at = 0
    while at < len(inside):
        if inside[at] == "\\":
            if inside[at + 1] == "d":
                ranges.append(("0", "9"))
            elif inside[at + 1].isalnum():
                raise UnknownPattern(pattern)
            else:
                ranges.append((inside[at + 1], inside[at + 1]))
            at += 2
        elif inside[at + 1 : at + 2] == "-" and at + 2 < len(inside):
            ranges.append((inside[at], inside[at + 2]))
            at += 3
        else:
            ranges.append((inside[at], inside[at]))
            at += 1
    return lambda c: any(low <= c <= high for low, high in ranges) is not inverted


def _fits(steps: tuple[_Step, ...], anchored: bool, name: str) -> bool:
    end = len(steps)
    states = _reached({0}, steps)
    for char in name:
        following: set[int] = set()
        for state in states:
            if state < end and steps[state].fits(char):
                following.add(state + 1)
                if steps[state].many:
                    following.add(state)
        if char == "." and not anchored:
            following.add(0)  # the pattern may begin behind any dot
        states = _reached(following, steps)
        if not states and anchored:
            return False
    return end in states


def _reached(states: set[int], steps: tuple[_Step, ...]) -> set[int]:
    """With all states that skipping optional steps leads to."""
    found = set(states)
    for state in sorted(states):
        while state < len(steps) and steps[state].optional:
            state += 1
            found.add(state)
    return found
