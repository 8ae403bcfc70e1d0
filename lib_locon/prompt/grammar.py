"""`<lora:NAME[:te[:unet[:dyn]]][:key=value…]>`, as AUTOMATIC1111 reads it. One parser for the host, `bake` and the API.

The keys are `te`, `unet` and `dyn`; they win over the places. `te` alone also sets `unet`. Nothing here raises on any
text: a tag that cannot be read becomes a Problem and no Request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from lib_locon.prompt.request import Problem, Request, Strengths

KINDS = ("lora", "lyco")
PLACES = ("te", "unet", "dyn")
_TAG = re.compile(r"<(\w+):([^>]+)>")  # the host's own pattern: what it would not strip, we must not read


@dataclass
class Parsed:
    """A prompt without its tags, and what the tags asked for. `problems` with a Request left out are `bad`."""

    text: str
    requests: list[Request] = field(default_factory=list)
    bad: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def parse_prompt(prompt: str) -> Parsed:
    """Reads the tags of `KINDS` out of `prompt`; other tags stay in the text."""
    parsed = Parsed("")

    def take(match: re.Match[str]) -> str:
        if match[1] not in KINDS:
            return match[0]
        parse_tag(match[1], match[2].split(":"), parsed)
        return ""

    parsed.text = _TAG.sub(take, prompt)
    return parsed


def parse_tag(kind: str, items: Sequence[str], into: Parsed) -> None:
    """Adds one tag to `into`. `items` are its arguments, split at the colons, the adapter's name first."""
    tag = f"<{kind}:{':'.join(items)}>"
    starts = _starts(kind, items)
    values: dict[str, tuple[str, int]] = {}
    place = 0
    for item, start in zip(items[1:], starts[1:], strict=True):
        key, value, start = _named(item, start)
        if key is None:
            key, place = (PLACES[place] if place < len(PLACES) else ""), place + 1
            values.setdefault(key, (value, start))
        else:
            values[key] = (value, start)
        if key not in PLACES:
            into.warnings.append(Problem(f"{item!r} is not understood and was ignored", tag, start))
    try:
        into.requests.append(_request(items[0] if items else "", values))
    except _Bad as bad:
        into.bad.append(Problem(bad.message, tag, starts[0] if bad.start is None else bad.start))


@dataclass
class _Bad(Exception):
    message: str
    start: int | None = None


def _request(name: str, values: dict[str, tuple[str, int]]) -> Request:
    if not name.strip():
        raise _Bad("the tag names no adapter; it was skipped")
    te = _number(*values["te"]) if "te" in values else 1.0
    unet = _number(*values["unet"]) if "unet" in values else te
    return Request(name.strip(), Strengths(te, unet), _rank(*values["dyn"]) if "dyn" in values else None)


def _starts(kind: str, items: Sequence[str]) -> list[int]:
    """Where each argument begins in the tag."""
    starts = [len(kind) + 2]
    for item in items:
        starts.append(starts[-1] + len(item) + 1)
    return starts[: max(len(items), 1)]


def _named(item: str, start: int) -> tuple[str | None, str, int]:
    """Key, value and the value's start; the host takes an argument as named only with exactly one `=`."""
    key, value = item.split("=") if item.count("=") == 1 else (None, item)
    start += 0 if key is None else len(key) + 1
    return None if key is None else key.strip(), value.strip(), start + len(value) - len(value.lstrip())


def _number(text: str, start: int) -> float:
    # Python's float() also takes "1_0", "nan" and "infinity", which nobody means as a strength
    if re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?\s*", text, re.ASCII):
        value = float(text)
        if math.isfinite(value):
            return value
    raise _Bad(f"{text.strip()!r} is no number, so this tag was skipped", start)


def _rank(text: str, start: int) -> int:
    if re.fullmatch(r"\s*\d{1,9}\s*", text, re.ASCII) and int(text) > 0:
        return int(text)
    raise _Bad(f"dyn must be a whole number above 0, not {text.strip()!r}; this tag was skipped", start)
