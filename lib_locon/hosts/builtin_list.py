"""The adapters as the built-in lists them for programs: the same keys, with the same meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from lib_locon.errors import LoconError
from lib_locon.files.pickled import open_adapter
from lib_locon.library import Entry, Library
from lib_locon.untrusted_json import parse_readable

_FIRST = ("ss_sd_model_name", "ss_resolution", "ss_clip_skip", "ss_num_train_images", "ss_tag_frequency")
"""Keys that the built-in puts before all others: its page shows them in this order."""


class BuiltinItem(TypedDict):
    """An adapter as the built-in lists it."""

    name: str
    alias: str
    path: str
    metadata: dict[str, Any]


def builtin_list(library: Library, *, full_paths: bool = False) -> list[BuiltinItem]:
    """All of them. `path` begins at the adapter folder, where it is not the full one.

    A file's own name is its name, but the built-in drops all but one of those that are called the same: here these are
    called by their paths.
    """
    stems = Counter(entry.stem for entry in library.entries)
    return [
        _item(entry, entry.stem if stems[entry.stem] == 1 else entry.name, library.allow_pickle, full_paths)
        for entry in library.entries
    ]


def _item(entry: Entry, name: str, allow_pickle: bool, full_path: bool) -> BuiltinItem:
    metadata = _metadata(entry.path, allow_pickle)
    path = entry.full_path if full_path else entry.file
    return {"name": name, "alias": str(metadata.get("ss_output_name", name)), "path": path, "metadata": metadata}


def _metadata(path: Path, allow_pickle: bool) -> dict[str, Any]:
    try:
        written = open_adapter(path, allow_pickle).metadata
    except LoconError:
        return {}  # it went away since the folder was listed, or is no adapter
    keys = sorted(written, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
    return {key: _value(written, key) for key in keys}


def _value(written: Mapping[str, str], key: str) -> Any:
    """A table is read; a list stays the text that it is, as programs know it from the built-in."""
    text = written[key]
    try:
        return parse_readable(text) if text.startswith("{") else text
    except ValueError:
        return text
