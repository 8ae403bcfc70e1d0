"""What our addresses answer (docs/api.md). No answer names a folder of this computer, unless its owner wants that."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from lib_locon.cards import Card, Cards
from lib_locon.dryrun import Trial
from lib_locon.errors import FileError, LoconError, UnknownName
from lib_locon.hosts.builtin_list import BuiltinItem, builtin_list
from lib_locon.hosts.search import Search, TooSlow
from lib_locon.hosts.web import Ask, Route, WebError
from lib_locon.hosts.webui import Webui
from lib_locon.inspection import inspect
from lib_locon.library import Entry, Library
from lib_locon.prompt.grammar import parse_prompt
from lib_locon.report import Report

PAGE, MOST_ON_A_PAGE = 100, 1000
MOST_TAGS = 100
"""Of one dry run. Each may be a search among all names of a large collection."""
FULL_PATHS = "SD_WEBUI_LOCON_FULL_PATHS"
"""Set to 1 where the webui is started, programs on the same computer are told full paths."""


class _Path(TypedDict, total=False):
    path: str


class AdapterItem(_Path):
    """An adapter in our list. `read` is false while its header waits to be read; what comes of it is then empty.

    `path` is there for programs on the same computer, if its owner wants that.
    """

    name: str
    tag: str
    alias: str
    file: str
    size: int
    modified: int
    family: str
    rank: str
    base: str
    triggers: list[str]
    unread_keys: int
    problem: str
    read: bool


class AdapterPage(TypedDict):
    """One page of them; `total` counts those of all pages, `waiting` the headers that are still to be read."""

    total: int
    waiting: int
    page: int
    per_page: int
    adapters: list[AdapterItem]


class Told(TypedDict):
    """A Report: one AdapterReport for each tag, and sentences."""

    adapters: list[dict[str, Any]]
    problems: list[str]
    warnings: list[str]


class Loaded(Told):
    """What the model holds now."""

    active: bool


class Memory(TypedDict):
    """In bytes: the adapters' files, and the weights that would be written (as much is copied, where bases are)."""

    adapters: int
    weights: int


class DryRunAnswer(Told):
    """What a prompt would do: `written` weights in place, `beside` at the side of their layer."""

    written: int
    beside: int
    memory: Memory


