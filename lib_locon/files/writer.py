"""Writing a safetensors file tensor by tensor, so that a checkpoint of any size needs the memory of one tensor."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from lib_locon.errors import FileError
from lib_locon.files.reader import MAX_HEADER, Entry

CHUNK = 16 << 20  # bytes copied at a time
ATTEMPTS = 10  # at a partial file that others move away meanwhile


def write_safetensors(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    data: Callable[[str], Iterable[bytes]],
    mark: str,
) -> None:
    """Writes `entries` with the bytes that `data(key)` yields, in the order of `entries`. All or nothing.

    It is written beside `path` under another name and moved into place when whole; after an error or an interrupt
    neither is there. What a run that was killed has left under that name is replaced: it is known by `mark`, a key of
    `metadata`. Raises FileError where the disk refuses, where another run is writing the same file or a file of
    somebody else's has that name, and where `data` yields another number of bytes than the entry says.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        file = _begin(part, mark.encode())
    except OSError as error:
        raise FileError(f"{path} could not be written: {error.strerror or error}") from error
    try:
        with file:
            file.write(_header(entries, metadata))
            for key, entry in entries.items():
                _write_tensor(file, key, entry, data(key))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(f"{path} could not be written: {error.strerror or error}") from error
        raise


def _begin(part: Path, mark: bytes) -> BinaryIO:
    """The partial file, empty and locked as long as it is open. Raises FileError and OSError."""
    for _ in range(ATTEMPTS):
        is_new = True
        try:
            file: BinaryIO = part.open("x+b")
        except FileExistsError:
            # through a link, a file anywhere would be emptied
            if part.is_symlink() or not part.is_file():
                raise FileError(f"{part} is there already, and is no file: remove it first") from None
            is_new, file = False, part.open("r+b")
        try:
            _take(file, part, is_new=is_new)
            # the run that had the lock may have moved its file into place meanwhile: then it is not the partial one
            if _is_same(file, part):
                if not _begins_with(file, mark):
                    raise FileError(f"{part} is there already, and not from such a run: remove it first")
                file.seek(0)
                file.truncate()
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    raise FileError(f"{part} is made and moved away by others all the time: choose another name")


def _take(file: BinaryIO, part: Path, *, is_new: bool) -> None:
    """Locks a partial file. Raises FileError where another run has it, or may have it."""
    taken = _lock(file)
    if taken is False:
        raise FileError(f"another run is writing {part} now: wait for it, or choose another name")
    if taken is None and not is_new:
        why = "and this drive does not tell if another run is writing it"
        raise FileError(f"{part} is there already, {why}: remove it if none is")


def _is_same(file: BinaryIO, part: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), part.lstat())
    except FileNotFoundError:
        return False


def _begins_with(file: BinaryIO, mark: bytes) -> bool:
    """Look for the mark in the header of a partial file; an empty one passes, for it is no loss to anybody.

    It is read through the handle that has the lock: on Windows no other one may read what is locked.
    """
    start = file.read(8)
    return not start or mark in file.read(min(int.from_bytes(start, "little"), MAX_HEADER))


def _lock(file: BinaryIO) -> bool | None:
    """Takes the file for this process, until it is closed; False where another has it, None on a drive without locks"""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK) else None
    return True


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for key, entry in entries.items():
        end = start + entry.end - entry.start
        header[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8, as the format asks for
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, key: str, entry: Entry, chunks: Iterable[bytes]) -> None:
    written = sum(file.write(chunk) for chunk in chunks)
    if written != entry.end - entry.start:
        raise FileError(f"{key}: {written} bytes where {entry.end - entry.start} belong")
