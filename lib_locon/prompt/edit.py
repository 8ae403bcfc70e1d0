"""Changing one tag in the text of a prompt, and nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from lib_locon.errors import LoconError
from lib_locon.naming import tidy
from lib_locon.prompt.grammar import KINDS, Parsed, find_tags, parse_tag
from lib_locon.prompt.numbers import BadValue, Curve, parse_curve
from lib_locon.prompt.presets import Presets
from lib_locon.prompt.request import ENCODERS, ONE, PARTS, Request, in_order

Change = Callable[[Request], Request]


@dataclass(frozen=True)
class Tag:
    """A tag of ours where it stands in a prompt. `items` are its arguments, the adapter's name first."""

    kind: str
    items: tuple[str, ...]
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The adapter's, in the spelling in which names are compared."""
        return tidy(self.items[0])

    def request(self, presets: Presets) -> Request:
        """What it asks for. Raises LoconError for a tag that cannot be read."""
        parsed = Parsed("")
        parse_tag(self.kind, self.items, parsed, presets)
        if not parsed.requests:
            raise LoconError(str(parsed.bad[0]))
        return parsed.requests[0]


def tags(prompt: str) -> Iterator[Tag]:
    """All of a prompt, readable or not, in their order."""
    for match in find_tags(prompt):
        if match[1] in KINDS:
            yield Tag(match[1], tuple(match[2].split(":")), match.start(), match.end())


def first_tag(prompt: str, name: str = "", before: int = 0) -> Tag | None:
    """The first one, or the first one of that adapter; the first after `before` others of that kind."""
    return next(islice((tag for tag in tags(prompt) if not name or tag.name == tidy(name)), before, None), None)


def without(prompt: str, tag: Tag) -> str:
    """The prompt without the tag: what the host makes of it anyway."""
    return prompt[: tag.start] + prompt[tag.stop :]


def renamed(prompt: str, tag: Tag, name: str) -> str:
    """With another adapter in the tag, and all else in it as it was written."""
    text = f"<{tag.kind}:{':'.join((name, *tag.items[1:]))}>"
    return prompt[: tag.start] + text + prompt[tag.stop :]


def changed(prompt: str, tag: Tag, change: Change, presets: Presets) -> str:
    """With the tag asking for something else. Raises LoconError for a tag that cannot be read."""
    text = str(change(tag.request(presets))).replace(KINDS[0], tag.kind, 1)
    return prompt[: tag.start] + text + prompt[tag.stop :]


def added(prompt: str, request: Request) -> str:
    """With one more tag, at the end, where it changes no word."""
    return f"{prompt}{request}"


def both(strength: Curve) -> Change:
    """One strength for all of the adapter: what was said for text encoders or parts of the UNet is over."""
    return lambda request: _with(request, {"te": strength}, without=("unet", *ENCODERS, *PARTS))


def text_encoders(strength: Curve) -> Change:
    """The text encoders' strength; the UNet keeps its own, also where it came from that of the text encoders."""

    def change(request: Request) -> Request:
        given = dict(request.curves)
        unet = given.get("unet", given.get("te", ONE))
        return _with(request, {"te": strength, "unet": unet}, without=ENCODERS)

    return change


def unet(strength: Curve) -> Change:
    """The UNet's strength; the text encoders keep theirs."""
    return lambda request: _with(request, {"unet": strength}, without=PARTS)


def blocks(text: str, presets: Presets) -> Change:
    """Block weights: a preset's name, a block's, or values. Raises LoconError."""
    try:
        found = presets.block_list(text)
    except BadValue as bad:
        raise LoconError(bad.message) from None
    return lambda request: replace(request, blocks=found)


def no_blocks(request: Request) -> Request:
    """Without block weights."""
    return replace(request, blocks=None)


def strength(text: str) -> Curve:
    """A number, or a curve. Raises LoconError."""
    try:
        curve, warning = parse_curve(text)
    except BadValue as bad:
        raise LoconError(f"{bad.message}; write a strength such as 0.8, or a curve such as 0@0;1@0.5") from None
    if warning:
        raise LoconError(warning)
    return curve


def _with(request: Request, curves: dict[str, Curve], without: tuple[str, ...]) -> Request:
    given = {key: curve for key, curve in request.curves if key not in without}
    return replace(request, curves=in_order({**given, **curves}))
