"""The adapter files under the built-in's names: what `networks.available_networks` and its like hold."""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lib_locon.errors import LoconError
from lib_locon.facts import FileMetadata, read_facts
from lib_locon.files.hashes import hashes_of
from lib_locon.files.reader import FileIdentity
from lib_locon.library import Entry, Library

SHORT = 12


class SdVersion(enum.Enum):
    """What a file is for."""

    Unknown = 1
    SD1 = 2
    SD2 = 3
    SDXL = 4


class NetworkOnDisk:
    """An adapter file. Its header is read when somebody asks for what stands there."""

    def __init__(self, name: str, filename: str, hash_of: Callable[[FileIdentity], str] = lambda _: "") -> None:
        self.name = name
        self.filename = filename
        self._hash_of = hash_of
        self._hash = ""
        self.is_safetensors = Path(filename).suffix.lower() == ".safetensors"

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the trainer wrote."""
        try:
            return dict(FileMetadata(FileIdentity.of(Path(self.filename)), allow_pickle=False))
        except LoconError:
            return {}

    @cached_property
    def alias(self) -> str:
        """The name that the trainer gave it, else the file's."""
        return str(self.metadata.get("ss_output_name") or self.name)

    @property
    def hash(self) -> str:
        """Computed, as `read_hash` or the first image with the file does; empty before: what it claims is no proof."""
        try:
            return self._hash or self._hash_of(FileIdentity.of(Path(self.filename)))
        except LoconError:
            return ""  # it went away

    @property
    def shorthash(self) -> str:
        """Its first 12 digits."""
        return self.hash[:SHORT]

    @cached_property
    def sd_version(self) -> SdVersion:
        """From the tensors' sizes."""
        return SdVersion.__members__.get(read_facts(Path(self.filename)).base, SdVersion.Unknown)

    def set_hash(self, value: str) -> None:
        """Somebody else computed it."""
        self._hash = value

    def read_hash(self) -> None:
        """Computes it from the file."""
        try:
            hashes = hashes_of(FileIdentity.of(Path(self.filename)))
        except LoconError:
            return
        self._hash = hashes.body or hashes.file

    def get_alias(self) -> str:
        """The name to write into a prompt."""
        from modules import shared  # only inside the host

        by_file = getattr(shared.opts, "lora_preferred_name", "") == "Filename"
        forbidden = importlib.import_module("networks").forbidden_network_aliases  # whoever owns that name
        return self.name if by_file or self.alias.lower() in forbidden else self.alias


class Files:
    """The library's files as objects, made once per listing of the folders."""

    def __init__(self, library: Callable[[], Library], hash_of: Callable[[FileIdentity], str]) -> None:
        self._library = library
        self._hash_of = hash_of
        self._entries: list[Entry] | None = None
        self._known: dict[Path, NetworkOnDisk] = {}
        self._names: dict[str, NetworkOnDisk] = {}
        self._aliases: dict[str, NetworkOnDisk] = {}
        self._shared: dict[str, int] = {}

    def by_name(self) -> dict[str, NetworkOnDisk]:
        """File name → object; a name that two files have stands there with its folder."""
        entries = self._library().entries
        if entries is not self._entries:
            known = {
                entry.path: self._known.get(entry.path) or NetworkOnDisk(entry.stem, str(entry.path), self._hash_of)
                for entry in entries
            }
            self._known, self._entries = known, entries
            self._aliases, self._shared = {}, {}
            stems: dict[str, list[Entry]] = {}
            for entry in entries:
                stems.setdefault(entry.stem, []).append(entry)
            self._names = {
                stem if len(same) == 1 else entry.name: known[entry.path]
                for stem, same in stems.items()
                for entry in same
            }
        return self._names

    def by_alias(self) -> dict[str, NetworkOnDisk]:
        """The same, and the trainers' names; reads headers."""
        names = self.by_name()
        self._aliases = self._aliases or {**{file.alias: file for file in names.values()}, **names}
        return self._aliases

    def shared_aliases(self) -> dict[str, int]:
        """Names, in lower case, that the webui must not write into a prompt: more than one file answers to them."""
        names = self.by_name()
        if not self._shared:
            seen: dict[str, str] = {}
            self._shared = {"none": 1, "Addams": 1}
            for name, file in names.items():
                for known in {name, file.alias}:
                    if seen.setdefault(known, file.filename) != file.filename:
                        self._shared[known.lower()] = 1
        return self._shared

    def by_hash(self) -> dict[str, NetworkOnDisk]:
        """The first 12 digits of the hash → object, for the files whose hash was computed."""
        return {file.shorthash: file for file in self.by_name().values() if file.shorthash}

    def refresh(self) -> None:
        """Lists the folders again, and looks into the files again."""
        self._known, self._entries = {}, None
        self._library().refresh()


class Live(Mapping[str, Any]):
    """A table that is looked up anew at each use."""

    def __init__(self, table: Callable[[], Mapping[str, Any]]) -> None:
        self._table = table

    def __getitem__(self, key: str) -> Any:
        return self._table()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())

    def __repr__(self) -> str:
        return repr(dict(self._table()))
