"""Block weights: a ratio for each block of the model. Lists, layouts and letters are lora-block-weight's."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from lib_locon.prompt.numbers import BadValue, parse_number, written

BASE, MID, CLIP, T5 = "BASE", "MID", "CLIP", "T5"


def _numbered(name: str, numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"{name}{number:02}" for number in numbers)


SD = (BASE, *_numbered("IN", range(12)), MID, *_numbered("OUT", range(12)))
FLUX = (CLIP, T5, "IN", *_numbered("D", range(19)), *_numbered("S", range(38)), "OUT")
LAYOUTS: dict[int, tuple[str, ...]] = {
    12: (BASE, *_numbered("IN", (4, 5, 7, 8)), MID, *_numbered("OUT", range(6))),
    17: (BASE, *_numbered("IN", (1, 2, 4, 5, 7, 8)), MID, *_numbered("OUT", range(3, 12))),
    20: (BASE, *_numbered("IN", range(9)), MID, *_numbered("OUT", range(9))),
    26: SD,
    61: FLUX,
}
"""How many values a list has → the blocks that they are for: SDXL's LoRA, SD's LoRA, SDXL's LoCon, all, Flux."""
SECOND_NAMES = {"M00": MID, CLIP: BASE}
"""What else a block is called. The encoders of a model are one block; Flux has a word of its own for it, and T5."""
_X = re.compile(r"X([+-].+)?", re.ASCII)


class Entry(NamedTuple):
    """One value of a list. `letter`: "" a number, "X" the tag's `x` plus `value`, "R" and "U" drawn at random."""

    value: float = 0.0
    letter: str = ""

    def __str__(self) -> str:
        if self.letter != "X":
            return self.letter or written(self.value)
        return "X" if not self.value else f"X{self.value:+}".removesuffix(".0")


@dataclass(frozen=True)
class BlockList:
    """What a tag's `lbw` asks for. `label` is the preset's name, "" where the values stand in the tag."""

    entries: tuple[Entry, ...]
    label: str = ""

    @property
    def random(self) -> bool:
        """Whether anything is yet to be drawn."""
        return any(entry.letter in ("R", "U") for entry in self.entries)

    @property
    def uses_x(self) -> bool:
        """Whether `x` matters."""
        return any(entry.letter == "X" for entry in self.entries)

    def drawn(self, seed: str) -> BlockList:
        """With numbers in the place of R (0 to 1) and U (−0.5 to 1.5), the same ones for the same seed."""
        if not self.random:
            return self
        draw = random.Random(seed)
        ranges = {"R": (0.0, 1.0), "U": (-0.5, 1.5)}
        return BlockList(
            tuple(
                Entry(round(draw.uniform(*ranges[entry.letter]), 3)) if entry.letter in ranges else entry
                for entry in self.entries
            )
        )

    def at(self, x: float) -> Ratios:
        """As numbers. Raises nothing; what is yet to be drawn is drawn without a seed of the user's."""
        entries = self.drawn("").entries
        label = f"{self.label} x={written(x)}" if self.label and self.uses_x else self.label
        return Ratios(tuple(entry.value + (x if entry.letter == "X" else 0.0) for entry in entries), label)

    def __str__(self) -> str:
        return self.label or ",".join(map(str, self.entries))


@dataclass(frozen=True)
class Ratios:
    """A ratio for each block of a layout."""

    values: tuple[float, ...]
    label: str = ""

    def of(self, block: str) -> float:
        """The ratio of a block; 1 for a layer that is in none, and for a model of another kind than the list's."""
        return self.named.get(block, 1.0)

    def notes(self, blocks: Iterable[str]) -> list[str]:
        """What to say about blocks of a model that the list has no values for."""
        layout = LAYOUTS[len(self.values)]
        missing = sorted({block for block in blocks if block} - {*layout, *(SECOND_NAMES.get(b, b) for b in layout)})
        foreign = [block for block in missing if block not in self.named]
        zero = [block for block in missing if block in self.named and block != T5]
        notes = [f"the block weights have no values for {', '.join(zero)}, which counts as 0"] if zero else []
        if foreign:
            notes.append("the block weights are for another kind of model: the blocks of this one keep their strength")
        return notes

    @cached_property
    def named(self) -> dict[str, float]:
        """Block → ratio. Blocks that a short list has no value for have 0."""
        layout = LAYOUTS[len(self.values)]
        given = dict(zip(layout, self.values, strict=True))
        if layout is FLUX:
            return {**given, BASE: given[CLIP]}
        return {**dict.fromkeys(SD, 0.0), **given, T5: given[BASE]}

    def __str__(self) -> str:
        return self.label or ",".join(map(written, self.values))


def is_block_list(text: str) -> bool:
    """Whether it looks like the values of one, and not like a curve: as many as a layout has, and no position."""
    return text.count(",") + 1 in LAYOUTS and not any(mark in text for mark in "@~;")


def parse_block_list(text: str) -> BlockList:
    """12, 17, 20, 26 or 61 values. Raises BadValue."""
    parts = text.split(",")
    if len(parts) not in LAYOUTS:
        count = "1 value" if len(parts) == 1 else f"{len(parts)} values"
        raise BadValue(f"lbw takes 12 (SDXL), 17 (SD), 20 (SDXL), 26 or 61 (Flux) values, not {count}")
    entries: list[Entry] = []
    at = 0
    for part in parts:
        entries.append(_parse_entry(part, at))
        at += len(part) + 1
    return BlockList(tuple(entries))


def _parse_entry(text: str, at: int) -> Entry:
    word = text.strip()
    if word in ("R", "U"):
        return Entry(letter=word)
    match = _X.fullmatch(word)
    try:
        if match is not None:
            return Entry(parse_number(match[1]) if match[1] else 0.0, "X")
        return Entry(parse_number(text, at))
    except BadValue:
        where = at + len(text) - len(text.lstrip())
        raise BadValue(f"{word!r} is no value for a block: write a number, R, U, X or X+0.1", where) from None


def one_block(name: str) -> BlockList | None:
    """The list in which only this block has 1; None where there is no such block."""
    name = MID if name == "M00" else name
    layout = SD if name in SD else FLUX
    if name not in layout or name in ("IN", "OUT"):  # Flux has one of each; who writes them means all of SD's
        return None
    return BlockList(tuple(Entry(float(block == name)) for block in layout), name)


def labelled(blocks: BlockList, label: str) -> BlockList:
    """The same under a preset's name."""
    return replace(blocks, label=label)
