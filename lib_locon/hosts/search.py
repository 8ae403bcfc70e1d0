"""Looks files up by their hash without ever hashing a whole collection because of one click or one request."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from lib_locon.errors import FileError, LoconError, UnknownName
from lib_locon.files.background import Background
from lib_locon.files.hashes import Hashes as Pair
from lib_locon.files.hashes import body_hash, hashes_of
from lib_locon.files.reader import FileIdentity
from lib_locon.library import ENOUGH_DIGITS, LEAST_DIGITS, Entry, Library, only

_T = TypeVar("_T")
SECONDS = 5.0
"""That one search may take to read files whose hash is not known yet."""
_HASH = re.compile(r"#[0-9a-fA-F]+")


class TooSlow(LoconError):
    """There was no time to look into all files. Those that were looked into are known the next time."""


def read_body(identity: FileIdentity) -> str:
    """The hash that stands in images; "" for a file that cannot be read."""
    try:
        return body_hash(identity)
    except FileError:
        return ""


def read_both(identity: FileIdentity) -> Pair:
    """Both hashes of a file."""
    try:
        return hashes_of(identity)
    except FileError:
        return Pair("")


@dataclass
class Hashes:
    """What is known of hashes: `bodies` for images, `both` for tags, which may have either."""

    bodies: Background[str]
    both: Background[Pair] = field(default_factory=lambda: Background(read_both, name="locon-both-hashes"))
    claims: Callable[[FileIdentity], str] = lambda _: ""
    """What a file says of its own hash, if that is known: a hint where to look first, never a proof."""


class Search:
    """One search, of `SECONDS` in all. Later it knows only what is known already."""

    def __init__(self, library: Library, hashes: Hashes) -> None:
        self.library = library
        self._hashes = hashes
        self._deadline = time.monotonic() + SECONDS

    def find(self, name: str) -> Entry:
        """As `Library.find`. Raises UnknownName, and TooSlow for a hash."""
        if not _HASH.fullmatch(name.strip()) or self.library.lookup.files(name):
            return self.library.find(name)
        digits = name.strip()[1:].lower()
        if len(digits) < LEAST_DIGITS:
            return self.library.find(name)  # which says that these are too few
        found: list[Entry] = []
        for entry in self._sorted(digits):
            if self._has(entry, digits):
                found.append(entry)
                if len(digits) >= ENOUGH_DIGITS:
                    break
        if not found:
            raise UnknownName(f"no adapter has the hash {name}")
        return only(found, name)

    def with_body(self, digest: str) -> tuple[list[Entry], bool]:
        """The files whose body has this hash, and whether all could be looked into."""
        known = [(entry, self.body_of(entry)) for entry in self._sorted(digest)]
        return [entry for entry, found in known if found and found.startswith(digest)], all(
            found is not None for _, found in known
        )

    def body_of(self, entry: Entry) -> str | None:
        """None where there was no time for it; "" where it cannot be read."""
        identity = _identity(entry)
        return "" if identity is None else self._read(self._hashes.bodies, identity)

    def _has(self, entry: Entry, digits: str) -> bool:
        identity = _identity(entry)
        if identity is None:
            return False
        if (self._hashes.bodies.known(identity) or "").startswith(digits):
            return True
        both = self._read(self._hashes.both, identity)
        if both is None:
            raise TooSlow(
                f"not all files could be searched for the hash #{digits} in {SECONDS:g} seconds; "
                "ask again to go on with it"
            )
        return any(each.startswith(digits) for each in both)

    def _read(self, background: Background[_T], identity: FileIdentity) -> _T | None:
        seconds = self._deadline - time.monotonic()
        if seconds > 0:
            background.read([identity], seconds)
        return background.known(identity)

    def _sorted(self, digits: str) -> list[Entry]:
        """Those first that say so themselves: the right one is often found before many gigabytes are read."""
        return sorted(self.library.entries, key=lambda entry: not self._claims(entry, digits))

    def _claims(self, entry: Entry, digits: str) -> bool:
        identity = _identity(entry)
        return identity is not None and self._hashes.claims(identity).startswith(digits)


def _identity(entry: Entry) -> FileIdentity | None:
    try:
        return FileIdentity.of(entry.path)
    except FileError:
        return None  # it went away since the folder was listed
