"""What must be read out of many files: worked out in a thread, kept by file identity, and waited for or not."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, MutableMapping
from typing import Generic, TypeVar

from lib_locon.files.reader import FileIdentity

log = logging.getLogger("lib_locon")
T = TypeVar("T")


class Background(Generic[T]):
    """Values by file identity. `store` is where they are kept: a dictionary, or something that outlives the process.

    `compute` gives the value of one file. `rested` is called when all that was asked for is there, and at the end of
    the thread after `close`.
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
        self._now: FileIdentity | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def known(self, identity: FileIdentity) -> T | None:
        """The value of a file, if it was worked out."""
        return self._store.get(identity)

    @property
    def waiting(self) -> int:
        """How many files are still to be read."""
        with self._changed:
            return len(self._waiting) + (self._now is not None)

    def read(self, identities: Iterable[FileIdentity], seconds: float = 0) -> None:
        """Begins to read those that are not known yet, before all others, and waits until they are or time is up."""
        missing = [identity for identity in identities if identity not in self._store]
        if not missing:
            return
        with self._changed:
            for identity in reversed(missing):
                if identity != self._now:
                    self._waiting[identity] = None
                    self._waiting.move_to_end(identity, last=False)
            if self._thread is None and self._waiting:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._wait(missing, time.monotonic() + seconds)

    def _wait(self, wanted: list[FileIdentity], until: float) -> None:
        """Until none of these is to be read any more. Those that others asked for may wait longer."""
        while wanted and (left := until - time.monotonic()) > 0:
            if wanted[-1] in self._waiting or wanted[-1] == self._now:
                self._changed.wait(left)
            else:
                wanted.pop()

    def close(self) -> None:
        """Stops the thread after the file that it reads now."""
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while self._next():
            identity = self._now
            try:
                if identity is not None and identity not in self._store:
                    self._store[identity] = self._compute(identity)
            except Exception:
                # one strange file must not be the last one that is ever read
                log.exception("an error in sd-webui-locon itself, with %s", identity and identity.path)

    def _next(self) -> bool:
        """Takes the next file, or ends the thread where there is none."""
        while True:
            with self._changed:
                self._now = self._waiting.popitem(last=False)[0] if self._waiting else None
                self._changed.notify_all()
                if self._now is not None:
                    return True
            try:
                self._rested()
            except Exception:
                log.exception("an error in sd-webui-locon itself")
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    return False
