"""A file's hashes, always computed: what a file's own metadata says of them can be anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from lib_locon.files.handles import read_exactly, safe_open
from lib_locon.files.reader import FileIdentity, SafetensorsFile
from lib_locon.files.writer import CHUNK


class Hashes(NamedTuple):
    """sha256 in hexadecimal: of the whole file, and of what follows a safetensors header ("" for other files).

    The second one stays the same when only the metadata is edited; the webui writes its first 12 digits into images.
    """

    file: str
    body: str = ""


@cache
def hashes_of(identity: FileIdentity) -> Hashes:
    """Reads the whole file, once as long as it stays the same. Raises FileError."""
    whole, body = hashlib.sha256(), hashlib.sha256()
    head, chunks = _read(identity)
    whole.update(head)
    for chunk in chunks:
        whole.update(chunk)
        if head:
            body.update(chunk)
    return Hashes(whole.hexdigest(), body.hexdigest() if head else "")


def body_hash(identity: FileIdentity) -> str:
    """`Hashes.body`; of any other file, the hash of all of it, as the webui's built-in Lora takes it.

    Reads the whole file each time: keep it. Raises FileError.
    """
    digest = hashlib.sha256()
    for chunk in _read(identity)[1]:
        digest.update(chunk)
    return digest.hexdigest()


def _read(identity: FileIdentity) -> tuple[bytes, Iterator[bytes]]:
    """A safetensors file's header and what follows, piece by piece; all other files have no header."""
    path = Path(identity.path)
    if path.suffix.lower() == ".safetensors":
        header = SafetensorsFile(path)
        chunks = _chunks(identity, header.opened(), header.data_start)
    else:
        chunks = _chunks(identity, safe_open(path), 0)
    return next(chunks), chunks


def _chunks(identity: FileIdentity, opening: AbstractContextManager[FileIO], start: int) -> Iterator[bytes]:
    """The first `start` bytes, then the others in pieces of a handy size. A hash is kept for long: all are of one state
    of the file, that which has the identity."""
    with opening as file:
        identity.check(FileIdentity.of_open(Path(identity.path), file))
        yield read_exactly(file, 0, start)
        while chunk := file.read(CHUNK):
            yield chunk
