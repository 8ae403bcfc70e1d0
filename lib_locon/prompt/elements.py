"""`lbwe`: ratios for some layers of some blocks, in the place of the block's own. The rules are lora-block-weight's.

A rule is `blocks:elements:ratio`. Blocks and elements are words with blanks between them; a layer is meant when its
path (with underscores for dots, and its block's name behind) holds one of each. No words mean all, `NOT` before them
all others, and `IN05-OUT05` all blocks from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from lib_locon.prompt.blocks import FLUX, SD, SECOND_NAMES
from lib_locon.prompt.numbers import BadValue, parse_number


@dataclass(frozen=True)
class Words:
    """Some words, or with `inverted` all but them; none are any at all."""

    words: tuple[str, ...] = ()
    inverted: bool = False

    def match(self, text: str) -> bool:
        """Whether `text` has one of them in it (with `inverted`, none of them)."""
        if not self.words:
            return True
        return any(word in text for word in self.words) is not self.inverted


@dataclass(frozen=True)
class Rule:
    """One `blocks:elements:ratio`."""

    blocks: Words
    elements: Words
    ratio: float


@dataclass(frozen=True)
class Elements:
    """A preset of rules; of those that fit a layer the last one counts."""

    label: str
    rules: tuple[Rule, ...]

    def of(self, block: str, layer: str, ratio: float) -> float:
        """The ratio of a layer; `ratio` is what it has without these rules."""
        key = layer.replace(".", "_") + block
        for rule in self.rules:
            if rule.blocks.match(key) and rule.elements.match(key):
                ratio = rule.ratio
        return ratio

    def __str__(self) -> str:
        return self.label


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Rules with commas or new lines between them. Raises BadValue."""
    return tuple(_parse_rule(line) for line in text.replace("\n", ",").split(",") if line.strip())


def _parse_rule(text: str) -> Rule:
    parts = text.split(":")
    if len(parts) != 3:
        raise BadValue(f"a rule is blocks:elements:ratio, not {text.strip()!r}")
    blocks, elements, ratio = parts
    return Rule(_words(blocks, ranges=True), _words(elements), parse_number(ratio))


def _words(text: str, *, ranges: bool = False) -> Words:
    words = text.split()
    inverted = words[:1] == ["NOT"]
    found: list[str] = []
    for word in words[inverted:]:
        found += _range(word) if ranges and "-" in word else [SECOND_NAMES.get(word, word) if ranges else word]
    return Words(tuple(found), inverted and bool(found))


def _range(text: str) -> tuple[str, ...]:
    ends = text.split("-")
    for layout in (SD, FLUX):
        names = [SECOND_NAMES.get(end, end) if layout is SD else end for end in ends]
        if all(name in layout for name in names):
            places = [layout.index(name) for name in names]
            found = layout[min(places) : max(places) + 1]
            return tuple(SECOND_NAMES.get(name, name) for name in found)
    raise BadValue(f"{text!r} is no range of blocks such as IN05-OUT05")
