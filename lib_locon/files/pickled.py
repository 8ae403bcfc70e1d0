"""Pickled adapters (.pt, .ckpt): the whole policy about them. Nothing else in the package opens one.

A pickle is a program. `torch.load(weights_only=True)` runs a small part of its language only, but that part has had
holes (CVE-2025-32434 before torch 2.6, CVE-2026-24747 before 2.10), and webuis run older torches. So the option is off,
and with it on a file is looked through before torch sees it: a plain archive, and in it no more than what `torch.save`
writes for a table of tensors.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lib_locon.errors import FileError
from lib_locon.files.reader import DTYPES, MAX_HEADER, FileIdentity, SafetensorsFile, check_text, shown

ENDINGS = (".pt", ".ckpt")
OFF = (
    "is a pickled file, which can hold a program, and the option to read such files (allow_pickle) is off: "
    "convert it to safetensors, or turn the option on if you trust its author"
)
_ZIP = b"PK\x03\x04"
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        "torch.storage UntypedStorage",
        *(f"torch {name}Storage" for name in _STORAGES),
        *(str(dtype).replace(".", " ") for dtype in DTYPES.values()),
    }
)
# fmt: off
_OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE", "BININT",
    "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST",
    "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "BINGET",
    "LONG_BINGET",
})
# fmt: on


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
    """A table of tensors as `torch.save` writes it, mapped into memory. Raises FileError for anything else."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.identity = FileIdentity.of(self.path)
        self.metadata: dict[str, str] = {}
        _check_archive(self.path, self.identity.size)
        self.entries = _table(self.path, _load(self.path))
        # tensors that claim more than is there (many on one storage, steps of 0) would cost more than the file's size
        if sum(tensor.numel() * tensor.element_size() for tensor in self.entries.values()) > self.identity.size:
            raise FileError(f"{self.path} is damaged: its tensors are larger than the file")

    def meta(self, key: str) -> Tensor:
        """The tensor without its data, on the meta device."""
        return torch.empty_like(self.entries[key], device="meta")

    @contextmanager
    def tensors(self) -> Iterator[PickledFile]:
        """Itself: the data is mapped already."""
        if FileIdentity.of(self.path) != self.identity:
            raise FileError(f"{self.path} has changed since its header was read; try again")
        yield self

    def get_tensor(self, key: str) -> Tensor:
        """The tensor; its data is read from the disk where it is touched."""
        return self.entries[key]


def _is_pickled(path: Path) -> bool:
    FileIdentity.of(path)  # raises for what must not be opened
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    return start.startswith(_ZIP) or (start[:1] == b"\x80" and start[8:] != b"{")


def _check_archive(path: Path, size: int) -> None:
    """Raises FileError unless it is an archive of uncompressed parts with a pickle that only builds tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > size:
                raise FileError(f"{path} is compressed, or its parts overlap: torch.save writes no such file")
            # torch looks parts up without regard to case
            names = [part.filename for part in parts if part.filename.lower().endswith("/data.pkl")]
            if len(names) != 1 or any(part.filename.lower().endswith("/constants.pkl") for part in parts):
                raise FileError(f"{path} is no table of tensors: a TorchScript program, or no file of torch at all")
            if archive.getinfo(names[0]).file_size > MAX_HEADER:
                raise FileError(f"{path} has a list of tensors of more than {MAX_HEADER} bytes, which is not read")
            pickled = archive.read(names[0])
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise FileError(f"{path} is not a sound .pt file, or one of before 2020 ({error}): convert it") from error
    _check_program(path, pickled)


def _check_program(path: Path, pickled: bytes) -> None:
    strange = ""
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL" and argument not in _GLOBALS:
                strange = strange or shown(argument)
            elif opcode.name not in _OPCODES or (opcode.name == "PROTO" and argument != 2):
                strange = strange or f"the instruction {opcode.name}"
    except ValueError as error:
        raise FileError(f"{path} is damaged: its list of tensors cannot be read") from error
    if strange:
        raise FileError(f"{path} holds more than tensors ({strange}), and is not opened for that reason")


def _load(path: Path) -> object:
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)  # torch 2.1: no Path there
    except Exception as error:  # whatever a broken archive makes torch raise; its texts advise to go on without care
        raise FileError(f"{path} is damaged: torch cannot read its tensors ({type(error).__name__})") from error


def _table(path: Path, loaded: object) -> dict[str, Tensor]:
    if isinstance(loaded, (list, tuple)) and loaded and all(isinstance(item, Tensor) for item in loaded):
        raise FileError(f"{path} is a list of tensors without names (cloneofsimo's lora), which is not supported")
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise FileError(f"{path} holds no table of tensors but a {type(loaded).__name__}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise FileError(f"{path} holds more than tensors with names: {shown(key)} is a {type(value).__name__}")
        check_text(path, key)
        if value.dtype not in DTYPES.values():
            raise FileError(f"{path}: {shown(key)} has the dtype {value.dtype}, which this version does not read")
    return {key: value.detach() for key, value in loaded.items()}
