"""How the host tells of errors that it does not let through: on stderr, with the traceback, and goes on."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ._absent import absent

__getattr__ = absent(__name__)


def report(message: str, *, exc_info: bool = False) -> None:
    """Writes a message, and with `exc_info` the error that is being handled."""
    lines = [f"*** {line}\n" for line in message.splitlines()]
    sys.stderr.write("".join(lines) + (traceback.format_exc() if exc_info else ""))


@contextmanager
def reported(message: str) -> Iterator[None]:
    """Nothing that an extension raises in here stops the host. The host's own code writes this out at each place."""
    try:
        yield
    except Exception:  # noqa: BLE001  # the host swallows any error of an extension, so its stand-in must
        report(message, exc_info=True)
