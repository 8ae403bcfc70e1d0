"""What a prompt asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lib_locon.prompt.blocks import BlockList
from lib_locon.prompt.elements import Elements
from lib_locon.prompt.keys import CURVES
from lib_locon.prompt.numbers import Curve
from lib_locon.prompt.strengths import Strengths
from lib_locon.prompt.window import Window
from lib_locon.terminal import printable

__all__ = ["Problem", "Request", "Strengths"]
ONE = Curve.constant(1.0)
MOST_SHOWN = 400
"""Characters of a tag, in a sentence about it."""
ENCODERS, PARTS = ("te1", "te2"), ("in", "mid", "out")
Curves = tuple[tuple[str, Curve], ...]


@dataclass(frozen=True)
class Request:
    """One tag: an adapter's name, and all that the tag says about its strength. Plain, comparable data.

    `str` gives a tag that is read as an equal request.
    """

    name: str
    curves: Curves = ()
    """Key → number or curve, for those of `keys.CURVES` that the tag has, in that order."""
    dyn: int | None = None
    """How many ranks to keep; None: all."""
    window: Window = Window()
    blocks: BlockList | None = None
    elements: Elements | None = None
    layers: Curves = ()
    """Layer patterns and their factors, sorted."""
    written: str = ""
    """The name as it stands in the tag, where it has blanks at its ends there: a file's name may have them too."""

    @property
    def called(self) -> str:
        """The name to look the file up by."""
        return self.written or self.name

    @property
    def strengths(self) -> Strengths:
        """Those of the first step of the first pass."""
        return self.at(0, 1)

    @property
    def scheduled(self) -> bool:
        """Whether anything depends on the step, in either pass."""
        return any(bool(self.at(0, 1, hires=hires).schedule) for hires in (False, True))

    def drawn(self, seed: str) -> Request:
        """With the random numbers of its block weights drawn: the same ones for the same seed."""
        if self.blocks is None or not self.blocks.random:
            return self
        return replace(self, blocks=self.blocks.drawn(f"{seed}/{self.name}"))

    def at(self, step: int, steps: int, *, hires: bool = False) -> Strengths:
        """The strengths at `step`, counted from 0, of a pass of `steps`.

        Those of the text encoders are always the ones of the pass's first step: it is then that the prompt is encoded.
        """
        curves = self._of_pass(hires)
        on, encoding = self.window.active(step), self.window.active(0)

        def text(key: str) -> float:
            return curves[key].at(0, steps) if encoding else 0.0

        def image(key: str) -> float:
            return curves[key].at(step, steps) if on else 0.0

        return Strengths(
            text("te"),
            image("unet"),
            tuple((key, text(key)) for key in ENCODERS if key in curves),
            tuple((key, image(key)) for key in PARTS if key in curves),
            None if self.blocks is None else self.blocks.at(curves["x"].at(step, steps)),
            self.elements,
            tuple((pattern, factor.at(step, steps)) for pattern, factor in self.layers),
            self._schedule(curves),
        )

    def _of_pass(self, hires: bool) -> dict[str, Curve]:
        """Key → curve, with all that falls back to another filled in."""
        given = dict(self.curves)
        te = given.get("te", ONE)
        curves = {"x": ONE, **given, "te": te, "unet": given.get("unet", te)}
        if hires:
            for key, details in (("te", ENCODERS), ("unet", PARTS)):
                new = given.get(f"hr{key}", given.get("hr"))
                if new is not None:  # it is said for the whole component, so the details of the first pass are over
                    curves = {**{name: curve for name, curve in curves.items() if name not in details}, key: new}
        return curves

    def _schedule(self, curves: dict[str, Curve]) -> tuple[tuple[str, str], ...]:
        windowed = not self.window.always
        found = [
            (key, str(curves[key])) for key in ("unet", *PARTS) if key in curves and (windowed or not curves[key].fixed)
        ]
        if self.blocks is not None and self.blocks.uses_x and not curves["x"].fixed:
            found.append(("blocks", f"{self.blocks} with x {curves['x']}"))
        found += [(pattern, str(factor)) for pattern, factor in self.layers if not factor.fixed]
        return (*found, ("steps", str(self.window))) if windowed else tuple(found)

    def __str__(self) -> str:
        given = {key: str(curve) for key, curve in self.curves}
        if self.blocks is not None:
            given["lbw"] = str(self.blocks)
        if self.elements is not None:
            given["lbwe"] = str(self.elements)
        if self.window.start:
            given["start"] = str(self.window.start)
        if self.window.stop is not None:
            given["stop"] = str(self.window.stop)
        if self.dyn is not None:
            given["dyn"] = str(self.dyn)
        given.update((pattern, str(factor)) for pattern, factor in self.layers)
        first = [self.called, *([given.pop("te")] if "te" in given else [])]
        return f"<lora:{':'.join([*first, *(f'{key}={value}' for key, value in given.items())])}>"


def in_order(curves: dict[str, Curve]) -> Curves:
    """The strengths of a tag as a Request holds them: in whatever order they were written."""
    return tuple((key, curves[key]) for key in CURVES if key in curves)


@dataclass(frozen=True)
class Problem:
    """A sentence about a tag, and the tag with a caret under the place."""

    message: str
    tag: str = ""
    position: int = 0

    def __str__(self) -> str:
        """Message, tag and a mark. Texts out of files are escaped: the ends of lines are those of this form alone."""
        message = printable(self.message)
        if not self.tag:
            return message
        # of a long tag what is around the place: there may be a sentence for each of its arguments
        first = max(0, min(self.position - MOST_SHOWN // 2, len(self.tag) - MOST_SHOWN))
        shown, place = self.tag[first : first + MOST_SHOWN], self.position - first
        place, shown = len(printable(shown[:place])), printable(shown)
        if first:
            shown, place = f"…{shown}", place + 1
        more = "…" if first + MOST_SHOWN < len(self.tag) else ""
        return f"{message}\n  {shown}{more}\n  {' ' * place}^"
