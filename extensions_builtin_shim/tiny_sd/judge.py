"""Reads a picture: which shape in which colour on which ground. No learning, only the drawings' own geometry.

The ground is the colour of the picture's rim, the shape's colour that of the pixels farthest from it in colour. How
much of each pixel is shape follows from the two, and that mask is laid over drawn shapes of the same area and centre.
A picture that is none of this comes out as None in the parts that fail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from .shapes import COLOURS, SHAPES, SIZE, Scene, cover, distance

FARTHEST = 0.3
"""A colour farther than this from all named ones is none of them (red, green and blue are 0 to 1)."""
LEAST_OVERLAP = 0.75
"""A mask that covers less than this of itself and a drawn shape together is no such shape."""
CONTRAST = 0.25
"""Colours nearer than this are one ground without a shape."""

GRAIN = 0.15
"""Shares this near to 0 or 1 are taken for them."""


@dataclass(frozen=True)
class Verdict:
    """What is seen; None where it is nothing known. `overlap` is that of the best shape, known or not."""

    shape: str | None
    colour: str | None
    ground: str | None
    overlap: float = 0.0

    def says(self, scene: Scene) -> bool:
        """Whether all three are those of the scene."""
        return (self.shape, self.colour, self.ground) == (scene.shape, scene.colour, scene.ground)


def nearest_colour(colour: Tensor) -> str | None:
    """The name of a colour (3,)."""
    named = torch.tensor(list(COLOURS.values()))
    far = torch.linalg.vector_norm(named - colour, dim=1)
    best = int(far.argmin())
    return list(COLOURS)[best] if far[best] <= FARTHEST else None


def rim(picture: Tensor) -> Tensor:
    """The median colour (3,) of the outermost pixels."""
    edge = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
    return edge.median(dim=1).values


def split(picture: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The ground's colour (3,), the shape's (3,), and how much of each pixel is shape (H, W); None without a shape."""
    ground = rim(picture)
    away = torch.linalg.vector_norm(picture - ground[:, None, None], dim=0)
    far = away > 0.6 * away.flatten().quantile(0.97)
    if float(away[far].mean() if far.any() else 0.0) < CONTRAST:
        return None
    colour = picture[:, far].median(dim=1).values
    line = colour - ground
    share = ((picture - ground[:, None, None]) * line[:, None, None]).sum(0) / line.square().sum()
    # grain on flat parts would pull the centre of mass about
    return ground, colour, ((share - GRAIN) / (1 - 2 * GRAIN)).clamp(0, 1)


@cache
def unit_area(shape: str, angle: float) -> tuple[float, float, float]:
    """The area of a drawn shape of radius 1, and where its centre of mass is."""
    area, x, y = moments(cover(distance(Scene(shape, "", "", radius=12.0, angle=angle))))
    return area / 144, (x - SIZE / 2) / 12, (y - SIZE / 2) / 12


def moments(mask: Tensor) -> tuple[float, float, float]:
    """Area and centre of mass of (H, W)."""
    line = torch.arange(SIZE) + 0.5
    area = mask.sum().clamp(min=1e-6)
    return float(area), float((mask.sum(0) * line).sum() / area), float((mask.sum(1) * line).sum() / area)


def overlap(mask: Tensor, shape: str, angle: float = 0.0) -> float:
    """How well a drawn shape of the mask's size and place covers it (intersection over union), at its best."""
    area, x, y = moments(mask)
    unit, to_x, to_y = unit_area(shape, angle)
    best = 0.0
    for factor in (0.95, 1.0, 1.06):
        radius = factor * (area / unit) ** 0.5
        drawn = Scene(shape, "", "", x=x - to_x * radius, y=y - to_y * radius, radius=radius, angle=angle)
        for dx, dy in product((-0.6, 0.0, 0.6), repeat=2):
            other = cover(distance(replace(drawn, x=drawn.x + dx, y=drawn.y + dy)))
            best = max(best, float(torch.minimum(mask, other).sum() / torch.maximum(mask, other).sum()))
    return best


def judge(picture: Tensor, shapes: tuple[str, ...] = (*SHAPES, "moon")) -> Verdict:
    """What is in a picture (3, 32, 32)."""
    parts = split(picture)
    if parts is None:
        return Verdict(None, None, nearest_colour(rim(picture)))
    ground, colour, mask = parts
    found = {shape: overlap(mask, shape) for shape in shapes}
    best = max(found, key=lambda shape: found[shape])
    named = best if found[best] >= LEAST_OVERLAP else None
    return Verdict(named, nearest_colour(colour), nearest_colour(ground), found[best])
