"""Requests of a prompt + library → the adapters to use. A tag that fails is left out alone and becomes a Problem."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib_locon.errors import LoconError, UnknownName
from lib_locon.files.adapter import Adapter, read_adapter
from lib_locon.files.reader import FileIdentity
from lib_locon.library import Library
from lib_locon.prompt.request import Problem, Request
from lib_locon.session import Use


class AdapterCache:
    """The adapters used last, by file identity: a file trained anew under the same name is read anew.

    `most` are kept. Those that somebody still uses, a session for one, are not read anew either.
    """

    def __init__(self, most: int = 8, *, allow_pickle: bool = False) -> None:
        self.most = most
        self.allow_pickle = allow_pickle
        self._lock = threading.Lock()
        """Of the two below; held for no longer than it takes to look. The page asks while large files are read."""
        self._reading = threading.Lock()
        """One file at a time, so that none is read twice; what is known already does not wait for it."""
        self._adapters: OrderedDict[FileIdentity, Adapter] = OrderedDict()
        self._in_use: weakref.WeakValueDictionary[FileIdentity, Adapter] = weakref.WeakValueDictionary()

    def read(self, path: Path) -> Adapter:
        """The adapter at `path`. Raises FileError."""
        identity = FileIdentity.of(path)
        adapter = self._kept(identity)
        if adapter is None:
            with self._reading:
                adapter = self._kept(identity)  # somebody else may have read it meanwhile
                if adapter is None:
                    adapter = read_adapter(path, allow_pickle=self.allow_pickle)
                    self._keep(adapter.identity, adapter)  # the file may have been replaced meanwhile
        return adapter

    def _kept(self, identity: FileIdentity) -> Adapter | None:
        with self._lock:
            adapter = self._in_use.get(identity)
        if adapter is not None:
            self._keep(identity, adapter)
        return adapter

    def _keep(self, identity: FileIdentity, adapter: Adapter) -> None:
        with self._lock:
            self._in_use[identity] = self._adapters[identity] = adapter
            self._adapters.move_to_end(identity)
            self._trim()

    def keep(self, most: int) -> None:
        """Changes how many are kept."""
        with self._lock:
            self.most = most
            self._trim()

    def _trim(self) -> None:
        while len(self._adapters) > self.most:
            self._adapters.popitem(last=False)


@dataclass(frozen=True)
class Missing(Problem):
    """A name that leads to no file, or to several."""


@dataclass(frozen=True)
class Found:
    """Requests with the adapters that they mean: what to use at any moment of a run, without reading a file again."""

    pairs: tuple[tuple[Request, Adapter], ...] = ()

    @property
    def scheduled(self) -> bool:
        """Whether anything depends on the step."""
        return any(request.scheduled for request, _ in self.pairs)

    def at(self, step: int = 0, steps: int = 1, *, hires: bool = False) -> list[Use]:
        """What to use at `step`, counted from 0, of a pass of `steps`."""
        return [
            Use(adapter, request.at(step, steps, hires=hires), request.dyn, request.name)
            for request, adapter in self.pairs
        ]


def find(requests: Iterable[Request], library: Library, cache: AdapterCache) -> tuple[Found, list[Problem]]:
    """Finds and reads the adapter of each request."""
    pairs: list[tuple[Request, Adapter]] = []
    problems: list[Problem] = []
    for request in requests:
        try:
            entry = library.find(request.called)
        except UnknownName as error:
            problems.append(Missing(f"{error}; {request.name!r} was skipped"))
            continue
        try:
            pairs.append((request, cache.read(entry.path)))
        except LoconError as error:
            problems.append(Problem(f"{entry.without_folder(str(error))}; {request.name!r} was skipped"))
    return Found(tuple(pairs)), problems


def resolve(requests: Iterable[Request], library: Library, cache: AdapterCache) -> tuple[list[Use], list[Problem]]:
    """What to use at the first step."""
    found, problems = find(requests, library, cache)
    return found.at(), problems
