"""Finds and runs the scripts of the extensions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import errors, extensions, script_callbacks, script_loading
from ._absent import absent
from .util import topological_sort

__getattr__ = absent(__name__)

_basedirs = [str(Path(__file__).resolve().parent.parent)]


@dataclass(frozen=True)
class ScriptFile:
    """A file directly in an extension's `scripts/`; `basedir` is the extension's root."""

    basedir: str
    filename: str
    path: str


def basedir() -> str:
    """The root of the extension whose script is being loaded, else the host's own."""
    return _basedirs[-1]


def list_scripts() -> list[ScriptFile]:
    """The scripts of the active extensions in their order, changed as the metadata.ini files ask for it."""
    files: dict[str, ScriptFile] = {}
    needs: dict[str, list[str]] = {}
    wishes: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    for extension in extensions.active():
        for path in sorted(Path(extension.path, "scripts").glob("*.py")):
            name = f"{extension.canonical_name}/{path.name}"
            files[name], needs[name] = ScriptFile(extension.path, path.name, str(path)), []
            for section in ("scripts", f"scripts/{path.name}"):
                metadata = extension.metadata
                wishes.append((name, metadata.names(section, "Before"), metadata.names(section, "After")))
    for name, before, after in wishes:
        needs[name] += [other for wanted in after for other in _meant(wanted, files)]
        for other in (other for wanted in before for other in _meant(wanted, files)):
            needs[other].append(name)
    return [files[name] for name in topological_sort(needs)]


def load_scripts() -> None:
    """Runs every script, at the start and at each "Reload UI". One that fails is reported and left out."""
    script_callbacks.clear_callbacks()
    for file in list_scripts():
        with errors.reported(f"Error loading script: {file.filename}"), _root_first(file.basedir):
            script_loading.load_module(file.path)


def _meant(name: str, files: dict[str, ScriptFile]) -> list[str]:
    """A script by its name, or all scripts of an extension by its."""
    return [known for known in files if known == name or known.startswith(f"{name}/")]


@contextmanager
def _root_first(root: str) -> Iterator[None]:
    """An extension's root heads `sys.path` while its script runs, and only then."""
    path = sys.path
    sys.path = [root, *path]
    _basedirs.append(root)
    try:
        yield
    finally:
        _basedirs.pop()
        sys.path = path
