"""What the prompt boxes of the page ask while somebody types: what may come next, and what is wrong so far.

Neither asks for the password of --api-auth, as a browser would then ask for it in the middle of a word; only for the
login of the page, where that has one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypedDict

from lib_locon.cards import Card, Cards
from lib_locon.hosts.web import Ask, Route
from lib_locon.library import Entry
from lib_locon.names import Names
from lib_locon.prompt.completion import NAME, place_at_end, words
from lib_locon.prompt.edit import Tag, tags
from lib_locon.prompt.grammar import Parsed, parse_tag
from lib_locon.prompt.presets import Presets
from lib_locon.prompt.request import Problem

MOST_OFFERED = 50
MAX_TAG = 2_000
"""Characters."""
MOST_TOLD, MOST_MISSING = 5, 2
"""Sentences about one prompt, and those of them about names that lead to nothing: each is a search among all names."""
SURE, UNSURE = 60.0, 5.0
"""Seconds after which names are listed anew though no folder changed: an alias may, and headers are being read."""


class Offer(TypedDict):
    """`text` is what to write; `weight` what a name is usually used with, where the user wrote that down."""

    text: str
    about: str
    weight: str


class Completion(TypedDict):
    """`kind` is "name", "key", "lbw", "lbwe" or "", `word` what of it is written; `total` counts all, shown or not."""

    kind: str
    word: str
    total: int
    offers: list[Offer]


class Mistake(TypedDict):
    """A sentence, the tag that it is about, and where in the tag (counted in characters). `warning`: the tag works."""

    message: str
    tag: str
    at: int
    warning: bool


class PromptApi:
    """`model` gives the family of the loaded model, `prefer_alias` which name of a file is written."""

    def __init__(
        self,
        cards: Callable[[], Cards],
        presets: Callable[[], Presets],
        model: Callable[[], str],
        prefer_alias: Callable[[], bool],
    ) -> None:
        self._cards = cards
        self._presets = presets
        self._model = model
        self._prefer_alias = prefer_alias
        self._lock = threading.Lock()
        self._made_of: tuple[list[Entry], bool] = ([], False)
        self._made_at = 0.0
        self._names: Names | None = None

    def routes(self) -> list[Route]:
        """Both."""
        return [
            Route("GET", "/locon/v1/complete", self.complete, protected=False),
            Route("POST", "/locon/v1/parse", self.parse, protected=False),
        ]

    def complete(self, ask: Ask) -> Completion:
        """What may come next in a tag. `tag` is what stands from its `<` up to the caret."""
        place = place_at_end(ask.query.get("tag", "")[:MAX_TAG])
        if place is None:
            return {"kind": "", "word": "", "total": 0, "offers": []}
        if place.kind == NAME:
            cards = self.names().search(place.word, self._model())
            total, offers = len(cards), [_of_card(card) for card in cards[:MOST_OFFERED]]
        else:
            found = words(place, self._presets())
            total = len(found)
            offers = [{"text": word.text, "about": word.about, "weight": ""} for word in found[:MOST_OFFERED]]
        return {"kind": place.kind, "word": place.word, "total": total, "offers": offers}

    def parse(self, ask: Ask) -> dict[str, list[Mistake]]:
        """What is wrong with the tags of a prompt, in their order. `negative`: it is a negative prompt."""
        prompt = ask.prompt()
        found = _in_negative(prompt) if ask.body.get("negative") is True else self._mistakes(prompt)
        told: dict[tuple[str, str], Mistake] = {}
        for mistake in found:
            told.setdefault((mistake["message"], mistake["tag"]), mistake)
            if len(told) == MOST_TOLD:
                break
        return {"mistakes": list(told.values())}

    def names(self) -> Names:
        """All names that lead to a file, as they were a moment ago."""
        cards, prefer_alias = self._cards(), self._prefer_alias()
        with self._lock:
            entries, now = cards.library.entries, time.monotonic()
            known, of = self._names, self._made_of
            if known is not None and of[0] is entries and of[1] == prefer_alias:
                lasts = SURE if known.complete else UNSURE
                if now - self._made_at < lasts:
                    return known
            # without patience: who types does not wait for headers, and an alias that comes later is offered later
            listed = Cards(cards.library, cards.index, patience=0).all(prefer_alias=prefer_alias)
            self._names = Names(listed, cards.library.why_absent)
            self._made_of, self._made_at = (entries, prefer_alias), time.monotonic()
            return self._names

    def _mistakes(self, prompt: str) -> Iterator[Mistake]:
        presets, missing = self._presets(), 0
        for tag in tags(prompt):
            parsed = Parsed("")
            parse_tag(tag.kind, tag.items, parsed, presets)
            for bad in parsed.bad:
                yield _mistake(bad)
            problem = self._missing(tag) if parsed.requests and missing < MOST_MISSING else None
            if problem is not None:
                missing += 1
                yield _mistake(problem)
            for warning in parsed.warnings:
                yield _mistake(warning, warning=True)

    def _missing(self, tag: Tag) -> Problem | None:
        """That the name leads to no file, or to several. Nothing is said before every header is read, nor of a hash:
        to look for that, files are read whole.
        """
        names = self.names()
        message = names.problem(tag.items[0]) if names.complete and not tag.name.startswith("#") else ""
        if not message:
            return None
        written = tag.items[0]
        at = len(tag.kind) + 2 + len(written) - len(written.lstrip())
        return Problem(message, _text(tag), at)


def _text(tag: Tag) -> str:
    return f"<{tag.kind}:{':'.join(tag.items)}>"


def _in_negative(prompt: str) -> Iterator[Mistake]:
    for tag in tags(prompt):
        message = "the webui reads no tags in the negative prompt: this one does nothing"
        yield {"message": message, "tag": _text(tag), "at": 0, "warning": True}


def _mistake(problem: Problem, *, warning: bool = False) -> Mistake:
    message = problem.message.replace("a tag was skipped: ", "this tag will be skipped: ", 1)
    return {"message": message, "tag": problem.tag, "at": problem.position, "warning": warning}


def _of_card(card: Card) -> Offer:
    path = card.names[0]
    base = "" if card.base.startswith("unknown") else card.base
    about = " · ".join(filter(None, (card.family, base, path if path != card.tag else "")))
    weight = card.user.preferred_weight
    return {"text": card.tag, "about": about, "weight": f"{weight:g}" if weight else ""}
