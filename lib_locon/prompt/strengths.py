"""How strongly an adapter acts at one moment, for each part of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lib_locon.prompt.blocks import MID, Ratios
from lib_locon.prompt.elements import Elements
from lib_locon.prompt.layers import matches

Pairs = tuple[tuple[str, float], ...]
_INPUT, _OUTPUT = re.compile(r"IN\d\d"), re.compile(r"OUT\d\d")


@dataclass(frozen=True)
class Strengths:
    """1 is as trained, 0 is not at all; any finite number is allowed. Comparable and hashable.

    A layer's strength is that of its component (or of its text encoder, or of its part of the UNet), times the ratio of
    its block, times the factor of each pattern that it matches.
    """

    te: float = 1.0
    unet: float = 1.0
    encoders: Pairs = ()
    """Strengths of single text encoders ("te1", "te2"), in the place of `te`."""
    parts: Pairs = ()
    """Strengths of parts of the UNet ("in", "mid", "out"), in the place of `unet`."""
    blocks: Ratios | None = None
    elements: Elements | None = None
    layers: Pairs = ()
    """Layer patterns and their factors."""
    schedule: tuple[tuple[str, str], ...] = ()
    """What depends on the step, in words; empty where these strengths hold at every step."""

    @classmethod
    def both(cls, strength: float) -> Strengths:
        """The same for all components."""
        return cls(strength, strength)

    @property
    def by_layer(self) -> bool:
        """Whether block and layer matter, and not the component alone."""
        return bool(self.parts or self.blocks or self.elements or self.layers)

    def of(self, component: str, block: str = "", layer: str = "") -> float:
        """The strength for a layer of the model.

        `component` is "unet", "te1", "te2", …; a model without parts counts as UNet. `block` is "IN04", "MID", "OUT11",
        "BASE", "D03", …, or "" for what is in none. `layer` is the module's dotted path inside its component.
        """
        if component.startswith("te"):
            strength = _get(self.encoders, component, self.te)
        else:
            strength = _get(self.parts, _part(block), self.unet) if self.parts else self.unet
        ratio = 1.0 if self.blocks is None else self.blocks.of(block)
        if self.elements is not None:
            ratio = self.elements.of(block, layer, ratio)
        for pattern, factor in self.layers:
            if matches(pattern, layer):
                ratio *= factor
        return strength * ratio

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON: `te` and `unet`, and what else is set."""
        more: dict[str, Any] = {**dict(self.encoders), **dict(self.parts)}
        if self.blocks is not None:
            more["blocks"] = {"label": self.blocks.label, "values": list(self.blocks.values)}
        if self.elements is not None:
            more["elements"] = self.elements.label
        if self.layers:
            more["layers"] = dict(self.layers)
        if self.schedule:
            more["schedule"] = dict(self.schedule)
        return {"te": self.te, "unet": self.unet, **more}

    def __str__(self) -> str:
        words = dict(self.schedule)
        found = [f"{key} {words.pop(key, f'{value:g}')}" for key, value in self._main()]
        if self.blocks is not None:
            found.append(f"blocks {words.pop('blocks', str(self.blocks))}")
        if self.elements is not None:
            found.append(f"elements {self.elements}")
        found += [f"{pattern} × {words.pop(pattern, f'{factor:g}')}" for pattern, factor in self.layers]
        steps = words.pop("steps", "")
        if found[0].startswith("te ") and found[1] == f"unet{found[0][2:]}" and not (self.encoders or self.parts):
            found[:2] = [found[0][3:]]
        return ", ".join(found) + (f" {steps}" if steps else "")

    def _main(self) -> Pairs:
        return (("te", self.te), *self.encoders, ("unet", self.unet), *self.parts)


def _get(pairs: Pairs, name: str, default: float) -> float:
    return next((value for key, value in pairs if key == name), default)


def _part(block: str) -> str:
    if block == MID:
        return "mid"
    # not Flux's own blocks of the names IN and OUT: those are no parts of a UNet
    return "in" if _INPUT.fullmatch(block) else "out" if _OUTPUT.fullmatch(block) else ""
