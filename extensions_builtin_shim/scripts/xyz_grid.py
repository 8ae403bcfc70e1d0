"""The host's X/Y/Z plot, as much of it as axes of extensions meet: what an axis is, and how a cell is made.

A script: extensions find it among the loaded ones and put their axes into `axis_options`. Without the page, the
pictures of grids, and the ranges of the host's own numeric axes.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Sequence
from copy import copy
from io import StringIO
from typing import Any, NamedTuple

from modules import errors, scripts
from modules.processing import Processed, StableDiffusionProcessing, process_images
from modules.shared import state

Apply = Callable[[Any, Any, Sequence[Any]], object]


class AxisInfo(NamedTuple):
    """What `shared.state` tells of an axis of the plot that runs."""

    axis: AxisOption
    values: Sequence[Any]


def label_and_value(_: object, option: AxisOption, value: object) -> str:
    """What stands beside a row or column, if the axis does not say it otherwise."""
    return f"{option.label}: {round(value, 8) if isinstance(value, float) else value}"


class AxisOption:
    """An axis: `type` makes a value of each text, `prepare` texts of what was written; `apply` changes a cell's job."""

    def __init__(
        self,
        label: str,
        type: Callable[[Any], Any],
        apply: Apply,
        format_value: Callable[[object, AxisOption, Any], str] = label_and_value,
        confirm: Callable[[Any, Sequence[Any]], object] | None = None,
        cost: float = 0.0,
        choices: Callable[[], list[str]] | None = None,
        prepare: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.label = label
        self.type = type
        self.apply = apply
        self.format_value = format_value
        self.confirm = confirm
        self.cost = cost
        self.choices = choices
        self.prepare = prepare

    def values(self, p: object, text: str, chosen: Sequence[str] | None, *, as_text: bool) -> list[Any]:
        """What the plot goes through, checked before its first image. `chosen` is what the drop-down holds."""
        if self.label == "Nothing":
            return [0]
        if self.choices is not None and not as_text:
            words = list(chosen or ())
        elif self.prepare is not None:
            words = self.prepare(text)
        else:
            words = [word.strip() for row in csv.reader(StringIO(text), skipinitialspace=True) for word in row]
        values = [self.type(word) for word in words if self.type not in (int, float) or word.strip()]
        if self.confirm is not None:
            self.confirm(p, values)
        return values


def _set(field: str) -> Apply:
    return lambda p, value, _: setattr(p, field, value)


def _replace(p: Any, value: str, values: Sequence[str]) -> None:
    if values[0] not in p.prompt and values[0] not in p.negative_prompt:
        raise RuntimeError(f"Prompt S/R did not find {values[0]} in prompt or negative prompt.")
    p.prompt = p.prompt.replace(values[0], value)
    p.negative_prompt = p.negative_prompt.replace(values[0], value)


axis_options = [
    AxisOption("Nothing", str, lambda *_: None, format_value=lambda *_: ""),
    AxisOption("Seed", int, _set("seed")),
    AxisOption("Steps", int, _set("steps")),
    AxisOption("CFG Scale", float, _set("cfg_scale")),
    AxisOption("Prompt S/R", str, _replace, format_value=lambda _p, _option, value: str(value)),
]


class Script(scripts.Script):
    """The script in the list."""

    labels: tuple[list[str], list[str], list[str]]
    """Of the last plot's columns, rows and grids."""

    def title(self) -> str:
        """As the list shows it."""
        return "X/Y/Z plot"

    def run(
        self,
        p: StableDiffusionProcessing,
        x_type: int,
        x_values: str,
        x_values_dropdown: Sequence[str] | None = None,
        y_type: int = 0,
        y_values: str = "",
        y_values_dropdown: Sequence[str] | None = None,
        z_type: int = 0,
        z_values: str = "",
        z_values_dropdown: Sequence[str] | None = None,
        *,
        csv_mode: bool = False,
    ) -> Processed:
        """One job per cell. Each is a shallow copy: what is a list or a table in it, all cells share."""
        options = [axis_options[number] for number in (x_type, y_type, z_type)]
        texts = ((x_values, x_values_dropdown), (y_values, y_values_dropdown), (z_values, z_values_dropdown))
        axes = [
            option.values(p, text, chosen, as_text=csv_mode)
            for option, (text, chosen) in zip(options, texts, strict=True)
        ]
        for name, option, values in zip("xyz", options, axes, strict=True):
            setattr(state, f"xyz_plot_{name}", AxisInfo(option, values))
        done: dict[tuple[int, ...], Processed] = {}
        for place in _cells(options, axes):
            if state.interrupted or state.stopping_generation:
                break
            cell = copy(p)
            for option, values, number in zip(options, axes, place, strict=True):
                option.apply(cell, values[number], values)
            with errors.reported("generating image for xyz plot"):
                done[place] = process_images(cell)
        x, y, z = (
            [option.format_value(p, option, value) for value in values]
            for option, values in zip(options, axes, strict=True)
        )
        self.labels = (x, y, z)
        shown = [done[place] for place in sorted(done, key=lambda place: place[::-1])]
        comments = shown[0].comments if shown else ""
        return Processed(
            [each.images[0] for each in shown],
            [each.infotexts[0] for each in shown],
            [each.all_seeds[0] for each in shown],
            comments,
            {},
        )


def _cells(options: Sequence[AxisOption], axes: Sequence[Sequence[Any]]) -> list[tuple[int, ...]]:
    """Every cell's place on the three axes, in the order of the work: the costliest axis changes least often."""
    outward = sorted((2, 1, 0), key=lambda axis: -options[axis].cost)
    places = itertools.product(*(range(len(axes[axis])) for axis in outward))
    return [tuple(place[outward.index(axis)] for axis in range(3)) for place in places]
