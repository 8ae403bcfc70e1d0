"""A file's hashes, always computed: what a file's own metadata says of them can be anything."""

from __future__ import annotations

import hashlib
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
    path = Path(identity.path)
    start = SafetensorsFile(path).data_start if path.suffix.lower() == ".safetensors" else None
    whole, body = hashlib.sha256(), hashlib.sha256()
    try:
        with path.open("rb") as file:
            whole.update(file.read(start or 0))
            while chunk := file.read(CHUNK):
                whole.update(chunk)
                if start is not None:
                    body.update(chunk)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    return Hashes(whole.hexdigest(), "" if start is None else body.hexdigest())


def body_hash(identity: FileIdentity) -> str:
    """The second of the hashes, or for a file that has none the first: the one by which the webui's images name a file.

    Reads the whole file each time: keep it. Raises FileError.
    """
    path, digest = Path(identity.path), hashlib.sha256()
    start = SafetensorsFile(path).data_start if path.suffix.lower() == ".safetensors" else 0
    try:
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
