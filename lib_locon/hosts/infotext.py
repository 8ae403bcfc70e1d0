"""What stands in an image's text about adapters, and what is made of it when somebody pastes it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib_locon.errors import FileError, UnknownName
from lib_locon.files.background import Background
from lib_locon.files.hashes import body_hash
from lib_locon.files.reader import FileIdentity
from lib_locon.library import Entry, Library
from lib_locon.report import Report
from lib_locon.session import Use

HASHES, APPLIED, APPLIED_HIRES = "Lora hashes", "Locon", "Locon hires"
SHORT = 12
"""Digits of a hash in an image."""
PATIENCE = 1.0
"""Seconds that an image waits for hashes before its first step; what comes later is added at one of its steps."""
SEARCH = 5.0
"""Seconds that pasting may take to read files whose hash is not known yet."""
_MARKS = str.maketrans("", "", ":,")
_TAG = re.compile(r"<(lora|lyco):([^:>]+)")
_PROMPTS = ("Prompt", "Hires prompt")
_HASH = re.compile(r"[0-9a-f]{8,64}")


class Hashes(Background[str]):
    """Hashes by file identity, computed in a thread: one file's can take seconds. "" for a file that cannot be read."""

    def __init__(
        self, store: MutableMapping[FileIdentity, str] | None = None, rested: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__(_hash, store, rested, "locon-hashes")


def _hash(identity: FileIdentity) -> str:
    try:
        return body_hash(identity)
    except FileError:
        return ""


@dataclass
class _Pass:
    """What one pass of a job uses: the name in the tag → its file, and a line about all."""

    files: dict[str, FileIdentity] = field(default_factory=dict)
    applied: str = ""


class Infotext:
    """Writes into the job's `extra_generation_params`, which the host puts into each image."""

    def __init__(self, hashes: Callable[[], Hashes]) -> None:
        self._hashes = hashes
        self._unfinished: Any = None
        """The job whose hashes are not all there yet."""

    def write(self, p: Any, uses: Sequence[Use], report: Report, *, hires: bool, hashes: bool, applied: bool) -> None:
        """Says what a pass uses, in the place of what was said of that pass before."""
        if not isinstance(getattr(p, "extra_generation_params", None), dict):
            return  # no job: the host has nothing to write it into
        files = {use.name.translate(_MARKS): use.adapter.identity for use in uses if use.name} if hashes else {}
        passes = {**getattr(p, "locon_passes", {}), hires: _Pass(files, _applied(report) if applied else "")}
        p.locon_passes = passes
        first, second = (passes.get(each, _Pass()).applied for each in (False, True))
        _put(p, APPLIED, first)
        _put(p, APPLIED_HIRES, second if second != first else "")
        self._hashes().read(files.values(), PATIENCE)
        self._unfinished = None if self._put_hashes(p) else p

    def fill(self) -> None:
        """To be called at each step: adds the hashes that were computed since."""
        if self._unfinished is not None and self._put_hashes(self._unfinished):
            self._unfinished = None

    def _put_hashes(self, p: Any) -> bool:
        """Whether all of them are there."""
        files = {name: file for each in p.locon_passes.values() for name, file in each.files.items()}
        known = {name: self._hashes().known(file) for name, file in files.items()}
        _put(p, HASHES, ", ".join(f"{name}: {digest[:SHORT]}" for name, digest in known.items() if digest))
        return None not in known.values()


def _put(p: Any, key: str, text: str) -> None:
    if text:
        p.extra_generation_params[key] = text
    else:
        p.extra_generation_params.pop(key, None)


def _applied(report: Report) -> str:
    """Such as `style at 0.8: 722/788 layers; …`."""
    return "; ".join(f"{each.name} at {each.strengths}: {each.used}/{each.total} layers" for each in report.adapters)


class Paste:
    """Gives the tags of a pasted text the names that the files have here."""

    def __init__(self, library: Library, hashes: Hashes, claims: Callable[[FileIdentity], str]) -> None:
        self._library = library
        self._hashes = hashes
        self._claims = claims
        """What a file says of its own hash, if that is known: a hint where to look first, never a proof."""
        self._deadline = time.monotonic() + SEARCH
        self.said: list[str] = []
        """What was changed, and what could not be."""

    def into(self, fields: MutableMapping[str, Any]) -> None:
        """Changes the prompts among the fields of a text.

        A name that leads to a file here stays. Any other is looked up by the hash that the image has for it: computed
        from the files, never what they say of themselves; where that leads to no file, or to several, it stays too.
        """
        wanted = written_hashes(fields.get(HASHES))
        for key in _PROMPTS:
            text = fields.get(key)
            if isinstance(text, str) and wanted:
                fields[key] = _TAG.sub(lambda match: self._tag(match, wanted), text)
        self.said = list(dict.fromkeys(self.said))

    def _tag(self, match: re.Match[str], wanted: Mapping[str, str]) -> str:
        name = match[2].strip()
        digest = wanted.get(name.translate(_MARKS))
        try:
            entry = self._library.find(name)
        except UnknownName:
            return match[0] if digest is None else f"<{match[1]}:{self._with_hash(name, digest)}"
        if digest is not None and self._is_another(entry, digest):
            self.said.append(f"the adapter {name!r} here is another file than the one that made the image")
        return match[0]

    def _is_another(self, entry: Entry, digest: str) -> bool:
        found = self._hash(entry)
        return bool(found) and not str(found).startswith(digest)

    def _with_hash(self, name: str, digest: str) -> str:
        # those first that say so themselves: the right one is often found before many gigabytes are read
        entries = sorted(self._library.entries, key=lambda entry: not self._claims_hash(entry, digest))
        found = [entry for entry in entries if (self._hash(entry) or "").startswith(digest)]
        if len(found) == 1:
            return self._renamed(name, found[0])
        if found:
            names = ", ".join(entry.name for entry in found)
            self.said.append(f"{name!r} is not here, and several files have its hash: {names}. The tag stays as it is")
        elif any(self._hash(entry) is None for entry in entries):
            self.said.append(
                f"{name!r} is not here; not all files could be searched for its hash in {SEARCH:g} seconds"
            )
        else:
            self.said.append(f"{name!r} is not here, and no file has its hash")
        return name

    def _renamed(self, name: str, entry: Entry) -> str:
        new = next((word for word in (entry.stem, entry.name) if self._leads_to(word, entry)), None)
        if new is None or any(mark in new for mark in ":>"):
            self.said.append(f"{name!r} is {entry.name!r} here, a name that no tag can hold; the tag stays as it is")
            return name
        self.said.append(f"{name!r} is called {new!r} here: it has the same hash")
        return new

    def _leads_to(self, word: str, entry: Entry) -> bool:
        try:
            return self._library.find(word) == entry
        except UnknownName:
            return False

    def _hash(self, entry: Entry) -> str | None:
        """None where there was no time for it; "" where it cannot be read."""
        try:
            identity = FileIdentity.of(entry.path)
        except FileError:
            return ""
        seconds = self._deadline - time.monotonic()
        if seconds > 0:  # later, only what is known: a whole collection must not be read because of one click
            self._hashes.read([identity], seconds)
        return self._hashes.known(identity)

    def _claims_hash(self, entry: Entry, digest: str) -> bool:
        try:
            return self._claims(FileIdentity.of(entry.path)).startswith(digest)
        except FileError:
            return False


def written_hashes(text: object) -> dict[str, str]:
    """Name → hash, from an image's `Lora hashes`."""
    pairs: Iterable[list[str]] = (part.rsplit(":", 1) for part in text.split(",")) if isinstance(text, str) else ()
    found = {pair[0].strip(): pair[1].strip().lower() for pair in pairs if len(pair) == 2}
    return {name: digest for name, digest in found.items() if name and _HASH.fullmatch(digest)}
