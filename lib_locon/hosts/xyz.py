"""Axes of ours in the webui's own X/Y/Z plot. Imported only inside the host or its stand-in.

An axis changes the tags in the prompt of its cell, and nothing else. The host writes that prompt into the cell's text
and keys its cache of encoded prompts by its tags: so the text is true and makes the cell again, also in a webui without
this extension where the built-in reads such a tag. A value set beside the prompt would do neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules import scripts, shared

from lib_locon.errors import LoconError, UnknownName
from lib_locon.library import Library
from lib_locon.naming import fits_into_a_tag, in_a_tag, tidy
from lib_locon.prompt import edit
from lib_locon.prompt.numbers import written
from lib_locon.prompt.presets import Presets
from lib_locon.prompt.request import Request

SCRIPT = "xyz_grid.py"
OFF = "None"
ADAPTER, STRENGTH, TE, UNET, BLOCKS = (
    f"[LoCon] {name}" for name in ("Adapter", "Strength", "TE strength", "UNet strength", "Block weights")
)
_OF_ADAPTER = re.compile(r"([^:]+):(.*)", re.DOTALL)
_NUMBER = r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*"
_RANGE = re.compile(rf"{_NUMBER}-{_NUMBER}(?:\({_NUMBER}\)|\[\s*(\d{{1,4}})\s*\])?\s*")
MOST_VALUES = 10_000
"""Of one axis: a slip in a range must not fill the memory."""


@dataclass(frozen=True)
class Value:
    """One value of an axis of strengths: `text` for the tag of `name`, or for the first one."""

    text: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" if self.name else self.text


@dataclass(frozen=True)
class _Cell:
    """What axes did to a cell's tag before another one: the host runs them in the order X, Y, Z, whatever they are."""

    off: bool = False
    """The adapter was taken out: its strength must not go to the next tag."""
    names: tuple[str, ...] = ()
    """Those of the prompt's tags before any axis: a strength for one of them follows its tag to another adapter."""
    gone: int = 0
    """How many of these tags, the first ones, were taken out."""
    waiting: tuple[edit.Change, ...] = ()
    """For the adapter that is yet to come."""


class Axes:
    """Ours in every X/Y/Z script that the host has loaded."""

    def __init__(
        self, names: Callable[[], list[str]], library: Callable[[], Library], presets: Callable[[], Presets]
    ) -> None:
        self._names = names
        self._library = library
        self._presets = presets
        self._places: list[tuple[list[Any], list[Any]]] = []
        """The host's list of axes, and ours in it."""

    def add(self) -> None:
        """To be called in before_ui: the host builds the script's drop-downs from the list right after."""
        self.remove()
        # known by its file: a script is no module that could be imported, and each load makes another one
        found = {id(each.module): each.module for each in scripts.scripts_data if Path(each.path).name == SCRIPT}
        for module in found.values():
            options, make = getattr(module, "axis_options", None), getattr(module, "AxisOption", None)
            if isinstance(options, list) and make is not None:
                ours = list(self._made(make))
                options.extend(ours)
                self._places.append((options, ours))

    def remove(self) -> None:
        """Takes ours out again."""
        for options, ours in self._places:
            options[:] = [option for option in options if not any(option is each for each in ours)]
        self._places = []

    def _made(self, make: Callable[..., Any]) -> Iterator[Any]:
        # the costlier an axis, the further out the host's loops run it: another adapter must be read, another
        # strength only written
        names = lambda: [OFF, *self._names()]  # noqa: E731  as the block weights' below
        yield make(ADAPTER, str, self._use, confirm=self._confirm_names, cost=0.6, choices=names)
        for label, change in ((STRENGTH, edit.both), (TE, edit.text_encoders), (UNET, edit.unet)):
            apply = self._strength(change)
            yield make(label, _value, apply, confirm=self._confirm_strengths, cost=0.3, prepare=listed)
        yield make(BLOCKS, str, self._blocks, confirm=self._confirm_blocks, cost=0.3, choices=self._block_names)

    # ---- adapters

    def _confirm_names(self, _: Any, names: Sequence[str]) -> None:
        library, problems = self._library(), []
        for name in names:
            try:
                if not fits_into_a_tag(name):
                    instead = f": write {in_a_tag(name)!r} for it" if library.lookup.files(name) else ""
                    raise UnknownName(f"no tag can hold the name {name!r} (because of : or >){instead}")
                if name != OFF:
                    library.find(name)
            except UnknownName as error:
                problems.append(str(error))
        if problems:
            raise UnknownName("; ".join(problems))

    def _use(self, p: Any, name: str, _: Sequence[str]) -> None:
        cell = _cell(p)
        first = None if cell.off else edit.first_tag(_prompt(p))
        if name == OFF:
            p.locon_cell = replace(cell, off=True, gone=cell.gone + (first is not None))
            if first is not None:
                _in_prompts(p, first.name, 0, edit.without)
        elif first is not None:
            _in_prompts(p, first.name, 0, lambda text, tag: edit.renamed(text, tag, name))
        else:
            weight = edit.strength(str(shared.opts.extra_networks_default_multiplier))
            request = edit.both(weight)(Request(name))
            for change in cell.waiting:
                request = change(request)
            p.locon_cell = replace(cell, off=False, waiting=())
            _to_prompts(p, request)

    # ---- strengths and block weights

    def _strength(self, change: Callable[[Any], edit.Change]) -> Callable[[Any, Value, Sequence[Value]], None]:
        return lambda p, value, _: self._change(p, value.name, change(edit.strength(value.text)))

    def _confirm_strengths(self, p: Any, values: Sequence[Value]) -> None:
        for value in values:
            edit.strength(value.text)

    def _block_names(self) -> list[str]:
        return [OFF, *self._presets().blocks]

    def _confirm_blocks(self, _: Any, values: Sequence[str]) -> None:
        for value in values:
            self._blocks_change(value)

    def _blocks(self, p: Any, value: str, _: Sequence[str]) -> None:
        self._change(p, "", self._blocks_change(value))

    def _blocks_change(self, value: str) -> edit.Change:
        return edit.no_blocks if value == OFF else edit.blocks(value, self._presets())

    def _change(self, p: Any, name: str, change: edit.Change) -> None:
        cell, name = _cell(p), tidy(name)
        tags = [tag.name for tag in edit.tags(_prompt(p))]
        place = cell.names.index(name) - cell.gone if name in cell.names else 0
        if place < 0 or (cell.off and not name):
            return  # its adapter was taken out
        if name in cell.names or (tags and not name):
            presets, before = self._presets(), tags[:place].count(tags[place])
            _in_prompts(p, tags[place], before, lambda text, tag: edit.changed(text, tag, change, presets))
        elif name or not self._with_adapters():
            what = f" for {name!r}, and the prompt has no tag of it" if name else ", and the prompt has no tag"
            raise LoconError(
                f"the X/Y/Z plot has a strength or block weights{what}: write <lora:{name or 'NAME'}:1> into the "
                "prompt itself (in a style it does not count), or let another axis choose the adapter"
            )
        else:
            p.locon_cell = replace(cell, waiting=(*cell.waiting, change))

    def _with_adapters(self) -> bool:
        """Whether the plot that runs now has an axis of adapters."""
        running = (getattr(shared.state, f"xyz_plot_{axis}", None) for axis in "xyz")
        return any(getattr(getattr(each, "axis", None), "label", "") == ADAPTER for each in running)


