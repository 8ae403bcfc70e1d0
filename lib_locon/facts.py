"""What the headers of many adapter files say: small, plain data per file, kept as long as the file does not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from lib_locon.errors import LoconError
from lib_locon.files.adapter import read_adapter
from lib_locon.files.background import Background
from lib_locon.files.pickled import open_adapter
from lib_locon.files.reader import FileIdentity
from lib_locon.models.base_family import base_family
from lib_locon.untrusted_json import parse_readable

MOST_TRIGGERS = 24
MOST_LETTERS = 1000
"""Of a word or a name in the metadata that a page shows; a longer one is none, and a page of them would not open."""
COVERS = "ssmd_cover_images"


@dataclass(frozen=True)
class Facts:
    """One file. `ranks` are the lowest and the highest; `unread` counts the keys that are not understood.

    `problem` is why the file cannot be used; all else is then empty. `triggers` are the words that the trainer's
    captions held most often.
    """

    alias: str = ""
    families: tuple[str, ...] = ()
    ranks: tuple[int, int] | None = None
    base: str = ""
    unread: int = 0
    triggers: tuple[str, ...] = ()
    claimed_hash: str = ""
    """What the file says of itself: a hint where to look first, never a proof, and never shown."""
    has_metadata: bool = False
    has_cover: bool = False
    problem: str = ""


def read_facts(path: Path, *, allow_pickle: bool = False, identity: FileIdentity | None = None) -> Facts:
    """Reads the header of one file (and its alphas). With an `identity`, of no other file that took its place."""
    try:
        adapter = read_adapter(path, header_only=True, allow_pickle=allow_pickle)
        (identity or adapter.identity).check(adapter.identity)
    except LoconError as error:
        return Facts(problem=str(error))
    layers = [layer for module in adapter.modules for layer in module.layers]
    ranks = [rank for rank in (layer.family.rank for layer in layers) if rank]
    metadata = adapter.metadata
    return Facts(
        alias=_text(metadata.get("ss_output_name")),
        families=tuple(label for label, _ in Counter(layer.label for layer in layers).most_common()),
        ranks=(min(ranks), max(ranks)) if ranks else None,
        base=base_family(adapter),
        unread=len(adapter.unknown) + sum(len(module.unread) for module in adapter.modules),
        triggers=tuple(word for word, _ in training_words(metadata)[:MOST_TRIGGERS]),
        claimed_hash=_text(metadata.get("sshs_model_hash")),
        has_metadata=bool(metadata),
        has_cover=any(_cover_images(metadata)),
    )


def training_words(metadata: Mapping[str, str]) -> list[tuple[str, int]]:
    """The tags of the training captions and how often each was there, the commonest first."""
    return counted_words(parsed(metadata.get("ss_tag_frequency", "")))


def counted_words(folders: Any) -> list[tuple[str, int]]:
    """The same from what the metadata's `ss_tag_frequency` holds: folder → tag → count."""
    counted: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if is_count(count) and tag.strip() and len(tag) <= MOST_LETTERS:
                counted[tag.strip()] += count
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))


def is_count(value: object) -> TypeGuard[int]:
    """Tell whether a value of the metadata can be a number of pictures: sums of longer numbers cannot be printed."""
    return isinstance(value, int) and abs(value) < 1 << 63


def parsed(text: str) -> Any:
    """A value of the metadata as the webui hands it on: JSON where it is a table or a list, else the text."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return parse_readable(text)
    except ValueError:
        return text


class FileMetadata(Mapping[str, Any]):
    """A file's own metadata, read when somebody asks: captions' statistics of ten thousand files fill a computer."""

    def __init__(self, identity: FileIdentity, *, allow_pickle: bool = False) -> None:
        self._identity = identity
        self._allow_pickle = allow_pickle

    def __getitem__(self, key: str) -> Any:
        # the pictures stay a text: the host reads that one itself
        text = self._texts[key]
        return text if key == COVERS else parsed(text)

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __bool__(self) -> bool:
        """Made for files that have some; the host asks this of every card, and it must not read them all."""
        return True

    @property
    def _texts(self) -> Mapping[str, str]:
        return _metadata(self._identity, self._allow_pickle)


@lru_cache(maxsize=4)
def _metadata(identity: FileIdentity, allow_pickle: bool) -> Mapping[str, str]:
    try:
        file = open_adapter(Path(identity.path), allow_pickle)
        identity.check(file.identity)
    except LoconError:
        return {}
    return file.metadata


class FactsIndex(Background[Facts]):
    """Facts by file identity. Reading a header takes milliseconds, and some collections have ten thousand."""

    def __init__(
        self,
        store: MutableMapping[FileIdentity, Facts] | None = None,
        *,
        allow_pickle: bool = False,
        rested: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(self._read, store, rested, "locon-headers")
        self.allow_pickle = allow_pickle

    def _read(self, identity: FileIdentity) -> Facts:
        try:
            return read_facts(Path(identity.path), allow_pickle=self.allow_pickle, identity=identity)
        except Exception as error:  # noqa: BLE001  one strange file must not hide all that come after it; its card says so
            return Facts(problem=f"an error in sd-webui-locon itself: {type(error).__name__}: {error}")


def _cover_images(metadata: Mapping[str, str]) -> list[Any]:
    images = parsed(metadata.get(COVERS, ""))
    return images if isinstance(images, list) else []


def _text(value: str | None) -> str:
    return "" if value in (None, "None") or len(value) > MOST_LETTERS else value
