"""Opening files of which a name is all that is known: it may lead to a pipe, to a device, or to another file by now."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from lib_locon.errors import FileError

# without O_NONBLOCK, opening a pipe waits for somebody to write; to a regular file it means nothing
_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


def open_regular(path: Path) -> FileIO:
    """Opens a regular file for reading. Raises FileError for anything else, without waiting for it.

    What was opened is looked at, not the name: between a look at a name and the opening it may get another meaning.
    """
    try:
        file = FileIO(path, opener=lambda name, flags: os.open(name, flags | _FLAGS))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileError(f"{path} cannot be read: it is no file but a pipe or a device")
    return file


def inside(path: Path, folders: Iterable[Path]) -> Path:
    """The file that `path` leads to, for writing. Raises FileError where that lies in none of these folders.

    Folders may be links themselves: users keep their files on other disks. A link to a single file that leads out of
    all of them would let whoever made it choose what is overwritten.
    """
    target = Path(os.path.realpath(path))
    if not any(Path(os.path.realpath(folder)) in target.parents for folder in folders):
        raise FileError(
            f"{path.name} is a link that leads out of the adapter folder, so nothing was written through it"
        )
    return target


def read_regular(path: Path, limit: int) -> bytes:
    """All bytes of a regular file. Raises FileError, also where there are more than `limit`."""
    with open_regular(path) as file:
        try:
            parts = bytearray()
            while part := file.read(limit + 1 - len(parts)):
                parts += part
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(parts) > limit:
        raise FileError(f"{path} is larger than {limit} bytes, and is not read")
    return bytes(parts)
