"""The adapter folders: name → file. Reads names; headers when an alias is asked for, whole files when a hash is."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib_locon.errors import FileError, UnknownName, ambiguous, near
from lib_locon.files.hashes import hashes_of
from lib_locon.files.pickled import ENDINGS as PICKLED
from lib_locon.files.reader import FileIdentity, SafetensorsFile

ENDINGS = (".safetensors",)
LEAST_DIGITS, ENOUGH_DIGITS = 8, 12
"""Of a hash: the fewest that are looked up, and those at which a file that has them is taken for the only one."""
_HASH = re.compile(r"#[0-9a-fA-F]+")
_NAMES = r"[^\\/:*?\"'<>|\r\n]+"
_FOLDERS = re.compile(rf"(?<![\w.~/\\])(?<!http:)(?<!https:)(?:[A-Za-z]:[\\/]+|\\\\+|/+|~/)(?:{_NAMES}[\\/]+)+")


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
    def file(self) -> str:
        """Its path from the folder of the library on, with its ending."""
        return self.name + self.path.suffix

    @property
    def full_path(self) -> str:
        """Links in it stay as they are."""
        return os.path.abspath(self.path)  # noqa: PTH100  `resolve` would follow them

    @property
    def alias(self) -> str:
        """The name that the trainer wrote into the file; empty where there is none or the file cannot be read."""
        return self._written[0]

    @property
    def claimed_hash(self) -> str:
        """The hash that the file's own metadata has for it: a hint where to look first, never a proof."""
        return self._written[1]

    def without_folder(self, text: str) -> str:
        """A sentence about the file that anybody may read: nobody's folders and user names, the file's name alone."""
        below, _, _ = self.name.rpartition("/")
        return without_folder(text, self.path, f"{below}/" if below else "")

    @property
    def _written(self) -> tuple[str, str]:
        try:
            return _written(FileIdentity.of(self.path))
        except FileError:
            return "", ""

    def has_hash(self, digits: str) -> bool:
        """Whether one of the file's hashes begins so; reads the file. False where it cannot be read."""
        try:
            return any(found.startswith(digits) for found in hashes_of(FileIdentity.of(self.path)))
        except FileError:
            return False


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
        """By path inside the folder, else by file name, by the alias in the metadata, by hash. Raises UnknownName.

        Two files that answer to the same name are an error that names both, never a guess. A hash is written as `#` and
        8 digits or more, of the whole file's or of its tensors'. It is computed: the first time, files are read whole.
        """
        entries = self.entries if name else []
        for kind in ("name", "stem", "alias"):
            found = [entry for entry in entries if getattr(entry, kind) == name]
            if found:
                return only(found, name)
        if _HASH.fullmatch(name):
            return self._with_hash(name)
        raise UnknownName(self._not_found(name))

    def _with_hash(self, name: str) -> Entry:
        digits = name[1:].lower()
        if len(digits) < LEAST_DIGITS:
            raise UnknownName(f"{name!r} is too short for a hash: give its first {LEAST_DIGITS} digits, or more")
        # those first that say so themselves: the right one is often found before many gigabytes are read
        entries = sorted(self.entries, key=lambda entry: not entry.claimed_hash.startswith(digits))
        found: list[Entry] = []
        for entry in entries:
            if entry.has_hash(digits):
                found.append(entry)
                if len(digits) >= ENOUGH_DIGITS:
                    break
        if not found:
            raise UnknownName(f"no adapter in {self._places()} has the hash {name}")
        return only(found, name)

    def _places(self) -> str:
        names = (str(folder) if not folder.is_absolute() else folder.name or str(folder) for folder in self.folders)
        return ", ".join(names) or "no folder"

    def _not_found(self, name: str) -> str:
        names = (word for entry in self.entries for word in (entry.alias, entry.name, entry.stem) if word)
        return f"there is no adapter {name!r} in {self._places()}{near(name, names)}"


def without_folder(text: str, path: Path, shown: str = "") -> str:
    """`text` with `shown` in the place of the folder that `path` lies in, however that is spelt."""
    folder = path.parent
    real = (Path(os.path.realpath(path)).parent, os.path.realpath(folder))
    spellings = map(str, (*real, os.path.abspath(folder), folder))  # noqa: PTH100  links stay as they are
    for spelling in dict.fromkeys(spellings):
        if spelling.strip(f".{os.sep}"):
            text = text.replace(spelling.rstrip(os.sep) + os.sep, shown)
    return text


def without_folders(text: str) -> str:
    """`text` with every full path in it cut down to the file's name: for what others wrote, which may hold any."""
    return _FOLDERS.sub("", text)


def only(found: Sequence[Entry], name: str) -> Entry:
    """The one that was found under a name. Raises UnknownName where there are several."""
    if len(found) > 1:
        raise UnknownName(ambiguous(name, [entry.name for entry in found]))
    return found[0]


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
def _written(identity: FileIdentity) -> tuple[str, str]:
    """Alias and hash out of the metadata."""
    file = SafetensorsFile(identity.path)
    identity.check(file.identity)
    metadata = file.metadata
    alias = metadata.get("ss_output_name", "")
    return "" if alias == "None" else alias, metadata.get("sshs_model_hash", "")
