"""Finds and runs the scripts of the extensions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from . import errors, extensions, script_callbacks, script_loading
from ._absent import absent
from .util import topological_sort

__getattr__ = absent(__name__)

_basedirs = [str(Path(__file__).resolve().parent.parent)]


class Script:
    """What the page's list of scripts offers: runs a job in the place of the host, or many."""

    def title(self) -> str:
        """As the list shows it."""
        raise NotImplementedError

    def run(self, p: object, *args: object) -> object:
        """Makes the images."""
        raise NotImplementedError


class ScriptClassData(NamedTuple):
    """A class of a script. `module` is the loaded file, which cannot be imported by a name."""

    script_class: type[Script]
    path: str
    basedir: str
    module: ModuleType


scripts_data: list[ScriptClassData] = []
"""Every class that the scripts have at hand, a new list's content at each load."""


@dataclass(frozen=True)
class ScriptFile:
    """A file directly in the `scripts/` of the host or an extension; `basedir` is its root."""

    basedir: str
    filename: str
    path: str


def basedir() -> str:
    """The root of the extension whose script is being loaded, else the host's own."""
    return _basedirs[-1]


def list_scripts() -> list[ScriptFile]:
    """The host's own, then those of the active extensions; in the order that the metadata.ini files ask for."""
    files: dict[str, ScriptFile] = {}
    needs: dict[str, list[str]] = {}
    wishes: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    for path in sorted(Path(_basedirs[0], "scripts").glob("*.py")):
        files[path.name], needs[path.name] = ScriptFile(_basedirs[0], path.name, str(path)), []
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
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    for file in list_scripts():
        with errors.reported(f"Error loading script: {file.filename}"), _root_first(file.basedir):
            module = script_loading.load_module(file.path)
            found = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Script)]
            scripts_data.extend(ScriptClassData(each, file.path, file.basedir, module) for each in found)


def _meant(name: str, files: dict[str, ScriptFile]) -> list[str]:
    """A script by its name, or all scripts of an extension by its."""
    return [known for known in files if known == name or known.startswith(f"{name}/")]


@contextmanager
def _root_first(root: str) -> Iterator[None]:
    """An extension's root heads `sys.path` while its script runs, and only then. The host's is there anyway."""
    path = sys.path
    sys.path = [root, *path] if root != _basedirs[0] else path
    _basedirs.append(root)
    try:
        yield
    finally:
        _basedirs.pop()
        sys.path = path
