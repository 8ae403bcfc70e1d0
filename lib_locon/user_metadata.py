"""What the user wrote about an adapter: the `.json` beside the file, in the webui's own words for its keys."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lib_locon.errors import FileError
from lib_locon.files.regular import inside, read_regular
from lib_locon.untrusted_json import parse, parse_readable

MAX_USER_METADATA = 1_000_000
"""Bytes of a `<file>.json`; a larger one is no user's notes."""
MOST_WEIGHT = 1e30
"""A preferred weight beyond it is no weight."""
KNOWN_BASES = ("SD1", "SD2", "SDXL")
UNKNOWN = "Unknown"
"""What the webui's editor lets the user choose as "sd version", and that nobody chose."""
_SAVING = threading.Lock()
"""Two windows may save at the same time: neither must write back what the other has just replaced."""


@dataclass(frozen=True)
class UserMetadata:
    """`raw` is all of the file, also what we do not know."""

    description: str = ""
    activation_text: str = ""
    negative_text: str = ""
    preferred_weight: float = 0.0
    notes: str = ""
    sd_version: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: object) -> UserMetadata:
        """From the JSON. A value of another type than the webui's editor writes counts as not there."""
        raw = data if isinstance(data, dict) else {}

        def text(key: str) -> str:
            return raw[key] if isinstance(raw.get(key), str) else ""

        weight = raw.get("preferred weight")
        # not isfinite: JSON has integers that no float can hold, and it raises for them
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and abs(weight) <= MOST_WEIGHT
        return cls(
            description=text("description"),
            activation_text=text("activation text"),
            negative_text=text("negative text"),
            preferred_weight=float(weight or 0) if is_number else 0.0,
            notes=text("notes"),
            sd_version=text("sd version"),
            raw=raw,
        )

    @property
    def written(self) -> dict[str, str | float]:
        """What the editor shows, under the keys of the file."""
        return {
            "description": self.description,
            "activation text": self.activation_text,
            "negative text": self.negative_text,
            "preferred weight": self.preferred_weight,
            "notes": self.notes,
            "sd version": self.sd_version or UNKNOWN,
        }


def read_user_metadata(path: Path) -> UserMetadata:
    """What stands in the JSON beside the adapter at `path`; nothing where that cannot be read."""
    try:
        return UserMetadata.of(_read(path.with_suffix(".json"), parse_readable))
    except (FileError, ValueError):
        return UserMetadata()  # no file, one that the user is writing, or one that is not meant for us


def changed(before: Mapping[str, str | float], given: Mapping[str, Any]) -> dict[str, str | float]:
    """What the user changed: what somebody else wrote meanwhile into other fields stays. Raises ValueError."""
    found: dict[str, str | float] = {}
    for key, value in given.items():
        if key == "preferred weight":
            weight = _number(value)
            if weight != before[key]:
                found[key] = weight
        else:
            text = str(value or "")
            # a browser gives every end of a line as \n
            if text != str(before[key]).replace("\r\n", "\n").replace("\r", "\n"):
                found[key] = text
    return found


def _number(value: Any) -> float:
    try:
        weight = float(value or 0)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not abs(weight) <= MOST_WEIGHT:  # NaN neither
        raise ValueError("the preferred weight must be a number")
    return weight


def save_user_metadata(path: Path, changes: Mapping[str, str | float], folders: Iterable[Path] = ()) -> None:
    """Puts `changes` into the JSON beside the adapter at `path`; every other key stays as the file has it by now.

    A link stays one, and leads to what is new, as long as that lies in the adapter's folder or one of `folders`.

    Raises FileError and leaves the file as it was: where what stands there is no JSON object (it is somebody's all the
    same), where it would be too long to be read again, and where it cannot be written.
    """
    if not changes:
        return
    file = inside(path.with_suffix(".json"), (path.parent, *folders))
    with _SAVING:
        content = {**_kept(file), **changes}
        try:
            json.dumps(changes, ensure_ascii=False).encode("utf8")  # raises for half letters
            try:
                new = json.dumps(content, indent=4, ensure_ascii=False).encode("utf8")
            except UnicodeEncodeError:  # another program wrote halves: they stay as it wrote them
                new = json.dumps(content, indent=4).encode("utf8")
            if len(new) > MAX_USER_METADATA:
                size = f"{len(new)} bytes, and {MAX_USER_METADATA} are the most"
                raise ValueError(f"it would have {size}; shorten the notes")
            _replace(file, new)
        except (OSError, ValueError, RecursionError) as error:
            raise FileError(f"{file.name} could not be written, and is as it was: {error}") from error


def _read(file: Path, parse: Callable[[str], Any]) -> Any:
    """The value of the JSON; editors of Windows put a mark before it. Raises FileError and ValueError."""
    return parse(read_regular(file, MAX_USER_METADATA).decode("utf-8-sig"))


def _kept(file: Path) -> dict[str, Any]:
    if not os.path.lexists(file):
        return {}
    try:
        found = _read(file, partial(parse, pairs=_once))
    except (FileError, ValueError) as error:
        why = f"{file.name} is there and cannot be read as JSON, so nothing was written into it: {error}"
        raise FileError(why) from error
    if not isinstance(found, dict):
        raise FileError(f"{file.name} is there and holds something else than notes, so nothing was written into it")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises ValueError for a key that is there twice: only one of its values could be written again."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has {twice[:40]!r} more than once")
    return found


def _replace(file: Path, content: bytes) -> None:
    """All or nothing: a computer that stops half way leaves the old file."""
    # a rename asks for no right to the file itself: without this, one that the user protected would be replaced
    if file.exists() and not file.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("it is read-only")
    new = file.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with new.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(file, new)
        new.replace(file)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