@dataclass(frozen=True)
class Api:
    """`library`, `cards`, `model` and `search` give what the host has now, with the settings as they are now.

    `model` never loads one, and gives its file too. `chosen` gives the tag that the host adds to a prompt which names
    these adapters, or "".
    """

    webui: Webui
    library: Callable[[], Library]
    cards: Callable[[], Cards]
    model: Callable[[], tuple[nn.Module, Path | None] | None]
    search: Callable[[], Search]
    chosen: Callable[[Sequence[str]], str]

    def routes(self) -> list[Route]:
        """All of ours. The built-in asks for no password on its two, and neither do we."""
        return [
            Route("GET", "/sdapi/v1/loras", self.loras, open=True),
            Route("POST", "/sdapi/v1/refresh-loras", self.refresh_loras, open=True),
            Route("GET", "/locon/v1/adapters", self.adapters),
            Route("GET", "/locon/v1/adapters/{name:path}", self.adapter),
            Route("GET", "/locon/v1/loaded", self.loaded),
            Route("POST", "/locon/v1/dry-run", self.dry_run),
        ]

    def loras(self, ask: Ask) -> list[BuiltinItem]:
        """As the built-in's, but `path` begins at the adapter folder."""
        return builtin_list(self.library(), full_paths=_full_paths(ask))

    def refresh_loras(self, ask: Ask) -> None:
        """Lists the folders again."""
        del ask
        self.library().refresh()

    def adapters(self, ask: Ask) -> AdapterPage:
        """The list, filtered by `text`, `family` and `base`."""
        page = ask.number("page", 1, 1, 10**6)
        per_page = ask.number("per_page", PAGE, 1, MOST_ON_A_PAGE)
        text, family, base = (ask.query.get(name, "").strip().lower() for name in ("text", "family", "base"))
        cards = self.cards()
        found = [card for card in cards.all() if _fits(card, text, family, base)]
        start = (page - 1) * per_page
        shown = [_adapter_item(card, full_path=_full_paths(ask)) for card in found[start : start + per_page]]
        return {
            "total": len(found),
            "waiting": cards.index.waiting,
            "page": page,
            "per_page": per_page,
            "adapters": shown,
        }

    def adapter(self, ask: Ask) -> dict[str, Any]:
        """One adapter, by any name that a tag can call it by: all that its header says."""
        entry = self._find(ask.path.get("name", ""))
        try:
            found = inspect(entry.path, allow_pickle=self.library().allow_pickle).as_json()
        except FileError as error:
            raise WebError(422, entry.without_folder(str(error))) from error
        shown = {key: value for key, value in found.items() if key not in ("path", "match")}
        notes = [entry.without_folder(note) for note in found["notes"]]
        path = {"path": entry.full_path} if _full_paths(ask) else {}
        return {**shown, "name": entry.name, "file": entry.file, **path, "notes": notes}

    def loaded(self, ask: Ask) -> Loaded:
        """What the last image was made with, as long as the model holds it, and what was wrong with its tags."""
        del ask
        last, active = self.webui.last_report, self.webui.active
        return {"active": active, **_told(last if active else replace(last, adapters=()))}

    def dry_run(self, ask: Ask) -> DryRunAnswer:
        """What a prompt would change. Writes nothing, and reads headers only."""
        prompt = ask.prompt()
        held = self.model()
        if held is None:
            raise WebError(409, "no model is loaded, so nothing can be said about it; make an image first")
        parsed = parse_prompt(prompt, self.webui.presets)
        if len(parsed.requests) + len(parsed.bad) > MOST_TAGS:
            raise WebError(413, f"a prompt may have {MOST_TAGS} tags of adapters here")
        requests = [request.drawn(f"0/{number}") for number, request in enumerate(parsed.requests)]
        library, search = self.library(), self.search()
        requests += parse_prompt(self.chosen([request.name for request in requests])).requests
        trial = Trial(held[0], self.webui.session_of(held[0]))
        done = trial.run(requests, search.find, side=self.webui.side_path, allow_pickle=library.allow_pickle)
        report = Report(done.report.adapters, (*parsed.bad, *done.report.problems), 0, tuple(parsed.warnings))
        memory: Memory = {"adapters": done.adapter_bytes, "weights": done.weight_bytes}
        return {**_told(report), "written": done.weights, "beside": done.beside, "memory": memory}

    def _find(self, name: str) -> Entry:
        try:
            return self.search().find(name)
        except UnknownName as error:
            raise WebError(404, str(error)) from error
        except TooSlow as error:
            raise WebError(503, str(error)) from error
        except LoconError as error:
            raise WebError(422, str(error)) from error


def _told(report: Report) -> Told:
    return {
        "adapters": [adapter.as_json() for adapter in report.adapters],
        "problems": list(map(str, report.problems)),
        "warnings": list(map(str, report.warnings)),
    }


def _full_paths(ask: Ask) -> bool:
    return ask.local and os.environ.get(FULL_PATHS) == "1"


def _fits(card: Card, text: str, family: str, base: str) -> bool:
    """Whether a card is among those that are asked for, in lower case. A family is asked for by its words."""
    words = set(card.family.lower().replace("+", " ").split())
    return (
        set(family.split()) <= words
        and base in ("", card.base.lower())
        and (not text or any(text in term.lower() for term in (card.name, *card.search_terms)))
    )


def _adapter_item(card: Card, *, full_path: bool) -> AdapterItem:
    entry, facts = Entry(card.names[0], card.path), card.facts
    item: AdapterItem = {
        "name": card.name,
        "tag": card.tag,
        "alias": facts.alias if facts else "",
        "file": entry.file,
        "size": card.identity.size,
        "modified": card.identity.mtime_ns // 10**9,
        "family": card.family,
        "rank": card.rank,
        "base": card.base,
        "triggers": list(facts.triggers) if facts else [],
        "unread_keys": facts.unread if facts else 0,
        "problem": entry.without_folder(card.problem),
        "read": facts is not None,
    }
    if full_path:
        item["path"] = entry.full_path
    return item
