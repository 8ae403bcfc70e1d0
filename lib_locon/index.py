"""What is known of files, kept on disk: a list of ten thousand adapters comes up without reading one of them.

It is a cache and no more. A file that is damaged or of another version is begun anew; one that is locked or cannot be
written is not used. Either way the log says so once, and everything works as without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from lib_locon.facts import Facts
from lib_locon.files.reader import FileIdentity

log = logging.getLogger("lib_locon")
T = TypeVar("T")
TIMEOUT = 0.5
"""Seconds for another process to finish its writing."""
BATCH = 200
"""Values that are written together: each transaction waits for the disk."""


class DiskTable(MutableMapping[FileIdentity, T], Generic[T]):
    """Values by file identity: one per path, the one of the file as it was last.

    `version` says what the values were made by: those of another version count as not there. `encode` gives None for
    what is not worth keeping, `decode` None for what it cannot read.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        version: str,
        encode: Callable[[T], str | None],
        decode: Callable[[str], T | None],
    ) -> None:
        self._path = path
        self._name = name
        self._version = version
        self._encode, self._decode = encode, decode
        self._lock = threading.RLock()
        self._values: dict[FileIdentity, T] = {}
        self._texts: dict[FileIdentity, str] = {}
        """As they stand in the file; decoded when they are asked for."""
        self._unwritten: dict[FileIdentity, str] = {}
        self._database: sqlite3.Connection | None = None
        self._database = self._opened()

    def __getitem__(self, identity: FileIdentity) -> T:
        with self._lock:
            if identity not in self._values:
                value = self._decode(self._texts.pop(identity))  # KeyError where there is none: a mapping's way
                if value is None:
                    raise KeyError(identity)
                self._values[identity] = value
            return self._values[identity]

    def __setitem__(self, identity: FileIdentity, value: T) -> None:
        with self._lock:
            self._values[identity] = value
            text = self._encode(value) if self._database is not None and _is_text(identity.path) else None
            if text is not None:
                self._unwritten[identity] = text
                if len(self._unwritten) >= BATCH:
                    self.flush()

    def __delitem__(self, identity: FileIdentity) -> None:
        with self._lock:
            known = [table.pop(identity, None) for table in (self._values, self._texts, self._unwritten)]
            if known == [None, None, None]:
                raise KeyError(identity)

    def __contains__(self, identity: object) -> bool:
        with suppress(KeyError):
            return isinstance(identity, FileIdentity) and self[identity] is not None
        return False

    def __iter__(self) -> Iterator[FileIdentity]:
        with self._lock:
            return iter([*self._values, *self._texts])

    def __len__(self) -> int:
        return len(self._values) + len(self._texts)

    def flush(self) -> None:
        """Writes what is not on disk yet. Never raises."""
        with self._lock:
            rows = [(*identity, self._version, text) for identity, text in self._unwritten.items()]
            self._unwritten.clear()
            if self._database is None or not rows:
                return
            try:
                with self._database:
                    self._database.executemany(f"INSERT OR REPLACE INTO {self._name} VALUES (?, ?, ?, ?, ?, ?)", rows)
            except sqlite3.Error as error:
                self._give_up(error)

    def close(self) -> None:
        """Writes what is left, and closes the file; what is known stays known."""
        with self._lock:
            self.flush()
            if self._database is not None:
                self._database.close()
                self._database = None

    def _opened(self) -> sqlite3.Connection | None:
        try:
            try:
                return self._read()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise  # locked, or not to be opened: it may be sound, and another process's
                log.info("%s is damaged (%s) and is begun anew", self._path, error)
                self._texts.clear()
                self._path.unlink()
                return self._read()
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)
            return None

    def _read(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, timeout=TIMEOUT, check_same_thread=False)
        try:
            database.execute("PRAGMA synchronous = OFF")  # it is a cache: waiting for the disk would buy nothing
            with database:
                database.execute(
                    f"CREATE TABLE IF NOT EXISTS {self._name} (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, "
                    "config_ns INTEGER, version TEXT, value TEXT)"
                )
                database.execute(f"DELETE FROM {self._name} WHERE version <> ?", (self._version,))
            rows = database.execute(f"SELECT path, size, mtime_ns, config_ns, value FROM {self._name}")
            self._texts = {FileIdentity(*row[:4]): row[4] for row in rows}
        except BaseException:
            database.close()
            raise
        return database

    def _give_up(self, error: Exception) -> None:
        log.warning("%s is not used, so adapters are read anew at the next start: %s", self._path, error)
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
        self._database = None
        self._unwritten.clear()


def facts_table(path: Path, *, allow_pickle: bool) -> DiskTable[Facts]:
    """The cards' facts. Kept apart for both ways of reading: what one can read may be a problem to the other."""
    return DiskTable(path, "facts_pickle" if allow_pickle else "facts", code_version(), _encoded, _decoded)


def hash_table(path: Path) -> DiskTable[str]:
    """The hashes of whole files."""
    return DiskTable(path, "hashes", "sha256", lambda value: value or None, _hash)


@cache
def code_version() -> str:
    """Of all that facts are made by: a new version of us may read more in the same file."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        if "hosts" not in file.relative_to(package).parts:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _encoded(facts: Facts) -> str | None:
    if facts.problem:
        return None  # it may be a disk that was not there: the next start tries again
    return json.dumps({name: value for name in _NAMES if (value := getattr(facts, name))})


def _decoded(text: str) -> Facts | None:
    try:
        found: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
        }
        return Facts(**found)
    except (ValueError, TypeError, AttributeError):
        return None


def _hash(text: str) -> str | None:
    return text if isinstance(text, str) and len(text) == hashlib.sha256().digest_size * 2 else None


def _is_text(path: str) -> bool:
    """Linux allows names that are none; the database does not."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


_NAMES = tuple(field.name for field in fields(Facts))
