"""Reading safetensors by ourselves: for exact errors and offsets, and because the library maps the file into memory.

A mapped file ends the process when somebody writes it anew (see `files/handles.py`).

The format: 8 bytes little-endian length n, n bytes of JSON (name → dtype, shape, data_offsets; `__metadata__` → texts),
then the data.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from reprlib import Repr
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_locon.errors import FileChanged, FileError
from lib_locon.files import kinds
from lib_locon.files.handles import State, fill, read_exactly, safe_open
from lib_locon.untrusted_json import parse

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
        "BOOL": "bool",
    }.items()
    if hasattr(torch, attribute)
}  # fmt: skip
CONFIG_NAME = "adapter_config.json"
"""What PEFT writes beside an adapter; `peft_config` reads it."""
MAX_HEADER = 32_000_000
"""Bytes. Ten times any real one; Python needs some 20 bytes for each of these, so it also bounds the memory."""
MAX_AXES = 64
"""torch's own limit for most of what it does."""
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 200


class FileIdentity(NamedTuple):
    """Changes when the file does, or the configuration beside it: caches are keyed by it."""

    path: str
    size: int
    mtime_ns: int
    config_ns: int = 0

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Raises FileError where there is no such file."""
        try:
            found = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise FileError(f"{path} cannot be read: it is no file but a pipe or a device")  # a pipe would never end
        return cls._of(path, found)

    @classmethod
    def of_open(cls, path: Path, file: FileIO) -> FileIdentity:
        """That of an open file, whatever `path` leads to by now. Raises OSError."""
        return cls._of(path, os.fstat(file.fileno()))

    @classmethod
    def _of(cls, path: Path, found: os.stat_result) -> FileIdentity:
        try:
            config_ns = path.with_name(CONFIG_NAME).stat().st_mtime_ns
        except (OSError, ValueError):
            config_ns = 0
        return cls(str(path.resolve()), found.st_size, found.st_mtime_ns, config_ns)

    def check(self, other: FileIdentity) -> None:
        """Raises FileChanged where what was read, `other`, is not the content that this stands for.

        What is kept by this identity would else be shown for it, when a file that was swapped for a moment is back.
        """
        if (self.size, self.mtime_ns) != (other.size, other.mtime_ns):
            raise FileChanged(f"{self.path} has changed meanwhile; try again")


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it; `start` and `end` count from the first byte of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's terms."""
        return DTYPES[self.dtype]


class SafetensorsFile:
    """A safetensors file whose header has been read and found sound. Raises FileError with a sentence otherwise."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with safe_open(self.path) as file:
            self._state = State.of(file)
            self.identity = FileIdentity.of_open(self.path, file)
            header, self.data_start = _read_header(self.path, file, self.identity.size)
        self.metadata = _metadata(self.path, header)
        self.entries = {
            key: _entry(self.path, key, value, self.data_start, self.identity.size) for key, value in header.items()
        }
        _check_layout(self.path, self.entries, self.data_start, self.identity.size)

    def meta(self, key: str) -> Tensor:
        """The tensor without its data, on the meta device."""
        entry = self.entries[key]
        return torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")

    @contextmanager
    def tensors(self) -> Iterator[TensorData]:
        """The open data. Raises FileChanged, at the end too: what was read before may then be of two files."""
        with self.opened() as file:
            yield TensorData(self.entries, file)

    def opened(self) -> AbstractContextManager[FileIO]:
        """The file, open, as it was when its header was read, and as long as this lasts. Raises FileChanged."""
        return safe_open(self.path, state=self._state)


class TensorData:
    """The tensors of an open file, read when they are asked for. A short file raises EOFError."""

    def __init__(self, entries: Mapping[str, Entry], file: FileIO) -> None:
        self._entries = entries
        self._file = file

    def get_tensor(self, key: str) -> Tensor:
        """The tensor in memory of its own."""
        entry = self._entries[key]
        out = torch.empty(entry.shape, dtype=entry.torch_dtype, device="cpu")
        fill(self._file, entry.start, out)
        return out


def _read_header(path: Path, file: FileIO, size: int) -> tuple[dict[str, Any], int]:
    start = read_exactly(file, 0, min(size, 64))
    _recognise(path, start)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8:
        raise FileError(f"{path} is not a whole safetensors file ({size} bytes): a download cut short?")
    if length > MAX_HEADER:
        raise FileError(f"{path} has a header of {length} bytes; more than {MAX_HEADER} are not read")
    text = read_exactly(file, 8, length)
    try:
        header = parse(text.decode("utf-8"), lambda pairs: _unique(path, pairs))
    except ValueError as error:
        raise FileError(f"{path} is not a safetensors file: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise FileError(f"{path} is not a safetensors file: its header is no JSON object")
    return header, 8 + length


def _recognise(path: Path, start: bytes) -> None:
    """The kinds of wrong file that people really have, named."""
    if not start:
        raise FileError(f"{path} is empty: download it again")
    if start[8:9] == b"{":
        return  # the length of a header may begin with any bytes, a pickle's too
    what = kinds.of_start(start)
    if what:
        raise FileError(f"{path} {what}")


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FileError(f"{path} has {shown(twice)} twice in its header; which one is meant cannot be known")
    return found


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise FileError(f"{path} has a __metadata__ that is no table of texts")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    for key, value in texts.items():
        check_text(path, key)
        check_text(path, value)
    return texts


def check_text(path: Path, text: str) -> None:
    """Raises FileError for half a character: such a text can be neither printed nor looked up."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{path} is damaged: {shown(text)} in it is no Unicode text") from error


def _entry(path: Path, key: str, value: Any, data_start: int, size: int) -> Entry:
    check_text(path, key)
    problem = ""
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        problem = "is not dtype, shape and data_offsets"
    else:
        if not is_shape(shape) or not all(type(n) is int and n >= 0 for n in (start, end)):
            problem = "has a negative or broken shape or offset"
        elif not isinstance(dtype, str) or dtype not in DTYPES:
            problem = f"has the dtype {shown(dtype)}, which this version does not read"
        elif data_start + end > size:
            at = shown(data_start + end)
            raise FileError(f"{path} is cut short: {shown(key)} ends at byte {at} of {size}; download it again")
        elif end - start != prod(shape) * DTYPES[dtype].itemsize:
            problem = f"has {shown(end - start)} bytes of data for the shape {list(shape)} of {dtype}"
    if problem:
        raise FileError(f"{path}: the header's entry {shown(key)} {problem}")
    return Entry(dtype, shape, data_start + start, data_start + end)


def is_shape(shape: tuple[Any, ...]) -> bool:
    """Tell whether torch can count the elements (of an empty tensor too: it multiplies the other axes all the same)."""
    if len(shape) > MAX_AXES or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        return False
    numel: int = prod(max(n, 1) for n in shape)
    return numel < 2**63


def _check_layout(path: Path, entries: Mapping[str, Entry], data_start: int, size: int) -> None:
    """The format's rule: each byte after the header is of exactly one tensor. Raises FileError."""
    position = data_start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            what = "overlaps" if entry.start < position else "does not follow"
            raise FileError(f"{path} is damaged: {shown(key)} {what} the tensor before it; download it again")
        position = entry.end
    if position != size:
        raise FileError(f"{path} has {size - position} bytes after its last tensor: it is damaged; download it again")


def shown(value: object) -> str:
    """Something out of a file, for a sentence: in quotes, with strange characters escaped, never long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no number of more than 4300 digits
        return "(a number of thousands of digits)"
