"""The seams to the programs that carry us. No maths here, and the only place that imports the host's `modules`."""

from __future__ import annotations

import importlib.util
import logging

from lib_locon.errors import printable

log = logging.getLogger("lib_locon")


def _escape(record: logging.LogRecord) -> bool:
    """A filter: names and texts out of files reach the host's console without control characters."""
    record.msg, record.args = printable(record.getMessage(), lines=True), None
    return True


def register() -> None:
    """Called by scripts/locon.py each time the host loads its scripts. Changes nothing in a host that is not ours."""
    log.addFilter(_escape)
    if importlib.util.find_spec("modules_forge") is not None:
        log.warning("sd-webui-locon does not support Forge yet and stays out: <lora:…> works as without it.")
        return
    from lib_locon.hosts import a1111  # imports the host's modules

    a1111.register()
