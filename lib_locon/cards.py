"""What a card shows of an adapter file, and what a click on it writes into the prompt. Knows neither host nor HTML."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib_locon.errors import FileError
from lib_locon.facts import Facts, FactsIndex
from lib_locon.files.reader import FileIdentity
from lib_locon.files.regular import inside
from lib_locon.library import ENOUGH_DIGITS, Entry, Library
from lib_locon.naming import Lookup, Table, fits_into_a_tag, in_a_tag, quoted
from lib_locon.user_metadata import KNOWN_BASES, UserMetadata, read_user_metadata

PICTURES = ("png", "jpg", "jpeg", "webp", "gif")


@dataclass(frozen=True)
class Card:
    """One file. `name` is unique among the cards; `tag` is the name to write, by which a tag finds this very file.

    `facts` is None while its header waits to be read.
    """

    name: str
    tag: str
    path: Path
    identity: FileIdentity
    created: int
    facts: Facts | None
    user: UserMetadata
    preview: Path | None
    names: tuple[str, ...]
    """Every name by which a tag may call the file."""
    hash: str = ""
    """That by which images name it, computed from the file; empty until somebody needed it once."""

    @property
    def family(self) -> str:
        """The families in a word or two, the telling ones: a LoCon has LoRA layers as well."""
        labels = self.facts.families if self.facts else ()
        parts = [label for label in labels if not any(_says_more(other, label) for other in labels)]
        return " + ".join(parts)

    @property
    def rank(self) -> str:
        """Such as `8`, or `4–16`; empty for a family without."""
        ranks = self.facts.ranks if self.facts else None
        if ranks is None:
            return ""
        return f"{ranks[0]}" if ranks[0] == ranks[1] else f"{ranks[0]}–{ranks[1]}"

    @property
    def base(self) -> str:
        """The family of base models: the user's word, else what the tensors say."""
        if self.user.sd_version in KNOWN_BASES:
            return self.user.sd_version
        return self.facts.base if self.facts else ""

    @property
    def problem(self) -> str:
        """Why the file cannot be used."""
        return self.facts.problem if self.facts is not None else ""

    @property
    def search_terms(self) -> tuple[str, ...]:
        """What the search field finds it by, beside its path."""
        facts = self.facts or Facts()
        terms = (*self.names, self.hash, *facts.families, self.base, *facts.triggers)
        return tuple(dict.fromkeys(term for term in terms if term))

    @property
    def sort_keys(self) -> dict[str, int | str]:
        """What the cards can be sorted by."""
        modified = self.identity.mtime_ns // 10**9
        name = self.name.rpartition("/")[2].lower()
        return {"date_created": self.created, "date_modified": modified, "name": name, "path": str(self.path).lower()}


def fits(base: str, model_base: str) -> bool | None:
    """Whether an adapter for `base` is for a model of this family; None where one of them cannot be told."""
    unsure = any(not name or (name.startswith("unknown") and "width" not in name) for name in (base, model_base))
    return None if unsure else base == model_base


class Cards:
    """The cards of a library. `patience` is how many seconds it waits for headers that were not read yet.

    `hash_of` gives the hashes that were computed so far, "" for the others: a listing must not read whole files.
    """

    def __init__(
        self,
        library: Library,
        index: FactsIndex | None = None,
        *,
        patience: float = 5.0,
        hash_of: Callable[[FileIdentity], str] = lambda _: "",
    ) -> None:
        self.library = library
        self.hash_of = hash_of
        self.index = index or FactsIndex(allow_pickle=library.allow_pickle)
        self.patience = patience

    def all(self, *, prefer_alias: bool = True) -> list[Card]:
        """All of them, in the library's order."""
        files = self._files()
        self.index.read((file.identity for file in files), self.patience)
        return self._cards(files, files, prefer_alias)

    def find(self, name: str, *, prefer_alias: bool = True) -> Card | None:
        """The card of that name."""
        files = self._files()
        names = _Names(files)
        wanted = [file for file in files if names.shortest(file.entry) == name]
        self.index.read((file.identity for file in wanted), self.patience)
        return next(iter(self._cards(wanted, files, prefer_alias)), None)

    def read_ahead(self) -> None:
        """Begins to read the headers, in the background."""
        self.index.read(file.identity for file in self._files())

    def _files(self) -> list[_File]:
        return [file for file in map(_File.of, self.library.entries) if file is not None]

    def _cards(self, wanted: Iterable[_File], files: Sequence[_File], prefer_alias: bool) -> list[Card]:
        known = [self.index.known(file.identity) for file in files]
        names = _Names(files, [(facts.alias, file.entry) for facts, file in zip(known, files, strict=True) if facts])
        folders = _Folders()
        sure = prefer_alias and None not in known  # a file that was not read yet may have the same alias
        return [self._card(file, names, folders, sure) for file in wanted]

    def _card(self, file: _File, names: _Names, folders: _Folders, prefer_alias: bool) -> Card:
        entry, facts = file.entry, self.index.known(file.identity)
        alias = facts.alias if facts else ""
        name, digest = names.shortest(entry), self.hash_of(file.identity)
        tag = names.tag(entry, alias if prefer_alias else "", digest)
        return Card(
            name, tag, entry.path, file.identity, file.created, facts,
            folders.user_metadata(entry.path), folders.picture(entry.path),
            tuple(dict.fromkeys(filter(None, (entry.name, entry.stem, alias, tag)))), digest,
        )  # fmt: skip


