"""Runs a script's file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from ._absent import absent

__getattr__ = absent(__name__)


def load_module(path: str) -> ModuleType:
    """The file as a module under the file's own name ("locon.py"), anew each time and never in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(Path(path).name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
