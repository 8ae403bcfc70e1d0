"""What is known of files, kept on disk: a list of ten thousand adapters comes up without reading one of them.

It is a cache and no more. A file that is damaged or of another form is begun anew; one that is locked or cannot be
written is not used. Either way the log says so once, and everything works as without it. Several processes may share
one file: each sees what was there when it started, and what one writes is there for all at their next start.
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
from lib_locon.untrusted_json import parse_readable

log = logging.getLogger("lib_locon")
T = TypeVar("T")
TIMEOUT = 0.5
"""Seconds for another process to finish its writing."""
BATCH = 200
"""Values that are written together, where a few that are lost with the process cost little."""
_BESIDE = ("-journal", "-wal", "-shm")
_COLUMNS = {
    "path": "TEXT",
    "size": "INTEGER",
    "mtime_ns": "INTEGER",
    "config_ns": "INTEGER",
    "version": "TEXT",
    "value": "TEXT",
}


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
        batch: int = BATCH,
    ) -> None:
        self._path = path
        self._name = name
        self._version = version
        self._encode, self._decode = encode, decode
        self._batch = batch
        self._lock = threading.RLock()
        self._values: dict[FileIdentity, T] = {}
        self._texts: dict[FileIdentity, str] = {}
        """As they stand in the file; decoded when they are asked for."""
        self._unwritten: dict[FileIdentity, str] = {}
        self._was_locked = False
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
                if len(self._unwritten) % self._batch == 0:
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
        """Writes what is not on disk yet. Never raises; what a lock keeps out is written the next time."""
        with self._lock:
            rows = [(*identity, self._version, text) for identity, text in self._unwritten.items()]
            if self._database is None or not rows:
                return
            try:
                with self._database:
                    self._database.executemany(f"INSERT OR REPLACE INTO {self._name} VALUES (?, ?, ?, ?, ?, ?)", rows)
                self._unwritten.clear()
            except (sqlite3.Error, OverflowError) as error:  # the latter: a time of change that no database holds
                if "locked" in str(error):
                    log.log(logging.DEBUG if self._was_locked else logging.INFO, "%s waits: %s", self._path, error)
                    self._was_locked = True
                    return
                self._give_up(error)
                if _is_damage(error):
                    with suppress(OSError):
                        self._remove()  # it could be read, so the next start would not see the damage

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
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise  # locked, or not to be opened: it may be sound, and another process's
                log.info("%s is damaged (%s) and is begun anew", self._path, error)
                self._texts.clear()
                self._remove()
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
                found = [row[1:3] for row in database.execute(f"PRAGMA table_info({self._name})")]
                if found and found != list(_COLUMNS.items()):
                    database.execute(f"DROP TABLE {self._name}")  # of another form than ours
                columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
                database.execute(f"CREATE TABLE IF NOT EXISTS {self._name} ({columns}, PRIMARY KEY (path))")
                database.execute(f"DELETE FROM {self._name} WHERE version <> ?", (self._version,))
            rows = database.execute(
                f"SELECT path, size, mtime_ns, config_ns, value FROM {self._name} WHERE version = ?",
                (self._version,),  # another process, of another version of us, may write meanwhile
            )
            self._texts = {FileIdentity(*row[:4]): row[4] for row in rows}
        except BaseException:
            database.close()
            raise
        return database

    def _remove(self) -> None:
        # with a journal that was left behind: it would be played back into the next file of the name
        for file in (self._path, *(self._path.with_name(f"{self._path.name}{end}") for end in _BESIDE)):
            file.unlink(missing_ok=True)

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
    """The hashes of whole files. Each is written at once: it may have taken a minute."""
    return DiskTable(path, "hashes", "sha256", lambda value: value or None, _hash, batch=1)


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
    return json.dumps({name: getattr(facts, name) for name in _NAMES})


def _decoded(text: str) -> Facts | None:
    try:
        found: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in parse_readable(text).items()
        }
        facts = Facts(**found)
    except (ValueError, TypeError, AttributeError):
        return None
    if found.keys() != set(_NAMES):
        return None  # of what is missing, the default would be shown for a fact
    return facts if all(_sound(getattr(facts, name), default) for name, default in _DEFAULTS.items()) else None


def _sound(value: object, default: object) -> bool:
    """Whether a value is of its field's kind: a cache on a disk may hold anything."""
    if default is None:
        return value is None or (isinstance(value, tuple) and len(value) == 2 and all(type(n) is int for n in value))
    words = value if isinstance(value, tuple) else ()
    return type(value) is type(default) and all(isinstance(word, str) for word in words)


def _hash(text: str) -> str | None:
    return text if isinstance(text, str) and len(text) == hashlib.sha256().digest_size * 2 else None


def _is_damage(error: Exception) -> bool:
    """Whether the file itself is at fault, so that a new one would do better: all else is of a class below this one."""
    return type(error) is sqlite3.DatabaseError


def _is_text(path: str) -> bool:
    """Linux allows names that are none; the database does not."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


_NAMES = tuple(field.name for field in fields(Facts))
_DEFAULTS = {field.name: field.default for field in fields(Facts)}
