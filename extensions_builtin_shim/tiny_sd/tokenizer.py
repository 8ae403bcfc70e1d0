"""Words to numbers, without a file of merges: a list of words, and a hash for the rest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

PAD, START, END = 0, 1, 2
FIRST_WORD = 3
# Ids from here on belong to unlisted words. Far above the list, so that a longer list moves nobody.
FIRST_SPARE = 256

# Order is meaning: a trained model knows a word by its place. Only ever append.
LISTED = """
red orange yellow green blue purple pink brown black white gray grey cyan magenta teal gold silver
circle square triangle star cross ring diamond heart hexagon pentagon ellipse rectangle dot line arrow moon sun
stripe stripes dots grid checkerboard gradient noise wave waves spiral
above below left right over under beside between inside outside behind near far top bottom middle center corner
on in of at with and without to from by the a an no not
one two three four five six many few several single pair row column
small big large tiny huge thin thick wide narrow tall short round flat sharp soft
dark bright light pale vivid dim clear blurry smooth rough shiny matte plain
picture photo painting drawing sketch watercolor oil ink pixel mosaic cartoon comic poster icon logo pattern
outline outlined filled hollow dotted striped checkered shaded glowing neon pastel monochrome sepia vintage
style abstract minimal detailed simple realistic retro
background foreground sky ground grass water fire snow cloud tree flower house cat dog bird fish face
best worst quality bad good ugly beautiful masterpiece low high
"""
WORDS: tuple[str, ...] = tuple(LISTED.split())

_IDS = {word: FIRST_WORD + index for index, word in enumerate(WORDS)}
# Runs of letters, digits or underscores are words; other signs only separate.
_WORD = re.compile(r"\w+")


class Tokenizer:
    """Text to ids of a fixed length: start, the words, end, padding. Case does not matter."""

    def __init__(self, max_length: int, vocab_size: int) -> None:
        if vocab_size <= FIRST_SPARE:
            raise ValueError(f"a vocabulary of {vocab_size} leaves no room for unlisted words")
        self.max_length = max_length
        self.vocab_size = vocab_size

    def word_id(self, word: str) -> int:
        """The id of a lower-case word. An unlisted one always gets the same spare id, on every machine and run."""
        known = _IDS.get(word)
        if known is not None:
            return known
        digest = hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()
        return FIRST_SPARE + int.from_bytes(digest[:8], "big") % (self.vocab_size - FIRST_SPARE)

    def encode(self, text: str) -> list[int]:
        """`max_length` ids. Words that do not fit between start and end are left off."""
        words = _WORD.findall(text.lower())[: self.max_length - 2]
        ids = [START, *map(self.word_id, words), END]
        return ids + [PAD] * (self.max_length - len(ids))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts -> ids (B, max_length) int64 on the CPU."""
        return torch.tensor([self.encode(text) for text in texts], dtype=torch.int64).view(-1, self.max_length)
