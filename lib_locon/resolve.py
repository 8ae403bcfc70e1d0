"""Requests of a prompt + library → the adapters to use. A tag that fails is left out alone and becomes a Problem."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from lib_locon.errors import LoconError
from lib_locon.files.adapter import Adapter, read_adapter
from lib_locon.files.reader import FileIdentity
from lib_locon.library import Library
from lib_locon.prompt.request import Problem, Request
from lib_locon.session import Use


class AdapterCache:
    """The adapters used last, by file identity: a file trained anew under the same name is read anew."""

    def __init__(self, most: int = 8, *, allow_pickle: bool = False) -> None:
        self.most = most
        self.allow_pickle = allow_pickle
        self._lock = threading.Lock()
        self._adapters: OrderedDict[FileIdentity, Adapter] = OrderedDict()

    def read(self, path: Path) -> Adapter:
        """The adapter at `path`. Raises FileError."""
        identity = FileIdentity.of(path)
        with self._lock:
            adapter = self._adapters.get(identity)
            if adapter is None:
                adapter = self._adapters[identity] = read_adapter(path, allow_pickle=self.allow_pickle)
            self._adapters.move_to_end(identity)
            while len(self._adapters) > self.most:
                self._adapters.popitem(last=False)
        return adapter


def resolve(requests: Iterable[Request], library: Library, cache: AdapterCache) -> tuple[list[Use], list[Problem]]:
    """Finds and reads the adapter of each request."""
    uses: list[Use] = []
    problems: list[Problem] = []
    for request in requests:
        try:
            adapter = cache.read(library.find(request.name).path)
        except LoconError as error:
            problems.append(Problem(f"{error}; {request.name!r} was skipped"))
        else:
            uses.append(Use(adapter, request.strengths, request.dyn, request.name))
    return uses, problems
