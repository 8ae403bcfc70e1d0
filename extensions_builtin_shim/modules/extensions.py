"""The extensions there are, in the order in which they load, and what their metadata.ini says."""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import errors
from ._absent import absent

__getattr__ = absent(__name__)


@dataclass(frozen=True)
class CallbackOrderInfo:
    """One `[callbacks/…]` section: the callback's name, and those it wants to stand before and after."""

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]


class ExtensionMetadata:
    """An extension's metadata.ini; empty where there is none."""

    def __init__(self, path: Path, name: str) -> None:
        self.config = configparser.ConfigParser()
        with errors.reported(f"Error reading metadata.ini for extension {name}."):
            self.config.read(path / "metadata.ini", encoding="utf8")
        self.canonical_name = name.lower().strip()  # the host reads [Extension] Name and then does not use it

    def names(self, section: str, field: str) -> tuple[str, ...]:
        """A field's entries, with commas or blanks between them."""
        return tuple(name for name in re.split(r"[,\s]+", self.config.get(section, field, fallback="")) if name)

    def list_callback_order_instructions(self) -> Iterator[CallbackOrderInfo]:
        """The callback sections. An extension may speak of its own callbacks only."""
        for section in self.config.sections():
            kind, _, name = section.partition("/")
            if kind != "callbacks":
                continue
            if name.startswith(self.canonical_name):
                yield CallbackOrderInfo(name, self.names(section, "Before"), self.names(section, "After"))
            else:
                errors.report(f"Callback order section for extension {self.canonical_name} is about another: {section}")


class Extension:
    """One extension. `name` is its directory's; `canonical_name` is the one that metadata.ini files speak of."""

    def __init__(self, name: str, path: Path, *, is_builtin: bool) -> None:
        self.name = name
        self.path = str(path)
        self.enabled = True
        self.is_builtin = is_builtin
        self.metadata = ExtensionMetadata(path, name)
        self.canonical_name = self.metadata.canonical_name


extensions: list[Extension] = []
_sources: list[tuple[bool, Mapping[str, Path]]] = []


def configure(builtin: Mapping[str, Path], user: Mapping[str, Path]) -> None:
    """For the launcher: name → root, in the place of the two directories that the host lists."""
    _sources[:] = [(True, builtin), (False, user)]


def list_extensions() -> None:
    """Lists them anew: the built-in ones, then the user's, each group sorted by name."""
    extensions.clear()
    for is_builtin, sources in _sources:
        for name in sorted(sources):
            extension = Extension(name, sources[name], is_builtin=is_builtin)
            if extension.canonical_name in (known.canonical_name for known in extensions):
                errors.report(f'Duplicate canonical name "{extension.canonical_name}": {extension.path} is left out')
            else:
                extensions.append(extension)


def active() -> Iterable[Extension]:
    """Those that are switched on."""
    return [extension for extension in extensions if extension.enabled]


def find_extension(filename: str) -> Extension | None:
    """The extension in whose directory a file really lies."""
    file = os.path.realpath(filename)
    return next((extension for extension in extensions if file.startswith(extension.path + os.sep)), None)
