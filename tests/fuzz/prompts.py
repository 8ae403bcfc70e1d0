"""Prompts, presets and tags that are being written.

The promises: nothing raises, whatever the text; what is stripped is what the host's own pattern strips; a request's own
text is read as an equal request; time is in proportion to the length.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from lib_locon.prompt.completion import place_at_end, words
from lib_locon.prompt.edit import tags
from lib_locon.prompt.grammar import parse_prompt
from lib_locon.prompt.presets import BUILT_IN
from tests.fuzz.limits import limited
from tests.fuzz.values import NAMES

HOST_PATTERN = re.compile(r"<(\w+):([^>]+)>")
"""The webui's own pattern for tags (`modules/extra_networks.py`)."""
LONGEST = 100_000
PIECES = (
    "<lora:", "<lyco:", "<hypernet:", "<", ">", ":", "=", ",", ";", "@", "~", "-", ".", "0.8", "1", "1e9", "nan", "inf",
    "te=", "unet=", "te1=0.5", "dyn=4", "lbw=", "lbw=OUTALL", "lbw=1,0,0,0,1,1,1,1,1,1,1,1", "lbwe=", "x=0.3", "start=",
    "stop=3", "step=2-5", "hr=", "0@0,1@0.5", "IN01-OUT03:attn:0.5", "NOT", "attn2.*=0.3", "#0123abcd4567", " ", "\n",
    "a cat", "(x:1.2)", "[a:b:0.5]", "|", "R", "U", "X", "X+0.1", "9" * 400, "٣", "\u202e", "\x00", *NAMES,
)  # fmt: skip


def whole_tag(rng: random.Random) -> str:
    """A whole tag, its arguments any pieces."""
    arguments = (
        ":" + "".join(rng.choice(PIECES[5:]) for _ in range(rng.randrange(3))) for _ in range(rng.randrange(4))
    )
    return f"<lora:{rng.choice(NAMES)}{''.join(arguments)}>"


class Prompts:
    """Texts of the grammar's own pieces in any order, some of them as long as our addresses take."""

    def run(self, rng: random.Random, folder: Path) -> str:
        """One text."""
        del folder
        text = "".join(
            rng.choice(PIECES) if rng.random() < 0.7 else whole_tag(rng) for _ in range(rng.randrange(1, 20))
        )
        long = rng.random() < 0.1
        if long:
            text = (text * (LONGEST // len(text) + 1))[:LONGEST]
        presets = BUILT_IN.with_text(text) if rng.random() < 0.2 else BUILT_IN
        with limited(len(text)):
            parsed = parse_prompt(text, presets)
            place = place_at_end(text)
            if place is not None:
                words(place, presets)
        kept = HOST_PATTERN if not long else None  # the host's pattern takes the square of the length
        if kept is not None:
            expected = kept.sub(lambda match: "" if match[1] in ("lora", "lyco") else match[0], text)
            if parsed.text != expected:
                raise AssertionError(f"{text!r} became {parsed.text!r}, the host makes {expected!r} of it")
        for tag in tags(text):
            if text[tag.start : tag.stop] != f"<{tag.kind}:{':'.join(tag.items)}>":
                raise AssertionError(f"{tag} is not what stands there")
        for request in parsed.requests:
            again = parse_prompt(str(request), presets)
            if again.text or again.requests != [request]:
                raise AssertionError(f"{request!r} is written as {request}, which is read as {again}")
        return "read" if parsed.requests else "skipped" if parsed.bad else "no tag"
