"""JSON that strangers wrote, read in time and memory in proportion to its length, and never deeper than anybody can go.

How deep Python's own reader and writer get before they give up differs with its version, its thread, and what other
extensions told it. So a text is measured before it is read, and what was read can be written again.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable
from itertools import accumulate
from typing import Any

MOST_DEEP = 100
"""Brackets in brackets. The files of trainers have three."""
MOST_DIGITS = 4300
"""Of a whole number: as many as Python prints. To read them it needs time that grows with the square of their number,
and can be told to read any."""
_STEPS = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")
"""A step down or up, as a signed byte."""
_NO_MARKS = bytes(set(range(256)) - set(b'"[]{}'))
_DIGITS = bytes(ord("0") if chr(byte).isdecimal() and byte < 128 else ord(" ") for byte in range(256))
_HALF_A_LETTER = re.compile(r"\\u[dD][89a-fA-F]")


def parse(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value that `text` says, with NaN and infinities as trainers write them. Raises ValueError.

    `pairs` makes the value of an object, as with `json.loads`; what it raises goes on.
    """
    encoded = text.encode("utf8", "surrogatepass")
    if not _is_shallow(encoded):
        raise ValueError(f"its brackets lie more than {MOST_DEEP} deep")
    number = _number if b"0" * MOST_DIGITS in encoded.translate(_DIGITS) else None
    return json.loads(text, object_pairs_hook=pairs, parse_int=number)


def parse_readable(text: str) -> Any:
    """As `parse`, with `?` in the place of half letters: they can be neither printed nor sent."""
    value = parse(text)
    if _HALF_A_LETTER.search(text):
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf8", "replace"))
    return value


def _is_shallow(text: bytes) -> bool:
    if b"\\" in text:
        text = text.replace(rb"\\", b"").replace(rb"\"", b"")
    marks = text.translate(_STEPS, _NO_MARKS)
    # two quotes side by side are an empty text, or two texts become one: either way nothing outside of texts is lost
    steps = re.sub(rb'"[^"]*"?', b"", marks.replace(b'""', b""))
    return max(accumulate(array("b", steps)), default=0) <= MOST_DEEP


def _number(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)
