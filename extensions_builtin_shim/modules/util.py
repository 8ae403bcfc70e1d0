"""Small helpers of the host."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from ._absent import absent

__getattr__ = absent(__name__)


def topological_sort(dependencies: Mapping[str, Iterable[str]]) -> list[str]:
    """The keys, each after those it depends on, otherwise in the order given. A circle is cut where it closes."""
    done: dict[str, None] = {}
    visiting: set[str] = set()

    def visit(name: str) -> None:
        if name in done or name in visiting or name not in dependencies:
            return
        visiting.add(name)
        for before in dependencies[name]:
            visit(before)
        done[name] = None

    for name in dependencies:
        visit(name)
    return list(done)


class MassFileLister:
    """Looks each folder up once: which files are in it, and their times."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, tuple[str, float, float]]] = {}

    def find(self, path: str) -> tuple[str, float, float] | None:
        """(name, time of change, time of creation), or None."""
        folder, name = os.path.split(path)
        if folder not in self._folders:
            with os.scandir(folder) as entries:  # raises where there is no such folder, as in the host
                found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
            self._folders[folder] = {name: (name, times.st_mtime, times.st_ctime) for name, times in found}
        return self._folders[folder].get(name)

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return self.find(path) is not None

    def mctime(self, path: str) -> tuple[float, float]:
        """The times of a file; zeros where there is none."""
        found = self.find(path)
        return (0, 0) if found is None else found[1:]

    def reset(self) -> None:
        """Forgets the folders."""
        self._folders.clear()
