"""What may come next in a tag that somebody is writing: the page's completion, as far as the grammar goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from lib_locon.prompt.grammar import KINDS
from lib_locon.prompt.keys import KEYS, SYNONYMS
from lib_locon.prompt.presets import BUILT_IN, Presets

NAME, KEY = "name", "key"
PRESETS = ("lbw", "lbwe")
_STARTS = tuple(f"<{kind}:" for kind in KINDS)
_BETWEEN = " _-./\\()[]"
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """What is being written: a "name", a "key", or the value of "lbw" or "lbwe"; and its letters so far."""

    kind: str
    word: str


@dataclass(frozen=True)
class Word:
    """What can be written there, and what it means, in a line."""

    text: str
    about: str


def place_at_end(text: str) -> Place | None:
    """What a tag's next letter belongs to. `text` is the tag from its `<` up to there.

    None where nothing can be offered: in a number, or where `text` is no adapter's tag.
    """
    start = next((start for start in _STARTS if text.startswith(start)), None)
    if start is None or ">" in text:
        return None
    *before, last = text[len(start) :].split(":")
    if not before:
        return Place(NAME, last.lstrip())
    key, is_named, value = last.partition("=")
    if not is_named:
        return Place(KEY, last.lstrip())
    known = SYNONYMS.get(key.strip(), key.strip())
    return Place(known, value.lstrip()) if known in PRESETS else None


def words(place: Place, presets: Presets = BUILT_IN) -> list[Word]:
    """The keys or presets that hold what was written so far, best first. None of a name: names are the library's."""
    if place.kind == KEY:
        return ranked(place.word, [(Word(f"{key}=", about), (key,)) for key, about in KEYS.items()])
    if place.kind == "lbw":
        blocks = [(Word(name, ",".join(map(str, found.entries))), (name,)) for name, found in presets.blocks.items()]
        return ranked(place.word, blocks)
    if place.kind == "lbwe":
        rules = [(Word(name, f"{len(found.rules)} rules"), (name,)) for name, found in presets.elements.items()]
        return ranked(place.word, rules)
    return []


def ranked(text: str, choices: Iterable[tuple[T, tuple[str, ...]]]) -> list[T]:
    """Those of which one name holds `text`, whatever its case. Those that are it come first, then those that begin with
    it, then those with a word that does; the order of `choices` decides between equals.
    """
    wanted = text.lower()
    found: list[tuple[int, T]] = []
    for choice, names in choices:
        rank = min(_rank(wanted, name.lower()) for name in names)
        if rank < _NOT_IN_IT:
            found.append((rank, choice))
    return [choice for _, choice in sorted(found, key=lambda item: item[0])]


_NOT_IN_IT = 4


def _rank(wanted: str, name: str) -> int:
    at = name.find(wanted)
    if at < 0:
        return _NOT_IN_IT
    if at == 0:
        return 0 if wanted == name else 1
    while at >= 0:
        if name[at - 1] in _BETWEEN:
            return 2
        at = name.find(wanted, at + 1)
    return 3
