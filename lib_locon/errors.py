"""Every error this package raises on purpose. Each message is a sentence for the user: what, where, what to do.

And the parts that such sentences share.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TypeVar

from lib_locon.naming import look_alike

MOST_NAMED = 5
"""Names in a sentence."""
MOST_LETTERS = 200
"""Of a name that others are compared with: it is anybody's, and the comparison takes its length squared."""
T = TypeVar("T", bound=str)


class LoconError(Exception):
    """Base of all of them; catching it catches bad input and nothing else."""


class FileError(LoconError):
    """A file that cannot be read as what it should be."""


class FileChanged(FileError):
    """A file that became another while it was read; reading it again may do."""


class ShapeError(LoconError):
    """Factors that do not fit each other, or a ΔW that does not fit its weight."""


class Unusable(LoconError):
    """Factors of the right shape that cannot be applied to this weight, and why."""


class UnknownName(LoconError):
    """A name that is no adapter, or more than one."""


class PatchError(LoconError):
    """A change of weights that failed half way. The weights are back at their base values."""


def near(name: str, known: Iterable[str]) -> str:
    """The names that `name` may have been meant for, whatever their case, in brackets; empty where there are none."""
    names = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower()[:MOST_LETTERS], names, n=3, cutoff=0.5)
    return f" (near it: {', '.join(names[each] for each in found)})" if found else ""


def ambiguous(name: str, found: Sequence[str]) -> str:
    """That a name leads to several files."""
    if look_alike(found):
        found = list(map(ascii, found))  # the difference is in what is not seen
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return f"{name!r} could be any of these: {', '.join(found[:MOST_NAMED])}{more}. Write the one that you mean in full"


def one_of(known: Sequence[T], name: str, what: str) -> T:
    """The one that is called so. Raises ValueError, with `what` they are."""
    for each in known:
        if each == name:
            return each
    raise ValueError(f"the {what} must be one of {', '.join(known)}, not {name!r}")
