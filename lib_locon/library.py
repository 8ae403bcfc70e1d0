"""The adapter folders: name → file. Reads names; headers when an alias is asked for, whole files when a hash is."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib_locon.absent import why_absent
from lib_locon.errors import FileError, UnknownName, ambiguous, near
from lib_locon.files.hashes import hashes_of
from lib_locon.files.pickled import ENDINGS as PICKLED
from lib_locon.files.reader import FileIdentity, SafetensorsFile
from lib_locon.folders import walk
from lib_locon.naming import Lookup, Table

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
        self._lookup: tuple[list[Entry], Lookup[Entry]] | None = None
        """The entries that it was made of, and it: one for each listing."""
        self._seen: dict[str, tuple[int, str]] = {}
        """Each folder that was looked into, with its time of change and what stands before the names in it."""
        self._lock = threading.Lock()

    @property
    def entries(self) -> list[Entry]:
        """Every adapter, sorted by name; listed anew when a folder has changed since."""
        with self._lock:
            if not self._seen or any(_changed(folder) != time for folder, (time, _) in self._seen.items()):
                self._list()
            return self._entries

    @property
    def lookup(self) -> Lookup[Entry]:
        """Which of the entries a name means; hashes are no names."""
        entries, known = self.entries, self._lookup
        if known is None or known[0] is not entries:
            paths = ((entry.name, entry) for entry in entries)
            known = self._lookup = entries, Lookup(paths, lambda: Table((entry.alias, entry) for entry in entries))
        return known[1]

    def refresh(self) -> None:
        """Lists the folders again."""
        with self._lock:
            self._list()

    def _list(self) -> None:
        endings = (*ENDINGS, *PICKLED) if self.allow_pickle else ENDINGS
        self._seen = {}
        # by what the names lead to: one file is one adapter, under the first of its names, however often it is reached
        found: dict[str, Entry] = {}
        for top in self.folders:
            for folder in walk(top):
                self._seen[folder.path] = _changed(folder.path), folder.prefix
                for file, real in folder.files:
                    # a Path costs more than a look at the text; a name that is nothing but an ending has none
                    if file.lower().endswith(endings) and (path := Path(folder.path, file)).suffix:
                        found.setdefault(real, Entry(folder.prefix + path.stem, path))
        kept = _without_less_safe(found.values()) if self.allow_pickle else found.values()
        self._entries = sorted(kept, key=lambda entry: (entry.name.lower(), entry.name))

    def find(self, name: str) -> Entry:
        """By path inside the folder, else by file name, by the alias in the metadata, by hash. Raises UnknownName.

        First by the name as it is, then in the composed form of Unicode, then without blanks at its ends; what is
        written as `%3A` is a colon too. Two files that answer to the same name are an error that names both, never a
        guess. A hash is written as `#` and 8 digits or more, of the whole file's or of its tensors'. It is computed:
        the first time, files are read whole.
        """
        found = self.lookup.find(name)
        if found:
            return only(found, name)
        if _HASH.fullmatch(name.strip()):
            return self._with_hash(name.strip())
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
        why = self.why_absent(name) or near(name, names)
        return f"there is no adapter {name.strip()!r} in {self._places()}{why}"

    def why_absent(self, name: str) -> str:
        """Name the file or folder of that name that is no adapter, as the rest of a sentence; empty where none is."""
        folders = {folder: prefix for folder, (_, prefix) in self._seen.items()}
        return why_absent(name, folders, [entry.name for entry in self.entries])


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


def _without_less_safe(entries: Collection[Entry]) -> list[Entry]:
    """Without pickled files beside a safetensors file of the same name."""
    safe = {entry.path.with_suffix("") for entry in entries if entry.path.suffix.lower() in ENDINGS}
    return [e for e in entries if e.path.suffix.lower() in ENDINGS or e.path.with_suffix("") not in safe]


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
