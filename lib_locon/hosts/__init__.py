"""The seams to the programs that carry us. No maths here, and the only place that imports the host's `modules`."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from lib_locon.terminal import printable

log = logging.getLogger("lib_locon")


def _escape(record: logging.LogRecord) -> bool:
    """A filter: names and texts out of files reach the host's console without control characters.

    Nor do they begin a line of their own there: the ends of lines are those of the message, and of a problem's form.
    """
    if isinstance(record.args, tuple):
        texts = (str, Path, BaseException)
        record.args = tuple(printable(str(arg)) if isinstance(arg, texts) else arg for arg in record.args)
    record.msg, record.args = printable(record.getMessage(), lines=True), None
    if record.exc_info and not record.exc_text:  # what a formatter takes in the place of its own
        record.exc_text = printable(logging.Formatter().formatException(record.exc_info), lines=True)
    return True


def register() -> None:
    """Called by scripts/locon.py each time the host loads its scripts. Changes nothing in a host that is not ours."""
    log.addFilter(_escape)
    if importlib.util.find_spec("modules_forge") is not None:
        log.warning("sd-webui-locon does not support Forge yet and stays out: <lora:…> works as without it.")
        return
    from lib_locon.hosts import a1111  # imports the host's modules

    a1111.register()
