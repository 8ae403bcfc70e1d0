"""Names as people and tags write them, and which file a name means. Reads no file.

Three spellings of a name are compared, one after the other: as it is; in one form of Unicode (macOS stores é as two
letters, keyboards write one); and without blanks at the ends of its parts. Besides, a name may be quoted as in an
address, `%3A` for a colon: so that a tag can hold any.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar
from urllib.parse import unquote

T = TypeVar("T")
Spelling = Callable[[str], str]
# `:` and `>` end a name in a tag; a text box changes line ends; half a letter (a byte of a name that is no Unicode
# text) does not come back from a browser
_UNFIT = re.compile(r"[:>\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def as_it_is(name: str) -> str:
    """The name itself."""
    return name


def composed(name: str) -> str:
    """The name in Unicode's composed form."""
    return unicodedata.normalize("NFC", name)


def tidy(name: str) -> str:
    """Composed, and without blanks at the ends of the file's name and of its folders' names."""
    return "/".join(part.strip() for part in composed(name).split("/"))


_SPELLINGS: tuple[Spelling, ...] = (as_it_is, composed, tidy)


def fits_into_a_tag(name: str) -> bool:
    """Tell whether a tag can hold the name as it is, and a prompt box and an image's text keep it so."""
    return bool(name.strip()) and not _UNFIT.search(name)


def in_a_tag(name: str) -> str:
    """The name as a tag can hold it: quoted, as in an address, where it must be."""
    if fits_into_a_tag(name):
        return name
    text = _UNFIT.sub(lambda found: quoted(found[0]), name.replace("%", quoted("%")))
    return text if text.strip() else quoted(name)


def quoted(name: str) -> str:
    """Every letter of it as `%` and digits: a spelling that hardly any file has for its own name."""
    try:
        letters = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # Windows allows halves of letters that Linux has no bytes for
        letters = name.encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in letters)


class Table(Generic[T]):
    """Name → the things called so, in each of the spellings; one is made when it is asked for."""

    def __init__(self, pairs: Iterable[tuple[str, T]]) -> None:
        self._pairs = list(pairs)
        self._by_spelling: dict[Spelling, dict[str, list[T]]] = {}

    def find(self, name: str, spelling: Spelling) -> Sequence[T]:
        """Those whose name is `name` in that spelling. None is called by no letter at all."""
        if spelling not in self._by_spelling:
            table: dict[str, list[T]] = {}
            for known, item in self._pairs:
                table.setdefault(spelling(known), []).append(item)
            self._by_spelling[spelling] = table
        wanted = spelling(name)
        return self._by_spelling[spelling].get(wanted, ()) if wanted else ()


class Lookup(Generic[T]):
    """Which things a name means. `paths` are (path inside the adapter folder, thing).

    `aliases` gives those by the trainers' names. It is asked at each search that comes so far: these may change while
    the paths do not.
    """

    def __init__(self, paths: Iterable[tuple[str, T]], aliases: Callable[[], Table[T]]) -> None:
        pairs = list(paths)
        self._paths = Table(pairs)
        self._stems = Table((path.rpartition("/")[2], item) for path, item in pairs)
        self._aliases = aliases

    def find(self, name: str) -> Sequence[T]:
        """The things that the name means: one, several that answer to it equally well, or none."""
        return next(filter(None, self._answers(name)), ())

    def files(self, name: str) -> Sequence[T]:
        """The same without the trainers' names."""
        return next(filter(None, (*self._exactly(name), *self._nearly(name))), ())

    def _answers(self, name: str) -> Iterator[Sequence[T]]:
        yield from self._exactly(name)
        aliases = None
        if name == tidy(name):  # one with blanks at its ends is mostly a file's: no headers are read for it yet
            aliases = self._aliases()
            yield aliases.find(name, as_it_is)
        yield from self._nearly(name)
        aliases = aliases or self._aliases()
        for spelling in _SPELLINGS:
            yield aliases.find(name, spelling)

    def _exactly(self, name: str) -> Iterator[Sequence[T]]:
        return self._of_files(name, _SPELLINGS[:1])

    def _nearly(self, name: str) -> Iterator[Sequence[T]]:
        return self._of_files(name, _SPELLINGS[1:])

    def _of_files(self, name: str, spellings: Sequence[Spelling]) -> Iterator[Sequence[T]]:
        for spelling in spellings:
            for each in dict.fromkeys((name, unquote(name, errors="surrogateescape"))):
                yield self._paths.find(each, spelling)
                yield self._stems.find(each, spelling)


def look_alike(names: Sequence[str]) -> bool:
    """Tell whether two different ones cannot be told apart by eye."""
    return len(set(map(tidy, names))) < len(set(names))
