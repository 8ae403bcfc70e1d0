"""What stands in an image's text about adapters, and what is made of it when somebody pastes it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lib_locon.errors import LoconError
from lib_locon.files.background import Background
from lib_locon.files.reader import FileIdentity
from lib_locon.hosts.search import SECONDS, Search
from lib_locon.library import Entry
from lib_locon.naming import fits_into_a_tag, in_a_tag, quoted
from lib_locon.prompt.edit import tags
from lib_locon.report import Report
from lib_locon.session import Use

HASHES, APPLIED, APPLIED_HIRES = "Lora hashes", "Locon", "Locon hires"
NOTHING = "no adapter"
SHORT = 12
"""Digits of a hash in an image."""
PATIENCE = 1.0
"""Seconds that an image waits for hashes before its first step; what comes later is added at one of its steps."""
MOST_NAMES = 100
"""Of one pasted text. Each may be a search among all names of a large collection."""
_MARKS = str.maketrans("", "", ":,")
_PROMPTS = ("Prompt", "Hires prompt")
_HASH = re.compile(rf"[0-9a-f]{{{SHORT},64}}")


@dataclass
class _Pass:
    """What one pass of a job uses: the names in its tags with their files, each once, and a line about all."""

    files: dict[tuple[str, FileIdentity], None] = field(default_factory=dict)
    applied: str = ""


class Infotext:
    """Writes into the job's `extra_generation_params`, which the host puts into each image."""

    def __init__(self, hashes: Callable[[], Background[str]]) -> None:
        self._hashes = hashes
        self._unfinished: list[weakref.ref[Any]] = []
        """The jobs whose hashes are not all there yet: one, and those that it runs inside of."""

    def write(self, p: Any, uses: Sequence[Use], report: Report, *, hires: bool, hashes: bool, applied: bool) -> None:
        """Says what a pass uses, in the place of what was said of that pass before."""
        if not isinstance(getattr(p, "extra_generation_params", None), dict):
            return  # no job: the host has nothing to write it into
        named = [(_unmarked(use.name), use.adapter.identity) for use in uses if hashes]
        files = dict.fromkeys((name, file) for name, file in named if name)
        passes = {**getattr(p, "locon_passes", {}), hires: _Pass(files, _applied(report) if applied else "")}
        p.locon_passes = passes
        first, second = (passes[each].applied if each in passes else "" for each in (False, True))
        _put(p, APPLIED, first)
        _put(p, APPLIED_HIRES, (second or NOTHING) if True in passes and second != first else "")
        self._hashes().read([file for _, file in files], PATIENCE)
        if not self._put_hashes(p):
            with suppress(TypeError):  # a program's own kind of job, which may not be looked after
                self._unfinished.append(weakref.ref(p))

    def fill(self) -> None:
        """To be called at each step: adds the hashes that were computed since."""
        if self._unfinished:
            jobs = {id(p): each for each in self._unfinished if (p := each()) is not None and not self._put_hashes(p)}
            self._unfinished = list(jobs.values())

    def _put_hashes(self, p: Any) -> bool:
        """Whether all of them are there."""
        # two names may be one without their marks: both are written, and whoever reads that knows that neither is sure
        files = dict.fromkeys(pair for each in p.locon_passes.values() for pair in each.files)
        known = [(name, self._hashes().known(file)) for name, file in files]
        _put(p, HASHES, ", ".join(dict.fromkeys(f"{name}: {digest[:SHORT]}" for name, digest in known if digest)))
        return all(digest is not None for _, digest in known)


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

    def __init__(self, search: Search) -> None:
        self._search = search
        self._known: dict[str, Entry | None] = {}
        self.said: list[str] = []
        """What was changed, and what could not be."""

    def into(self, fields: MutableMapping[str, Any]) -> None:
        """Changes the prompts among the fields of a text.

        A name that leads to the file that made the image stays. Any other becomes the name of the one file that has the
        hash which stands in the image: computed from the files, never what they say of themselves. Where that leads to
        no file, or to several, the name stays, and what is wrong is said.
        """
        wanted = dict(list(written_hashes(fields.get(HASHES)).items())[:MOST_NAMES])
        for key in _PROMPTS:
            text = fields.get(key)
            if isinstance(text, str) and wanted:
                fields[key] = self._renamed_in(text, wanted)
        self.said = list(dict.fromkeys(self.said))

    def _renamed_in(self, text: str, wanted: Mapping[str, str]) -> str:
        done, at = list[str](), 0
        for tag in tags(text):
            start = tag.start + len(f"<{tag.kind}:")
            done += text[at:start], self._name(tag.items[0], wanted)
            at = start + len(tag.items[0])
        return "".join((*done, text[at:]))

    def _name(self, name: str, wanted: Mapping[str, str]) -> str:
        """The name that a tag which has this one is to have here."""
        digest = wanted.get(_unmarked(name))
        if digest is None:
            return name
        here = self._named(name)
        found = self._search.body_of(here) if here is not None else ""
        if here is not None and (not found or found.startswith(digest)):
            return name  # the right one, or there is no telling
        what = f"the adapter {name.strip()!r} here is another file than the one that made the image" if here else ""
        return self._with_hash(name, digest, what or f"{name.strip()!r} is not here")

    def _named(self, name: str) -> Entry | None:
        if name not in self._known:
            try:
                self._known[name] = self._search.find(name)
            except LoconError:
                self._known[name] = None
        return self._known[name]

    def _with_hash(self, name: str, digest: str, what: str) -> str:
        found, complete = self._search.with_body(digest)
        if len(found) == 1:
            return self._renamed(name, found[0], what)
        if found:
            names = ", ".join(entry.name for entry in found)
            self.said.append(f"{what}, and several files have its hash: {names}. The tag stays as it is")
        elif not complete:
            self.said.append(f"{what}; not all files could be searched for its hash in {SECONDS:g} seconds")
        else:
            self.said.append(f"{what}, and no file has its hash")
        return name

    def _renamed(self, name: str, entry: Entry, what: str) -> str:
        words = (entry.stem, entry.name, in_a_tag(entry.stem), in_a_tag(entry.name), quoted(entry.name))
        new = next((word for word in words if fits_into_a_tag(word) and self._named(word) == entry), None)
        if new is None:
            self.said.append(f"{name!r} is {entry.name!r} here, which no tag can name; the tag stays as it is")
            return name
        self.said.append(f"{what}; the file with the same hash is {new!r}, which the tag names now")
        return new


def _unmarked(name: str) -> str:
    """A name as it stands before its hash in an image's text, where colons and commas are marks."""
    return name.translate(_MARKS).strip()


def written_hashes(text: object) -> dict[str, str]:
    """Name → hash, from an image's `Lora hashes`. A name with two hashes says nothing."""
    pairs: Iterable[list[str]] = (part.rsplit(":", 1) for part in text.split(",")) if isinstance(text, str) else ()
    found: dict[str, set[str]] = {}
    for name, *rest in pairs:
        digest = rest[0].strip().lower() if rest else ""
        if name.strip() and _HASH.fullmatch(digest):
            found.setdefault(name.strip(), set()).add(digest)
    return {name: digests.pop() for name, digests in found.items() if len(digests) == 1}
