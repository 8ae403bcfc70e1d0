"""Adapters with random factors for the random model (`Config.tiny`), one for each family; the shipped ones are trained.

They are written once per run, into a folder that goes with the process.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from extensions_builtin_shim.tiny_sd.models.make_adapters import write_all

_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def folder() -> Path:
    """The folder with all of them."""
    _KEPT.append(tempfile.TemporaryDirectory())
    path = Path(_KEPT[0].name)
    write_all(path)
    return path
