"""Strange values that several targets put into their input."""

from __future__ import annotations

import json
import math
import random
from typing import Any

NAMES = (
    "\u202eesrever",
    "tab\there",
    "\x1b[2J",
    "naïve",
    "nai\u0308ve",
    "名前",
    "a" * 200,
    " lead",
    "trail ",
    "a:b",
    "a>b",
    "a<b",
    "[x] (y)",
    "#0123abcd",
    "a=b",
    "🎨",
    "%2e%2e",
    "..",
    ".",
)
"""Of files, of adapters and of keys."""


def number(rng: random.Random) -> Any:
    """A number, or what somebody wrote where one belongs."""
    return rng.choice([0, 1, -1, 0.8, 1e400, -1e400, math.nan, 10**400, 2**63, True, None, "8", "x", [], {}])


def json_value(rng: random.Random, depth: int = 3) -> Any:
    """Any value that JSON (or Python's reader of it) has."""
    kind = rng.randrange(6 if depth else 4)
    if kind == 0:
        return number(rng)
    if kind == 1:
        return rng.choice(NAMES)
    if kind == 2:
        return rng.choice(["", "\ud800", "x" * 5000, "\x00", "<script>", "\u2028"])
    if kind == 3:
        return rng.choice([True, False, None])
    if kind == 4:
        return [json_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice([*NAMES, "a"]): json_value(rng, depth - 1) for _ in range(rng.randrange(4))}


def json_text(rng: random.Random, value: Any) -> bytes:
    """The value as a text, now and then one that is none, or one that costs more than its length."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf8", "surrogatepass")
    how = rng.randrange(12)
    if how == 0:
        return text[: rng.randrange(len(text) + 1)]
    if how == 1:
        return b"\xef\xbb\xbf" + text
    if how == 2:
        return text.decode("utf8", "replace").encode("utf-16")
    if how == 3:
        deep = rng.choice([100, 900, 5000, 100_000])
        return rng.choice([b"[" * deep, b'{"a":' * deep, b"[" * deep + b"]" * deep])
    if how == 4:
        return b'{"n": ' + b"9" * rng.choice([400, 5000, 100_000]) + b"}"
    if how == 5:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    return text
