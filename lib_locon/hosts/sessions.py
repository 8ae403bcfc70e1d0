"""A session for each model that was used: several checkpoints can be loaded at once."""

from __future__ import annotations

import logging
import threading
import weakref
from pathlib import Path

from torch import nn

from lib_locon.errors import LoconError
from lib_locon.session import Session

log = logging.getLogger("lib_locon")


class Sessions:
    """By model object, and gone with it. The page and programs ask while images are made."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether any model holds, or may hold, anything of an adapter."""
        return any(session.active for session in self._all())

    def of(self, model: nn.Module, checkpoint: Path | None) -> Session:
        """The model's, made at its first use. `checkpoint`: the file that the model came from."""
        with self._lock:
            session = self._known.get(model)
            if session is None:
                session = self._known[model] = Session(model)
                try:
                    if checkpoint is not None:
                        session.read_bases_from(checkpoint)
                except LoconError as error:  # a pickled one, as a rule
                    log.info("weights will be copied to RAM: %s", error)
            return session

    def known(self, model: nn.Module) -> Session | None:
        """The model's, where it was used already."""
        with self._lock:
            return self._known.get(model)

    def forget(self, model: nn.Module) -> None:
        """Gives the model its base back; what was loaded into it since is left alone. The next one looks at it anew."""
        with self._lock:
            session = self._known.pop(model, None)
        if session is not None:
            session.restore()

    def clear(self) -> None:
        """Gives every model its base back and forgets it. Goes on to the end; raises the first error after it."""
        failed: Exception | None = None
        for session in self._all():
            try:
                session.restore()
            except Exception as error:  # noqa: BLE001  whatever is wrong with one model, the others get their base
                failed = failed or error
        with self._lock:
            self._known.clear()
        if failed is not None:
            raise failed

    def _all(self) -> list[Session]:
        with self._lock:
            return list(self._known.values())
