"""What must be read out of many files: worked out in a thread, kept by file identity, and waited for or not."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, MutableMapping
from typing import Generic, TypeVar

from lib_locon.files.reader import FileIdentity

T = TypeVar("T")


class Background(Generic[T]):
    """Values by file identity. `store` is where they are kept: a dictionary, or something that outlives the process.

    `compute` gives the value of one file and must not raise. `rested` is called when all that was asked for is there.
    """

    def __init__(
        self,
        compute: Callable[[FileIdentity], T],
        store: MutableMapping[FileIdentity, T] | None = None,
        rested: Callable[[], object] = lambda: None,
        name: str = "locon-files",
    ) -> None:
        self._compute = compute
        self._store: MutableMapping[FileIdentity, T] = {} if store is None else store
        self._rested = rested
        self._name = name
        self._waiting: OrderedDict[FileIdentity, None] = OrderedDict()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def known(self, identity: FileIdentity) -> T | None:
        """The value of a file, if it was worked out."""
        return self._store.get(identity)

    def read(self, identities: Iterable[FileIdentity], seconds: float = 0) -> None:
        """Begins to read those that are not known yet, before all others, and waits until it is done or time is up."""
        missing = [identity for identity in identities if identity not in self._store]
        if not missing:
            return
        with self._lock:
            for identity in reversed(missing):
                self._waiting[identity] = None
                self._waiting.move_to_end(identity, last=False)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            thread = self._thread
        thread.join(seconds)

    def close(self) -> None:
        """Stops the thread after the file that it reads now."""
        with self._lock:
            self._waiting.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                identity = self._waiting.popitem(last=False)[0] if self._waiting else None
            if identity is None:
                self._rested()
                with self._lock:
                    if not self._waiting:
                        self._thread = None
                        return
            elif identity not in self._store:
                self._store[identity] = self._compute(identity)