def listed(text: str) -> list[str]:
    """The values of an axis of strengths, from what the user wrote.

    `0.2, 0.4`, ranges as the host has them (`0-1 (+0.25)`, `0-1 [5]`), curves with semicolons (`0@0;1@0.5`). For
    another adapter than the first, its name and a colon stand before all of them: `style: 0.2, 0.4`.
    """
    named = _OF_ADAPTER.fullmatch(text.strip())
    name, rest = (named[1].strip(), named[2]) if named else ("", text)
    words = [word for part in rest.split(",") if part.strip() for word in _range(part)]
    return [str(Value(word, name)) for word in words[:MOST_VALUES]]


def _range(text: str) -> list[str]:
    match = _RANGE.fullmatch(text)
    if match is None:
        return [text.strip()]
    first, last = float(match[1]), float(match[2])
    if match[4]:
        count = int(match[4])
        step = (last - first) / max(count - 1, 1)
    else:
        step = float(match[3] or 1)
        count = min(MOST_VALUES, int((last - first) / step + 1e-6) + 1) if step * (last - first) >= 0 and step else 0
    if count < 1:
        raise LoconError(f"{text.strip()!r} is a range without a value: write it as 0-1 (+0.25), or as 0-1 [5]")
    return [written(round(first + number * step, 8)) for number in range(count)]


def _value(text: str) -> Value:
    name, _, number = text.rpartition(":")
    return Value(number.strip(), name.strip())


def _cell(p: Any) -> _Cell:
    found = getattr(p, "locon_cell", None)
    if not isinstance(found, _Cell):
        found = p.locon_cell = _Cell(names=tuple(tag.name for tag in edit.tags(_prompt(p))))
    return found


def _prompt(p: Any) -> str:
    """Of the first image: the host takes the tags of that one."""
    return str(p.prompt[0] if isinstance(p.prompt, list) and p.prompt else p.prompt)


def _in_prompts(p: Any, name: str, before: int, change: Callable[[str, edit.Tag], str]) -> None:
    """Changes a tag of that adapter in each prompt of the job, that of the hires pass too: the first after `before`."""

    def changed(text: str) -> str:
        tag = edit.first_tag(text, name, before)
        return text if tag is None else change(text, tag)

    p.prompt = list(map(changed, p.prompt)) if isinstance(p.prompt, list) else changed(p.prompt)
    if isinstance(getattr(p, "hr_prompt", None), str):
        p.hr_prompt = changed(p.hr_prompt)


def _to_prompts(p: Any, request: Request) -> None:
    """Adds a tag to each prompt of the job; to that of the hires pass where it has one of its own."""
    add = edit.added
    p.prompt = [add(text, request) for text in p.prompt] if isinstance(p.prompt, list) else add(p.prompt, request)
    if isinstance(getattr(p, "hr_prompt", None), str) and p.hr_prompt:
        p.hr_prompt = add(p.hr_prompt, request)
