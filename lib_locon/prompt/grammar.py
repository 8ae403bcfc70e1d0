"""`<lora:NAME[:te[:unet[:dyn]]][:key=value…]>`. One parser for the host, `bake` and the API.

Keys win over places; of a key that is there twice, the last counts. Nothing here raises on any text: a tag that cannot
be read becomes a Problem and no Request.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from lib_locon.prompt.keys import CURVES, KEYS, PLACES, SYNONYMS
from lib_locon.prompt.layers import is_pattern
from lib_locon.prompt.numbers import BadValue, Curve, is_number, parse_curve, parse_whole
from lib_locon.prompt.presets import BUILT_IN, Presets
from lib_locon.prompt.request import Problem, Request, in_order
from lib_locon.prompt.window import Window, parse_range

KINDS = ("lora", "lyco")
MOST_ARGUMENTS = 200
"""Of one tag. Each can lead to a sentence that shows the tag, and a program could send a hundred thousand."""
_TAG = re.compile(r"<(\w+):([^>]+)>")
_Read = TypeVar("_Read")


@dataclass
class Parsed:
    """A prompt without its tags, and what the tags asked for. `problems` with a Request left out are `bad`."""

    text: str
    requests: list[Request] = field(default_factory=list)
    bad: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def parse_prompt(prompt: str, presets: Presets = BUILT_IN) -> Parsed:
    """Reads the tags of `KINDS` out of `prompt`; other tags stay in the text."""
    parsed, kept, at = Parsed(""), list[str](), 0
    for match in find_tags(prompt):
        if match[1] in KINDS:
            parse_tag(match[1], match[2].split(":"), parsed, presets)
            kept.append(prompt[at : match.start()])
            at = match.end()
    parsed.text = "".join((*kept, prompt[at:]))
    return parsed


def find_tags(text: str) -> Iterator[re.Match[str]]:
    """Every tag of a text, of whatever kind: its kind and its arguments. In time that grows as the text does.

    It is the host's own pattern: what the host would not strip, we must not read. No tag ends behind the last `>`, and
    to look for an end there from each `<` would take the square of the text's length.
    """
    return _TAG.finditer(text, 0, text.rfind(">") + 1)


def parse_tag(kind: str, items: Sequence[str], into: Parsed, presets: Presets = BUILT_IN) -> None:
    """Adds one tag to `into`. `items` are its arguments, split at the colons, the adapter's name first."""
    tag = _Tag(f"<{kind}:{':'.join(items)}>", presets, into.warnings)
    name, start = (items[0] if items else ""), len(kind) + 2
    try:
        if len(items) > MOST_ARGUMENTS:
            raise _Bad(f"it has more than {MOST_ARGUMENTS} arguments", start)
        tag.take(_arguments(items[1:], start + len(name) + 1))
        if not name.strip():
            raise _Bad("it names no adapter", start)
        into.requests.append(tag.request(name))
    except _Bad as bad:
        into.bad.append(Problem(f"a tag was skipped: {bad.message}", tag.text, bad.start))


class _Argument(NamedTuple):
    """`key` is None where it has a place only; `begin` is where it stands in the tag, `start` where its value does."""

    key: str | None
    value: str
    start: int
    begin: int
    whole: str


@dataclass
class _Bad(Exception):
    message: str
    start: int


def _arguments(items: Sequence[str], start: int) -> Iterator[_Argument]:
    for item in items:
        # the host takes an argument as named only with exactly one `=`
        key, value = item.split("=") if item.count("=") == 1 else (None, item)
        name = None if key is None else SYNONYMS.get(key.strip(), key.strip())
        yield _Argument(name, value.strip(), start + len(item) - len(value.lstrip()), start, item)
        start += len(item) + 1


@dataclass
class _Tag:
    """One tag while it is read: key → its value."""

    text: str
    presets: Presets
    warnings: list[Problem]
    values: dict[str, _Argument] = field(default_factory=dict)

    def take(self, arguments: Iterator[_Argument]) -> None:
        """Sorts out what each argument is for; warns of those that are for nothing."""
        place, after_blocks = 0, False
        for argument in arguments:
            key = argument.key
            if key is None:
                key = self._key_at(place, argument.value, after_blocks)
                place, after_blocks = place + 1, after_blocks or key == "lbw"
            if key not in KEYS and not (argument.key and is_pattern(key)):
                self._warn(f"{argument.whole!r} is not understood and was ignored{_near(argument.key)}", argument.begin)
            elif argument.key is None:
                self.values.setdefault(key, argument)
            else:
                self.values[key] = argument

    def _key_at(self, place: int, value: str, after_blocks: bool) -> str:
        # lora-block-weight's older form, <lora:NAME:1:OUTALL:0.5>: block weights behind the strength, and then x or
        # lbwe. Only what can be no strength and no rank is read so: <lora:NAME:1:1:4> is dyn=4
        if after_blocks:
            return "x" if is_number(value) else "lbwe"
        if place and self.presets.names_blocks(value):
            return "lbw"
        return PLACES[place] if place < len(PLACES) else ""

    def request(self, name: str) -> Request:
        """Raises _Bad."""
        curves = {key: self._curve(key) for key in CURVES if key in self.values}
        layers = {key: self._curve(key) for key in self.values if key not in KEYS}
        return Request(
            name.strip(),
            in_order(curves),
            self._read("dyn", lambda text: parse_whole(text, "dyn", least=1)),
            self._window(),
            self._read("lbw", self.presets.block_list),
            self._read("lbwe", self.presets.element_rules),
            tuple(sorted(layers.items())),
            "" if name == name.strip() else name,
        )

    def _window(self) -> Window:
        start = self._read("start", lambda text: parse_whole(text, "start"))
        stop = self._read("stop", lambda text: parse_whole(text, "stop"))
        window = self._read("step", parse_range) or Window(start or 0, stop)
        if window.never:
            key = "step" if "step" in self.values else "stop"
            self._warn(f"the adapter acts at no step: {window.stop} is not after its first", self.values[key].start)
        return window

    def _curve(self, key: str) -> Curve:
        argument = self.values[key]
        try:
            curve, warning = parse_curve(argument.value)
        except BadValue as bad:
            raise _Bad(bad.message, argument.start + bad.at) from None
        if warning:
            self._warn(warning, argument.start)
        return curve

    def _read(self, key: str, read: Callable[[str], _Read]) -> _Read | None:
        if key not in self.values:
            return None
        try:
            return read(self.values[key].value)
        except BadValue as bad:
            raise _Bad(bad.message, self.values[key].start + bad.at) from None

    def _warn(self, message: str, start: int) -> None:
        self.warnings.append(Problem(message, self.text, start))


def _near(key: str | None) -> str:
    near = difflib.get_close_matches(key.lower()[:20], KEYS, n=1, cutoff=0.6) if key else []
    return f" (is {near[0]}= meant?)" if near else ""
