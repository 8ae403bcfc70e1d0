"""Pickled adapters (.pt, .ckpt, .bin): the whole policy about them. Nothing else in the package opens one.

A pickle is a program. `torch.load(weights_only=True)` runs a small part of its language only, but that part has had
holes (CVE-2025-32434 before torch 2.6, CVE-2026-24747 before 2.10), and webuis run older torches; and it either maps
the file into memory (see `files/handles.py`) or reads all of it for one number. So the option is off, and with it on
nothing is run: the archive must be a plain one, `files/pickled_table.py` reads the list of tensors in it, and the
numbers are read from their places.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lib_locon.errors import FileError
from lib_locon.files import kinds
from lib_locon.files.handles import State, fill, read_exactly, safe_open
from lib_locon.files.pickled_table import NotOnlyTensors, StoredTensor, read_table
from lib_locon.files.reader import MAX_HEADER, FileIdentity, SafetensorsFile, check_text, shown

ENDINGS = (".pt", ".ckpt", ".bin")
OFF = (
    "is a pickled file, which can hold a program, and the option to read such files (allow_pickle) is off: "
    "convert it to safetensors, or turn the option on if you trust its author"
)
_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = 30  # bytes, before the name


class HasShape(Protocol):
    """What parsing needs to know of a tensor that it does not read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...


class TensorFile(Protocol):
    """What an adapter is parsed from, whatever the format."""

    path: Path
    identity: FileIdentity
    metadata: dict[str, str]

    @property
    def entries(self) -> Mapping[str, HasShape]:
        """Key → tensor, in the file's order."""
        ...

    def meta(self, key: str) -> Tensor:
        """The tensor without its data, on the meta device."""
        ...

    def tensors(self) -> AbstractContextManager[Any]:
        """An open view of the data with `.get_tensor(key)`."""
        ...


def open_adapter(path: Path | str, allow_pickle: bool = False) -> TensorFile:
    """The file at `path` by its format. Raises FileError; for a pickled one always, unless `allow_pickle`.

    The ending and the content must both say so: nobody expects a pickle under another name, and safetensors that goes
    by the name of .pt is read as what it is.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS or not _is_pickled(path):
        return SafetensorsFile(path)
    if not allow_pickle:
        raise FileError(f"{path} {OFF}")
    return PickledFile(path)


class PickledFile:
    """A table of tensors as `torch.save` writes it. Raises FileError for anything else."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        with safe_open(self.path) as file:
            self._state = State.of(file)
            self.identity = FileIdentity.of_open(self.path, file)
            program, self._parts = _archive(self.path, file, self.identity.size)
        self.entries = _table(self.path, _loaded(self.path, program))
        for key, tensor in self.entries.items():
            if tensor.held * tensor.dtype.itemsize > self._parts.get(tensor.part, (0, 0))[1]:
                raise FileError(f"{self.path} is damaged: {shown(key)} is larger than the part that holds it")
        # tensors that claim more than is there (many on one storage, steps of 0) would cost more than the file's size
        if sum(tensor.nbytes for tensor in self.entries.values()) > self.identity.size:
            raise FileError(f"{self.path} is damaged: its tensors are larger than the file")

    def meta(self, key: str) -> Tensor:
        """The tensor without its data, on the meta device."""
        entry = self.entries[key]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    @contextmanager
    def tensors(self) -> Iterator[_Data]:
        """The open data. Raises FileChanged, at the end too: what was read before may then be of two files."""
        with safe_open(self.path, self._state) as file:
            yield _Data(self.entries, self._parts, file)


