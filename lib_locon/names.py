"""The names of many adapters, to be searched at each letter that somebody types. Knows what the cards know, no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lib_locon.cards import Card, fits
from lib_locon.errors import ambiguous, near
from lib_locon.naming import Lookup, Table
from lib_locon.prompt.completion import ranked


class Names:
    """Those of some cards, as they were when this was made. `why_absent` as a library's."""

    def __init__(self, cards: Sequence[Card], why_absent: Callable[[str], str] = lambda _: "") -> None:
        self._choices = [(card, card.names) for card in cards if card.tag]
        self.complete = all(card.facts is not None for card in cards)
        """Whether every header was read, so that every alias is known."""
        aliases = Table((card.facts.alias, card) for card in cards if card.facts and card.facts.alias)
        self._lookup = Lookup([(card.names[0], card) for card in cards], lambda: aliases)
        self._known = dict.fromkeys(name for card in cards for name in card.names)
        self._why_absent = why_absent
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
        found = self._lookup.find(name)
        if len(found) == 1:
            return ""
        if name not in self._said:
            paths = [card.names[0] for card in found]
            why = "" if found else self._why_absent(name) or near(name, self._known)
            absent = f"there is no adapter {name.strip()!r}{why}"
            self._said[name] = ambiguous(name.strip(), paths) if found else absent
        return self._said[name]