@dataclass(frozen=True)
class _File:
    entry: Entry
    identity: FileIdentity
    created: int

    @classmethod
    def of(cls, entry: Entry) -> _File | None:
        try:
            return cls(entry, FileIdentity.of(entry.path), int(entry.path.stat().st_ctime))
        except (OSError, FileError):
            return None  # it went away since the folder was listed


class _Names:
    """Which names lead to which file. `aliases` are (alias, file) of the files that were read."""

    def __init__(self, files: Sequence[_File], aliases: Sequence[tuple[str, Entry]] = ()) -> None:
        self._stems = Counter(file.entry.stem for file in files)
        self._paths = Counter(file.entry.name for file in files)
        table = Table(aliases)
        self._lookup = Lookup([(file.entry.name, file.entry) for file in files], lambda: table)

    def shortest(self, entry: Entry) -> str:
        """The file's own name where it alone has that, else with its folder."""
        alone = self._stems[entry.stem] == 1 and (entry.stem == entry.name or entry.stem not in self._paths)
        return entry.stem if alone else entry.name

    def tag(self, entry: Entry, alias: str, digest: str) -> str:
        """The name to write into a tag: the first that fits into one and leads to the file, and to no other."""
        name = self.shortest(entry)
        if alias and fits_into_a_tag(alias) and self._leads_to(entry, alias):
            return alias
        # its shortest name is its alone, but where folders side by side hold files of one path
        if fits_into_a_tag(name) and (name != entry.name or self._paths[name] == 1):
            return name
        for choice in (in_a_tag(name), in_a_tag(entry.name), quoted(entry.name)):
            if self._leads_to(entry, choice):
                return choice
        return f"#{digest[:ENOUGH_DIGITS]}" if digest else in_a_tag(entry.name)

    def _leads_to(self, entry: Entry, name: str) -> bool:
        found = self._lookup.find(name)
        return len(found) == 1 and found[0] is entry


def _says_more(label: str, than: str) -> bool:
    """LoHa Tucker says more than LoHa, and LoCon, a LoRA on convolutions too, more than LoRA."""
    plain = {"LoRA": "LoCon", "DoRA LoRA": "DoRA LoCon"}.get(than, than)
    return label != than and label.startswith((than, plain))


def check_place(picture: Path, folders: Iterable[Path]) -> None:
    """Raises FileError where a new picture would be written out of `folders`, over something else, or into a pipe."""
    target = inside(picture, folders)
    if target.suffix.lower() != picture.suffix.lower():
        raise FileError(f"{picture.name} is a link to {target.name}, so nothing was written through it")
    if target.exists() and not target.is_file():
        raise FileError(f"{picture.name} is there, and is no file but a folder, a pipe or a device")


class _Folders:
    """Looks each folder up once per listing. Works on texts: ten thousand paths have a hundred thousand neighbours."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def picture(self, path: Path) -> Path | None:
        """The preview beside a file: `<file>.png`, `<file>.preview.png`, and so on."""
        names, stem = self._beside(path), path.stem
        wanted = (f"{stem}{middle}.{ending}" for ending in PICTURES for middle in ("", ".preview"))
        there = (path.with_name(name) for name in wanted if name in names)
        return next((picture for picture in there if picture.is_file()), None)  # no pipe: the host would wait for it

    def user_metadata(self, path: Path) -> UserMetadata:
        """What stands in the JSON beside a file."""
        return read_user_metadata(path) if f"{path.stem}.json" in self._beside(path) else UserMetadata()

    def _beside(self, path: Path) -> frozenset[str]:
        folder = os.path.dirname(path)  # noqa: PTH120  a text, see above
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))  # noqa: PTH208  names alone, in one call
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]