class _Data:
    """The tensors of an open file, read when they are asked for. A short file raises EOFError."""

    def __init__(self, entries: Mapping[str, StoredTensor], parts: Mapping[str, tuple[int, int]], file: FileIO) -> None:
        self._entries = entries
        self._parts = parts
        self._file = file
        self._whole: dict[tuple[str, torch.dtype], Tensor] = {}
        """Parts of which tensors are taken that do not lie in one piece, read once for all of these."""

    def get_tensor(self, key: str) -> Tensor:
        """The tensor in memory of its own."""
        entry = self._entries[key]
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        if entry.last - entry.offset + 1 == prod(entry.shape):  # in one piece, in whatever order
            piece = self._read(entry, entry.offset, prod(entry.shape))
            return piece.as_strided(entry.shape, entry.strides).contiguous()
        known = (entry.part, entry.dtype)
        if known not in self._whole:
            self._whole[known] = self._read(entry, 0, entry.held)
        view = self._whole[known].as_strided(entry.shape, entry.strides, entry.offset)
        return view.clone(memory_format=torch.contiguous_format)

    def _read(self, entry: StoredTensor, first: int, count: int) -> Tensor:
        numbers = torch.empty(count, dtype=entry.dtype, device="cpu")
        fill(self._file, self._parts[entry.part][0] + first * entry.dtype.itemsize, numbers)
        return numbers


def _is_pickled(path: Path) -> bool:
    with safe_open(path) as file:
        start = file.read(9)
    return start.startswith(_ZIP) or (start[:1] == b"\x80" and start[8:] != b"{")


def _archive(path: Path, file: FileIO, size: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The program, and the parts with data: name → (first byte, bytes). Raises FileError unless it is an archive of
    uncompressed parts."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > size:
                raise FileError(f"{path} is compressed, or its parts overlap: torch.save writes no such file")
            # torch looks parts up without regard to case
            names = [part.filename for part in parts if part.filename.lower().endswith("/data.pkl")]
            if len(names) != 1 or any(part.filename.lower().endswith("/constants.pkl") for part in parts):
                raise FileError(f"{path} is no table of tensors: a TorchScript program, or no file of torch at all")
            if archive.getinfo(names[0]).file_size > MAX_HEADER:
                raise FileError(f"{path} has a list of tensors of more than {MAX_HEADER} bytes, which is not read")
            folder = names[0][: -len("data.pkl")]
            order = f"{folder}byteorder"
            if any(part.filename == order for part in parts) and archive.read(order) != b"little":
                raise FileError(f"{path} was written on a computer that writes numbers the other way round: convert it")
            data = f"{folder}data/"
            places = {
                part.filename[len(data) :]: (_data_start(file, part), part.file_size)
                for part in parts
                if part.filename.startswith(data)
            }
            return archive.read(names[0]), places
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, struct.error) as error:
        raise FileError(f"{path} is not a sound .pt file, or one of before 2020 ({error}): convert it") from error


def _data_start(file: FileIO, part: zipfile.ZipInfo) -> int:
    """Behind the part's own header, which repeats its name and may add to it."""
    header = read_exactly(file, part.header_offset, _LOCAL_HEADER)
    if not header.startswith(_ZIP):
        raise zipfile.BadZipFile(f"{shown(part.filename)} does not begin where it should")
    return (
        part.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:], "little")
    )


def _loaded(path: Path, program: bytes) -> object:
    try:
        return read_table(program)
    except NotOnlyTensors as error:
        if kind := kinds.of_program(program):
            raise FileError(f"{path} {kind}") from error
        raise FileError(f"{path} holds more than tensors ({error}), and is not opened for that reason") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: its list of tensors cannot be read ({error})") from error


def _table(path: Path, loaded: object) -> dict[str, StoredTensor]:
    if isinstance(loaded, (list, tuple)) and loaded and all(isinstance(item, StoredTensor) for item in loaded):
        raise FileError(f"{path} is a list of tensors without names (cloneofsimo's lora), which is not supported")
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise FileError(f"{path} holds no table of tensors but a {_kind(loaded)}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, StoredTensor):
            kind = kinds.of_table(loaded)
            if kind:
                raise FileError(f"{path} {kind}")
            raise FileError(f"{path} holds more than tensors with names: {shown(key)} is a {_kind(value)}")
        check_text(path, key)
    return dict(loaded)


def _kind(value: object) -> str:
    return "Tensor" if isinstance(value, StoredTensor) else type(value).__name__
