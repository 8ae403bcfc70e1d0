"""Reading from an open file, while users do with that file what they like.

Read, not mapped. A mapped file that is cut short (`wget -O`, `cp` over it, a trainer that saves) or whose network drive
goes away ends the whole process (SIGBUS; an access violation on Windows), and Windows lets nobody replace a mapped
file. Reads give an error instead, cost the same, and can be checked: by the file's identity, before and after.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lib_locon.errors import FileChanged, FileError
from lib_locon.files.regular import open_regular

AT_MOST = 1 << 30  # bytes: macOS refuses to read 2 GiB and more at once
AT_ONCE = hasattr(os, "preadv")
"""True where several threads can read from one handle, each at a place of its own: not on Windows."""


class HandleIdentity(NamedTuple):
    """By handle, not by name: on Windows `os.stat` and `os.fstat` may tell different devices for one file.

    No ctime: it changes when the file is renamed, deleted or labelled, too, and its numbers do not.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int


def fill(file: FileIO, start: int, out: Tensor) -> None:
    """Bytes from `start` on into `out`, contiguous and on the CPU. Raises EOFError where the file ends before."""
    if not out.nbytes:
        return
    # torch gives no writable buffer without numpy, which is no dependency here; `out` outlives the view
    view = memoryview((ctypes.c_ubyte * out.nbytes).from_address(out.data_ptr()))
    done = 0
    while done < len(view):
        if AT_ONCE:
            count = os.preadv(file.fileno(), [view[done : done + AT_MOST]], start + done)
        else:
            file.seek(start + done)
            count = file.readinto(view[done : done + AT_MOST]) or 0
        if not count:
            raise EOFError("it has been cut short")
        done += count


def read_exactly(file: FileIO, start: int, count: int) -> bytes:
    """So many bytes from `start` on. Raises EOFError where the file ends before."""
    file.seek(start)
    parts: list[bytes] = []
    while count:
        part = file.read(min(count, AT_MOST))
        if not part:
            raise EOFError("it has been cut short")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class State(NamedTuple):
    """All that tells of a write. Stricter than the identity: for what is read at once, and can be read again.

    A system notes times every few milliseconds. Two writes between two of its ticks look like one, so a reading that
    lies between them in time, too, can mix both. Nothing shorter than a lock would show that, and no trainer takes one.
    """

    identity: HandleIdentity
    ctime_ns: int

    @classmethod
    def of(cls, file: FileIO) -> State:
        """Raises OSError."""
        found = os.fstat(file.fileno())
        identity = HandleIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        return cls(identity, found.st_ctime_ns)


@contextmanager
def safe_open(path: Path, state: State | None = None) -> Iterator[FileIO]:
    """The file at `path`, which must be in this state (None: in any) and stay so until the end of the body.

    Raises FileError, and FileChanged where it was written, or became another.
    """
    with open_regular(path) as file:
        try:
            before = State.of(file)
            if state is not None and before != state:
                raise FileChanged(f"{path} has changed since its header was read; try again")
            yield file
            if State.of(file) != before:
                raise FileChanged(f"{path} was written while it was read; try again")
        except EOFError as error:
            if State.of(file) == before:
                raise FileError(f"{path} is damaged: it ends before it should; download it again") from error
            raise FileChanged(f"{path} was cut short while it was read; try again") from error
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
