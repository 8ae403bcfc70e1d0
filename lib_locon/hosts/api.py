"""What our addresses answer (docs/api.md). No answer names a folder of this computer outside the adapter folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from lib_locon.cards import Card, Cards
from lib_locon.dryrun import dry_run
from lib_locon.errors import FileError, LoconError, UnknownName
from lib_locon.facts import FileMetadata
from lib_locon.files.reader import FileIdentity
from lib_locon.hosts.web import Ask, Route, WebError
from lib_locon.hosts.webui import Webui
from lib_locon.inspection import inspect
from lib_locon.library import Entry, Library
from lib_locon.prompt.grammar import parse_prompt
from lib_locon.report import Report

PAGE, MOST_ON_A_PAGE = 100, 1000
MAX_PROMPT = 100_000


class BuiltinItem(TypedDict):
    """An adapter as the built-in lists it."""

    name: str
    alias: str
    path: str
    metadata: dict[str, Any]


class AdapterItem(TypedDict):
    """An adapter in our list. `read` is false while its header waits to be read; what comes of it is then empty."""

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
    """One page of them; `total` counts those of all pages."""

    total: int
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
    """`library`, `cards` and `model` give what the host has now, with the settings as they are now.

    `model` never loads one, and gives its file too.
    """

    webui: Webui
    library: Callable[[], Library]
    cards: Callable[[], Cards]
    model: Callable[[], tuple[nn.Module, Path | None] | None]

    def routes(self) -> list[Route]:
        """All of ours. The built-in asks for no password on its two, and neither do we."""
        return [
            Route("GET", "/sdapi/v1/loras", self.loras, protected=False),
            Route("POST", "/sdapi/v1/refresh-loras", self.refresh_loras, protected=False),
            Route("GET", "/locon/v1/adapters", self.adapters),
            Route("GET", "/locon/v1/adapters/{name:path}", self.adapter),
            Route("GET", "/locon/v1/loaded", self.loaded),
            Route("POST", "/locon/v1/dry-run", self.dry_run),
        ]

    def loras(self, ask: Ask) -> list[BuiltinItem]:
        """As the built-in's, but `path` begins at the adapter folder."""
        del ask
        library = self.library()
        stems = Counter(entry.stem for entry in library.entries)
        return [
            _builtin_item(entry, entry.stem if stems[entry.stem] == 1 else entry.name, library.allow_pickle)
            for entry in library.entries
        ]

    def refresh_loras(self, ask: Ask) -> None:
        """Lists the folders again."""
        del ask
        self.library().refresh()

    def adapters(self, ask: Ask) -> AdapterPage:
        """The list, filtered by `text`, `family` and `base`."""
        page = ask.number("page", 1, 1, 10**6)
        per_page = ask.number("per_page", PAGE, 1, MOST_ON_A_PAGE)
        text, family, base = (ask.query.get(name, "").strip().lower() for name in ("text", "family", "base"))
        found = [
            card
            for card in self.cards().all()
            if family in card.family.lower()
            and base in ("", card.base.lower())
            and (not text or any(text in term.lower() for term in (card.name, *card.search_terms)))
        ]
        start = (page - 1) * per_page
        shown = [_adapter_item(card) for card in found[start : start + per_page]]
        return {"total": len(found), "page": page, "per_page": per_page, "adapters": shown}

    def adapter(self, ask: Ask) -> dict[str, Any]:
        """One adapter, by any name that a tag can call it by: all that its header says."""
        entry = self._find(ask.path.get("name", ""))
        try:
            found = inspect(entry.path, allow_pickle=self.library().allow_pickle).as_json()
        except FileError as error:
            raise WebError(422, entry.without_folder(str(error))) from error
        shown = {key: value for key, value in found.items() if key not in ("path", "match")}
        notes = [entry.without_folder(note) for note in found["notes"]]
        return {**shown, "name": entry.name, "file": _file(entry), "notes": notes}

    def loaded(self, ask: Ask) -> Loaded:
        """What the last image was made with."""
        del ask
        report = self.webui.last_report if self.webui.active else Report()
        return {"active": self.webui.active, **_told(report)}

    def dry_run(self, ask: Ask) -> DryRunAnswer:
        """What a prompt would change. Writes nothing, and reads headers only."""
        prompt = ask.body.get("prompt") if isinstance(ask.body, dict) else None
        if not isinstance(prompt, str):
            raise WebError(400, 'the request must be a JSON object such as {"prompt": "a cat <lora:name:0.8>"}')
        if len(prompt) > MAX_PROMPT:
            raise WebError(413, f"a prompt may have {MAX_PROMPT} characters, this one has {len(prompt)}")
        held = self.model()
        if held is None:
            raise WebError(409, "no model is loaded, so nothing can be said about it; make an image first")
        parsed = parse_prompt(prompt, self.webui.presets)
        requests = [request.drawn(f"0/{number}") for number, request in enumerate(parsed.requests)]
        done = dry_run(requests, held[0], self.webui.session(*held), self.library(), side=self.webui.side_path)
        report = Report(done.report.adapters, (*parsed.bad, *done.report.problems), 0, tuple(parsed.warnings))
        memory: Memory = {"adapters": done.adapter_bytes, "weights": done.weight_bytes}
        return {**_told(report), "written": done.weights, "beside": done.beside, "memory": memory}

    def _find(self, name: str) -> Entry:
        try:
            return self.library().find(name)
        except UnknownName as error:
            raise WebError(404, str(error)) from error
        except LoconError as error:
            raise WebError(422, str(error)) from error


def _told(report: Report) -> Told:
    return {
        "adapters": [adapter.as_json() for adapter in report.adapters],
        "problems": list(map(str, report.problems)),
        "warnings": list(map(str, report.warnings)),
    }


def _file(entry: Entry) -> str:
    """Its path from the adapter folder on."""
    return entry.name + entry.path.suffix


def _builtin_item(entry: Entry, name: str, allow_pickle: bool) -> BuiltinItem:
    try:
        metadata = dict(FileMetadata(FileIdentity.of(entry.path), allow_pickle=allow_pickle))
    except FileError:
        metadata = {}
    alias = metadata.get("ss_output_name", name)
    return {"name": name, "alias": str(alias), "path": _file(entry), "metadata": metadata}


def _adapter_item(card: Card) -> AdapterItem:
    entry, facts = Entry(card.names[0], card.path), card.facts
    return {
        "name": card.name,
        "tag": card.tag,
        "alias": facts.alias if facts else "",
        "file": _file(entry),
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
