"""A file's hashes, always computed: what a file's own metadata says of them can be anything."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lib_locon.errors import FileError
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
    start = _body_start(identity)
    whole, body = hashlib.sha256(), hashlib.sha256()
    for chunk in _chunks(identity, 0, start):
        whole.update(chunk)
    for chunk in _chunks(identity, start):
        whole.update(chunk)
        body.update(chunk)
    return Hashes(whole.hexdigest(), body.hexdigest() if start else "")


def body_hash(identity: FileIdentity) -> str:
    """`Hashes.body`; of any other file, the hash of all of it, as the webui's built-in Lora takes it.

    Reads the whole file each time: keep it. Raises FileError.
    """
    digest = hashlib.sha256()
    for chunk in _chunks(identity, _body_start(identity)):
        digest.update(chunk)
    return digest.hexdigest()


def _body_start(identity: FileIdentity) -> int:
    """Where a safetensors file's tensors begin; 0 for other files."""
    path = Path(identity.path)
    return SafetensorsFile(path).data_start if path.suffix.lower() == ".safetensors" else 0


def _chunks(identity: FileIdentity, start: int, stop: int | None = None) -> Iterator[bytes]:
    """The bytes from `start` up to `stop`, or to the end. Raises FileError."""
    left = sys.maxsize if stop is None else stop - start
    try:
        with Path(identity.path).open("rb") as file:
            file.seek(start)
            while chunk := file.read(min(left, CHUNK)):
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise FileError(f"{identity.path} cannot be read: {error.strerror or error}") from error
