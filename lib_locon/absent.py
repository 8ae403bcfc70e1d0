"""Why a name leads to no adapter although something of that name is there: a download that stopped, another format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from lib_locon.files.kinds import ARCHIVE
from lib_locon.files.pickled import ENDINGS as PICKLED
from lib_locon.files.pickled import OFF
from lib_locon.naming import tidy

_UNFINISHED = "is a download that has not finished: wait for its end, or begin it anew"
_FOR_OTHERS = "is for another program than this one: get the adapter as .safetensors"
_WITHOUT_WEIGHTS = "is there, but the weights that it is about are not: get the .safetensors file too"
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(PICKLED, f"is there, but it {OFF}"),
    **dict.fromkeys(
        (".pth", ".pkl"),
        "is there, but of the pickled files only those that end in .pt, .ckpt or .bin can be read: convert it to "
        "safetensors",
    ),
    ".gguf": "is there, but GGUF files are not read here: get the adapter as .safetensors",
    **dict.fromkeys((".onnx", ".trt", ".engine", ".lora", ".msgpack", ".h5"), f"is there, but it {_FOR_OTHERS}"),
    **dict.fromkeys((".zip", ".rar", ".7z", ".tar", ".gz", ".tgz"), f"is there, but it {ARCHIVE}"),
    ".safetensors.txt": "is there: take the .txt off the end of its name",
    ".safetensor": "is there: its ending must be .safetensors",
    **dict.fromkeys(
        (".part", ".partial", ".crdownload", ".download", ".opdownload", ".incomplete", ".tmp", ".aria2", ".!ut"),
        f"is there, but it {_UNFINISHED}",
    ),
    **dict.fromkeys(
        (".json", ".civitai.info", ".preview.png", ".preview.jpg", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".txt"),
        _WITHOUT_WEIGHTS,
    ),
}
"""By ending, in lower case, the most telling ones first."""
_RANKS = {ending: rank for rank, ending in enumerate(_REASONS)}


def why_absent(name: str, folders: Mapping[str, str], adapters: Sequence[str]) -> str:
    """The rest of a sentence about a name that no adapter has; empty where nothing else of that name is there.

    `folders` are those to look into, with what stands before the names in each; `adapters` the names that there are.
    """
    wanted = tidy(name)
    if not wanted:
        return ""
    found = min(_of_that_name(wanted, folders), default=None)
    if found is not None:
        return f": {found[1]} {_REASONS[found[2]]}"
    within = next((known for known in adapters if tidy(known).startswith(f"{wanted}/")), None)
    return f": that is a folder; name the file in it, such as {within!r}" if within is not None else ""


def _of_that_name(wanted: str, folders: Mapping[str, str]) -> Iterator[tuple[int, str, str]]:
    """(rank of the ending, file, ending)."""
    for folder, prefix in folders.items():
        with suppress(OSError):
            for file in os.listdir(folder):  # noqa: PTH208  names alone, in one call
                ending = _ending(file)
                if ending and wanted in _names(prefix, file[: -len(ending)]):
                    yield _RANKS[ending], prefix + file, ending


def _ending(file: str) -> str:
    """That of the longest ending that is known, in lower case."""
    parts = file.lower().split(".")
    return next((end for count in (2, 1) if (end := f".{'.'.join(parts[-count:])}") in _REASONS), "")


def _names(prefix: str, stem: str) -> tuple[str, ...]:
    """The names that a tag would call a file by if it were an adapter."""
    whole = [stem, *(stem[: -len(end)] for end in (".safetensors", *PICKLED) if stem.lower().endswith(end))]
    return tuple(spelt for each in whole for spelt in (tidy(prefix + each), tidy(each)))
