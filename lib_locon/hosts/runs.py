"""Which job of the host asked for what: a script may run a job inside another, and the outer one then goes on.

The host applies the tags of a job once for each batch and pass. What a script does between that and the last step, it
does not look at: after another job the outer one would go on with the other's adapters, or with none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

from modules import processing

ENCODE = "get_conds_with_caching"
"""The method of a job in which it asks for its prompts' encodings, in every pass."""


class Runs:
    """What each job asked for, by `current()`, for as long as the job lives."""

    def __init__(self, current: Callable[[], object], resume: Callable[[Any, Any], object]) -> None:
        self._current, self._resume = current, resume
        self._asked: dict[int, tuple[weakref.ref[Any], Any]] = {}  # by id: the host's jobs cannot be hashed
        self._replaced: tuple[Any, Any] | None = None

    def asked(self, p: Any) -> None:
        """To be called after each `activate`."""
        key = id(p)
        if p is not None:
            self._asked[key] = weakref.ref(p, lambda _: self._asked.pop(key, None)), self._current()

    def finished(self, p: Any) -> None:
        """The job has made its images: what it asked for need not be kept, however long the job itself is."""
        self._asked.pop(id(p), None)

    def goes_on(self, p: Any) -> None:
        """To be called where a job encodes or denoises: resumes what it asked for, if another one came between."""
        known, asked = self._asked.get(id(p), (None, None))
        if known is not None and known() is p and asked is not self._current():
            self._resume(p, asked)

    def watch(self) -> None:
        """Hears of every encoding from now on. Harmless to repeat."""
        kind = processing.StableDiffusionProcessing
        theirs = getattr(kind, ENCODE, None)
        if theirs is None or self._replaced is not None:
            return

        @wraps(theirs)
        def encode(p: Any, *args: Any, **kwargs: Any) -> Any:
            self.goes_on(p)
            return theirs(p, *args, **kwargs)

        self._replaced = theirs, encode
        setattr(kind, ENCODE, encode)

    def remove(self) -> None:
        """Gives the method back, unless somebody else stands before it: then it only hands on."""
        self._asked.clear()
        kind = processing.StableDiffusionProcessing
        if self._replaced is not None and getattr(kind, ENCODE, None) is self._replaced[1]:
            setattr(kind, ENCODE, self._replaced[0])
        self._replaced = None
