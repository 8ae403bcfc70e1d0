"""Named block weights and named element rules: the built-in ones, and the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lib_locon.errors import near
from lib_locon.prompt.blocks import BlockList, is_block_list, labelled, one_block, parse_block_list
from lib_locon.prompt.elements import Elements, parse_rules
from lib_locon.prompt.numbers import BadValue


@dataclass(frozen=True)
class Presets:
    """Name → block weights, name → rules. Names are case-sensitive, as in lora-block-weight."""

    blocks: Mapping[str, BlockList] = field(default_factory=dict)
    elements: Mapping[str, Elements] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """Sentences about lines that could not be read."""

    def names_blocks(self, text: str) -> bool:
        """Whether it can be nothing but block weights: no number and no curve."""
        return text in self.blocks or one_block(text) is not None or is_block_list(text)

    def block_list(self, text: str) -> BlockList:
        """A preset's name, a block's name (that block alone), or values. Raises BadValue."""
        word = text.strip()
        found = self.blocks.get(word) or one_block(word)
        if found is not None:
            return found
        if "," not in word:
            raise BadValue(f"lbw has no preset {word!r}{near(word, self.blocks)}")
        return parse_block_list(text)

    def element_rules(self, text: str) -> Elements:
        """A preset's name. Raises BadValue."""
        word = text.strip()
        if word in self.elements:
            return self.elements[word]
        raise BadValue(f"lbwe has no preset {word!r}{near(word, self.elements)}")

    def with_text(self, text: str) -> Presets:
        """These and the user's own, which win.

        A line `NAME:1,0,…` names block weights, `NAME:blocks:elements:ratio` rules; a line `blocks:elements:ratio`
        below it is a further rule. Lines of any other form are comments.
        """
        blocks, elements = dict(self.blocks), dict(self.elements)
        problems: list[str] = []
        last = ""
        for number, line in enumerate(text.splitlines(), 1):
            name, colon, value = (part.strip() for part in line.strip().partition(":"))
            if not colon or line.lstrip().startswith("#"):
                continue
            try:
                if ":" not in value:
                    if "," in value:
                        blocks[_checked(name)] = labelled(parse_block_list(value), name)
                elif value.split(",")[0].count(":") == 1 and last:
                    rules = (*elements[last].rules, *parse_rules(line))
                    elements[last] = Elements(last, rules)
                else:
                    elements[_checked(name)] = Elements(name, parse_rules(value))
                    last = name
            except BadValue as bad:
                problems.append(f"line {number} of the presets is not used: {bad.message}")
        return Presets(blocks, elements, tuple(problems))


def _checked(name: str) -> str:
    if not name or any(mark in name for mark in ",=<>"):
        raise BadValue(f"a preset's name has none of , = < > in it, and {name!r} cannot be one")
    return name


BUILT_IN = Presets().with_text(
    f"""
    NONE:0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0
    ALL:1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1
    INS:1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0
    IND:1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0
    INALL:1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0
    MIDD:1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0
    OUTD:1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0
    OUTS:1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1
    OUTALL:1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1
    ALL0.5:{",".join(["0.5"] * 17)}
    FLUXALL:{",".join(["1"] * 61)}
    ATTNDEEPON:IN05-OUT05:attn:1
    ATTNDEEPOFF:IN05-OUT05:attn:0
    PROJDEEPOFF:IN05-OUT05:proj:0
    """
)
"""lora-block-weight's own, with its values."""
