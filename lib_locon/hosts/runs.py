"""Jobs inside jobs: a script may run one in its callbacks, and then the host goes on with the outer one.

The host applies the tags of a job once for each batch and pass; after another job inside it, it would go on with the
other's adapters, or with none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from modules import processing

from lib_locon.hosts.scheduled import Place

RUN = "process_images_inner"
"""What the host calls for each job, and looks up by its name each time."""


class Runs:
    """Comes back to the place of the outer job when one inside it ends, however it ends."""

    def __init__(self, place: Callable[[], Place], come_back: Callable[[Place, Any], object]) -> None:
        self._place, self._come_back = place, come_back
        self._depth = threading.local()
        self._off: Callable[[], None] | None = None

    def watch(self) -> None:
        """Stands before the host's function. Harmless to repeat."""
        if self._off is not None:
            return
        theirs, watching = getattr(processing, RUN), True

        @wraps(theirs)
        def run(p: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(theirs, p, *args, **kwargs) if watching else theirs(p, *args, **kwargs)

        def off() -> None:
            nonlocal watching
            watching = False  # somebody may have put another one before it, and will go on calling it
            if getattr(processing, RUN) is run:
                setattr(processing, RUN, theirs)

        setattr(processing, RUN, run)
        self._off = off

    def remove(self) -> None:
        """Gives the function back, or only hands on where another extension stands before us."""
        if self._off is not None:
            self._off()
        self._off = None

    def _run(self, theirs: Callable[..., Any], p: Any, *args: Any, **kwargs: Any) -> Any:
        depth = getattr(self._depth, "value", 0)
        place = self._place() if depth else None
        self._depth.value = depth + 1
        try:
            return theirs(p, *args, **kwargs)
        finally:
            self._depth.value = depth
            if place is not None:
                self._come_back(place, p)
