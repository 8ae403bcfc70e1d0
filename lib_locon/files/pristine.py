"""Reading a model's pristine weights back from its checkpoint file, while users do with that file what they like.

Read, not mapped (see `files/handles.py`); from the page cache into a buffer that is used again, at 20 GB/s. The file's
identity is compared after each reading, and a change before it or during it shows.

Replaced or deleted: except on Windows one handle stays open as long as the source lives, so that what was opened can
still be read, whatever has its name by now (its disk space is given back, and its drive can be unmounted, when the
source is gone). On Windows an open handle would keep the user from replacing the file: there it is opened for each
read, and a file that was replaced is an error.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from lib_locon.errors import FileError
from lib_locon.files import handles
from lib_locon.files.handles import HandleIdentity, State, fill
from lib_locon.files.reader import Entry, SafetensorsFile
from lib_locon.files.regular import open_regular

TILE = 1 << 20  # numbers that are cast at a time: a few MiB that stay in the cache
SETTLED = 2_000_000_000
"""Nanoseconds: the coarsest clock of a file system (FAT's). A file written less than this ago may be written again
with no change of its time."""


SAMPLES, SAMPLE_BYTES = 16, 4096
"""Places of the file that are looked at, and how much there."""


class CheckpointSource:
    """The tensors of one safetensors file by the model's parameter paths. Safe for several threads.

    `names` maps a path to the file's key (see `models.checkpoint_keys`); a wrong one does no harm, since the store
    compares before it relies on it. Raises FileError where the file is not the one whose header was read.

    Whoever writes a file can set its size and time to what they were (`touch -r`, `rsync --times`). The time of its
    last change of any kind (ctime) cannot be set; but it changes when the file is renamed or deleted, too, and its
    numbers do not. So where that alone has changed, samples of the content are compared, and `take_as_it_is` offers the
    file to be proved as a whole, at the next change of the model.
    """

    def __init__(self, file: SafetensorsFile, names: Mapping[str, str], *, hold: bool = os.name != "nt") -> None:
        self.path: Path = file.path.absolute()  # the host may change its directory
        self._entries: Mapping[str, Entry] = {p: file.entries[key] for p, key in names.items() if key in file.entries}
        self._lock = threading.Lock()
        self._sound: set[tuple[str, torch.dtype]] = set()
        """What was read so before: what is looked for in a cast cannot come later, for the file stays the same."""
        self._held: FileIO | None = None
        opened = open_regular(self.path)
        try:
            self._identity, self._ctime_ns = State.of(opened)
            if (self._identity.size, self._identity.mtime_ns) != (file.identity.size, file.identity.mtime_ns):
                raise FileError(f"{self.path} has changed since its header was read; try again")
            self._samples = _sampled(opened, self._identity.size)
            if hold:
                self._held = opened
                weakref.finalize(self, opened.close)
        finally:
            if self._held is None:
                opened.close()
        self._settled = False
        self._sampled_ctime_ns = self._ctime_ns
        """The last one under which the samples were right; `_ctime_ns` is the last one under which all numbers were."""
        self._is_other = False
        """True where the content was found to be another at the last look, whatever the file's times say."""
        self._refused: State | None = None
        """The state in which the file did not give what the weights hold."""

    def read(self, path: str, out: Tensor) -> None:
        """Fills `out` (contiguous, on the CPU) with the weight, cast to its dtype. Raises FileError; then undefined."""
        entry = self._entries.get(path)
        if entry is None:
            raise FileError("the checkpoint file has no such weight")
        if entry.shape != tuple(out.shape):
            raise FileError("the checkpoint file has the weight in another shape")
        self._read(entry, 0, out, checked=(path, out.dtype) in self._sound)
        self._sound.add((path, out.dtype))

    def read_part(self, path: str, first: int, out: Tensor) -> None:
        """Some of its numbers, from number `first` on; of a weight that was read in this dtype before. As `read`."""
        self._read(self._entries[path], first, out, checked=True)

    def has_parts(self) -> bool:
        """Whether parts can be read without opening the file for each, and it is what it was."""
        try:
            return self._held is not None and self._is_as_loaded(self._held)
        except OSError:
            return False

    def unchanged(self) -> bool:
        """Whether the name still stands for the same file, unwritten, and a write from now on would show in its time.

        Stricter than what `read` asks for: weights that rely on a file that was replaced go on reading it, but no
        other weight is to begin with that.
        """
        try:
            with open_regular(self.path) as file:  # by opening: a network drive asks its server only then
                same = self._is_as_loaded(file)
        except (FileError, OSError):
            return False
        # once settled, always: the system's clock may be set back, and then a base would seem lost
        self._settled = self._settled or _has_settled(self._identity)
        return same and self._settled

    def take_as_it_is(self) -> Callable[[], None] | None:
        """Where nothing but the file's times has changed, reads it from now on as it is; returns what refuses it again.

        None where it is as it was, is another, or was written so lately that it may change without showing it.
        """
        before, ctime_ns = self._identity, self._ctime_ns
        try:
            with self._opened() as file:
                now, now_ctime_ns = State.of(file)
                # a write through a memory map, or to a drive that keeps no such times, shows in nothing but the content
                self._is_other = _sampled(file, now.size) != self._samples
        except (FileError, OSError, EOFError):
            return None
        same = (now, now_ctime_ns) == (before, ctime_ns)
        if same or self._is_other or now._replace(mtime_ns=before.mtime_ns) != before or not _has_settled(now):
            return None

        def refuse() -> None:
            self._identity, self._ctime_ns, self._refused = before, ctime_ns, State(now, now_ctime_ns)

        self._identity, self._ctime_ns, self._sampled_ctime_ns = now, now_ctime_ns, now_ctime_ns
        return refuse

    def _read(self, entry: Entry, first: int, out: Tensor, *, checked: bool) -> None:
        with self._opened() as file:
            try:
                start = entry.start + first * entry.torch_dtype.itemsize
                if entry.torch_dtype == out.dtype:
                    fill(file, start, out)
                else:
                    _read_cast(file, start, entry.torch_dtype, out, checked=checked)
                self._check(file)  # after it: so a change that came while reading is seen as well as one before
            except (OSError, EOFError) as error:
                why = getattr(error, "strerror", None) or error
                raise FileError(f"{self.path} cannot be read: {why}") from error

    def _check(self, file: FileIO) -> None:
        if not self._is_as_loaded(file):
            raise FileError(f"{self.path} has changed since it was loaded")

    def _is_as_loaded(self, file: FileIO) -> bool:
        """Tell whether the open file is the loaded one, as it was; renamed or deleted meanwhile, it still is."""
        identity, ctime_ns = State.of(file)
        if self._is_other or identity != self._identity or (identity, ctime_ns) == self._refused:
            return False
        if ctime_ns not in (self._ctime_ns, self._sampled_ctime_ns):
            self._is_other = _sampled(file, identity.size) != self._samples
            self._sampled_ctime_ns = self._sampled_ctime_ns if self._is_other else ctime_ns
        return not self._is_other

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        if self._held is None:
            with open_regular(self.path) as file:
                yield file
        else:
            with nullcontext() if handles.AT_ONCE else self._lock:  # one handle has one position
                yield self._held


def _sampled(file: FileIO, size: int) -> bytes:
    """A digest of some of the content: the beginning, where the header is, and places all over the rest."""
    digest = hashlib.blake2b()
    for start in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
        part = bytearray(min(SAMPLE_BYTES, size - start))
        fill(file, start, torch.frombuffer(part, dtype=torch.uint8))
        digest.update(part)
    return digest.digest()


def _has_settled(file: HandleIdentity) -> bool:
    return abs(time.time_ns() - file.mtime_ns) >= SETTLED


def _read_cast(file: FileIO, start: int, dtype: torch.dtype, out: Tensor, *, checked: bool) -> None:
    """By tiles: no second tensor of the weight's size."""
    flat = out.view(-1)
    buffer = torch.empty(min(TILE, flat.numel()), dtype=dtype, device="cpu")
    for first in range(0, flat.numel(), TILE):
        part = buffer[: flat.numel() - first]
        fill(file, start + first * dtype.itemsize, part)
        target = flat[first : first + TILE]
        target.copy_(part)
        # torch's vector and scalar code give a NaN different bits: which one it meets depends on its place and on the
        # number of threads, so it would not be the same each time (fp8 has no isnan: there the other side tells)
        if not checked and bool((part if dtype.itemsize > 1 else target.float()).isnan().any()):
            raise FileError("the checkpoint file has a NaN in the weight, in another dtype")
