"""The adapter folders: name → file. Reads names, and headers only when an alias is asked for; never tensors."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib_locon.errors import FileError, UnknownName
from lib_locon.files.pickled import ENDINGS as PICKLED
from lib_locon.files.reader import FileIdentity, SafetensorsFile

ENDINGS = (".safetensors",)


@dataclass(frozen=True)
class Entry:
    """A file of a library. `name` is its path inside the folder, without the ending, with `/` on every system."""

    name: str
    path: Path

    @property
    def stem(self) -> str:
        """The file's own name, without folders and ending."""
        return self.name.rpartition("/")[2]

    @property
    def alias(self) -> str:
        """The name that the trainer wrote into the file; empty where there is none or the file cannot be read."""
        try:
            return _alias(FileIdentity.of(self.path))
        except FileError:
            return ""


class Library:
    """All adapters in some folders and the folders below them.

    A name is looked up among the files that are there, never made into a path: `..` and absolute paths find nothing.
    Pickled files are there with `allow_pickle` only, and where no safetensors file of the same name stands beside them.
    """

    def __init__(self, folders: Sequence[Path | str], *, allow_pickle: bool = False) -> None:
        self.folders = [Path(folder) for folder in folders]
        self.allow_pickle = allow_pickle
        self._entries: list[Entry] = []
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def entries(self) -> list[Entry]:
        """Every adapter, sorted by name; listed anew when a folder has changed since."""
        with self._lock:
            if not self._seen or any(_changed(folder) != time for folder, time in self._seen.items()):
                self._list()
            return self._entries

    def refresh(self) -> None:
        """Lists the folders again."""
        with self._lock:
            self._list()

    def _list(self) -> None:
        endings = (*ENDINGS, *PICKLED) if self.allow_pickle else ENDINGS
        self._seen = {}
        # by what the names lead to: one file is one adapter, under the first of its names, however often it is reached
        found: dict[str, Entry] = {}
        for folder in self.folders:
            for entry in _walk(folder, endings, self._seen):
                found.setdefault(os.path.realpath(entry.path), entry)
        safe = {entry.path.with_suffix("") for entry in found.values() if entry.path.suffix.lower() in ENDINGS}
        kept = (
            entry
            for entry in found.values()
            if entry.path.suffix.lower() in ENDINGS or entry.path.with_suffix("") not in safe
        )
        self._entries = sorted(kept, key=lambda entry: (entry.name.lower(), entry.name))

    def find(self, name: str) -> Entry:
        """By path inside the folder, else by file name, else by the alias in the metadata. Raises UnknownName.

        Two files that answer to the same name are an error that names both, never a guess.
        """
        entries = self.entries if name else []
        for kind in ("name", "stem", "alias"):
            found = [entry for entry in entries if getattr(entry, kind) == name]
            if len(found) > 1:
                names = ", ".join(entry.name for entry in found)
                raise UnknownName(f"{name!r} could be any of these: {names}. Write the one that you mean in full")
            if found:
                return found[0]
        raise UnknownName(self._not_found(name))

    def _not_found(self, name: str) -> str:
        names = {entry.stem.lower(): entry.stem for entry in self.entries}
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        hint = f" (near it: {', '.join(names[key] for key in near)})" if near else ""
        return f"there is no adapter {name!r} in {', '.join(map(str, self.folders)) or 'no folder'}{hint}"


def _walk(folder: Path, endings: Sequence[str], seen: dict[str, int]) -> Iterator[Entry]:
    """The adapters below `folder`. Adds each folder that it looked into to `seen`, with its time of change."""
    # links are followed, as the webui does: many users keep their files on another disk; a loop is walked once
    walked: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        seen[root] = _changed(root)
        for file in files:
            path = Path(root, file)
            if path.suffix.lower() in endings and path.is_file():  # not a link to nothing
                yield Entry(path.relative_to(folder).with_suffix("").as_posix(), path)


def _changed(folder: str) -> int:
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return 0


@cache
def _alias(identity: FileIdentity) -> str:
    alias = SafetensorsFile(identity.path).metadata.get("ss_output_name", "")
    return "" if alias == "None" else alias
