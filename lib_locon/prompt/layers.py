"""Layer patterns, such as `attn2.*=0.3`: `*` is any text, `?` any character, `[…]` one of these."""

from __future__ import annotations

import fnmatch
import re
from functools import lru_cache

MOST = 200
"""Characters of a pattern: the longest path of a layer has half as many, and a program could send a million stars."""


def is_pattern(key: str) -> bool:
    """Whether a tag's key is meant as one: a misspelt key has no star and no dot in it."""
    return len(key) <= MOST and any(mark in key for mark in "*?.")


def matches(pattern: str, layer: str) -> bool:
    """Whether the pattern is some of the dotted path `layer`: whole segments, from any dot to any dot."""
    return _compiled(pattern).match(f".{layer}.") is not None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(f"*.{pattern}.*"))
