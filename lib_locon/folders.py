"""Walks folders of adapters: however deep they are, wherever links lead, and past all that cannot be looked into."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """A folder on the way. `prefix` is what stands before the names in it, inside the folder that the walk began at.

    `files` are (name, what it leads to, links followed) of what is a file. It is empty where nobody may look.
    """

    path: str
    real: str
    prefix: str
    files: list[tuple[str, str]] = field(default_factory=list)


def walk(top: Path | str) -> Iterator[Folder]:
    """`top` and the folders below it, each once, a folder before those in it.

    Links are followed, as the webui does: many users keep their files on another disk. A loop is walked once. Nothing
    is raised for a folder that is gone, forbidden, or has a path longer than the system allows: it holds nothing.
    """
    # a list, and no recursion: folders may be nested deeper than Python's calls may
    waiting = [Folder(os.fspath(top), os.path.realpath(top), "")]
    walked: set[str] = set()
    while waiting:
        folder = waiting.pop()
        if folder.real not in walked:
            walked.add(folder.real)
            below = _look_into(folder)
            yield folder
            waiting.extend(reversed(below))


def _look_into(folder: Folder) -> list[Folder]:
    """Notes the folder's files, and gives the folders in it."""
    below: list[Folder] = []
    with suppress(OSError), os.scandir(folder.path) as entries:  # what was seen before an error stays
        for entry in entries:
            real = _real(folder, entry)
            if _is_there(entry.is_dir):
                below.append(Folder(entry.path, real, f"{folder.prefix}{entry.name}/"))
            elif _is_there(entry.is_file):  # not a link to nothing
                folder.files.append((entry.name, real))
    return below


def _real(folder: Folder, entry: os.DirEntry[str]) -> str:
    """The path that the entry leads to. The system is asked for links only: it looks at each part of a path anew."""
    # on Windows a folder may lead elsewhere without being a link
    if entry.is_symlink() or (os.name == "nt" and _is_there(entry.is_dir)):
        return os.path.realpath(entry.path)
    return os.path.join(folder.real, entry.name)  # noqa: PTH118  texts: ten thousand of them


def _is_there(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:
        return False
