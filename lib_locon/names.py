"""The names of many adapters, to be searched at each letter that somebody types. Knows what the cards know, no more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lib_locon.cards import Card, fits
from lib_locon.errors import ambiguous, near
from lib_locon.prompt.completion import ranked


class Names:
    """Those of some cards, as they were when this was made."""

    def __init__(self, cards: Sequence[Card]) -> None:
        self._choices = [(card, card.names) for card in cards if card.tag]
        self.complete = all(card.facts is not None for card in cards)
        """Whether every header was read, so that every alias is known."""
        paths: dict[str, list[str]] = {}
        stems: defaultdict[str, list[str]] = defaultdict(list)
        aliases: defaultdict[str, list[str]] = defaultdict(list)
        for card in cards:
            path = card.names[0]
            paths[path] = [path]
            stems[path.rpartition("/")[2]].append(path)
            if card.facts and card.facts.alias:
                aliases[card.facts.alias].append(path)
        self._files = {**aliases, **stems, **paths}  # the library's order: what comes last here, it asks first
        self._said: dict[str, str] = {}

    def search(self, text: str, model: str = "") -> list[Card]:
        """The cards that a tag can call by a name with `text` in it, best first; those that do not fit a model of the
        family `model` come behind all others.
        """
        return sorted(ranked(text, self._choices), key=lambda card: fits(card.base, model) is False)

    def problem(self, name: str) -> str:
        """Why a tag with this name finds no file, in a sentence; empty where it finds one.

        The library's own answer would do, but for a name that is not there it reads the headers of all files again.
        """
        files = self._files.get(name, [])
        if len(files) == 1:
            return ""
        if name not in self._said:
            none = f"there is no adapter {name!r}{near(name, self._files)}"
            self._said[name] = ambiguous(name, files) if files else none
        return self._said[name]
