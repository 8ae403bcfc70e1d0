"""Writing a safetensors file tensor by tensor, so that a checkpoint of any size needs the memory of one tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from lib_locon.errors import FileError
from lib_locon.files.reader import Entry

CHUNK = 16 << 20  # bytes copied at a time


def write_safetensors(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    data: Callable[[str], Iterable[bytes]],
) -> None:
    """Writes `entries` with the bytes that `data(key)` yields, in the order of `entries`. All or nothing.

    It is written beside `path` under another name and moved into place when whole; after an error or an interrupt
    neither is there. Raises FileError where the disk refuses, or where `data` yields another number of bytes than the
    entry says.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("xb") as file:
            file.write(_header(entries, metadata))
            for key, entry in entries.items():
                _write_tensor(file, key, entry, data(key))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except FileExistsError as error:
        raise FileError(f"{part} is there already, from another run or one that was killed: remove it first") from error
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(f"{path} could not be written: {error.strerror or error}") from error
        raise


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
