"""The world that the trained model knows: coloured shapes on coloured grounds, 32 × 32 pixels, drawn by a script.

A shape is an outline around the origin whose farthest point is about 1 away. Pixels are painted by their signed
distance to it, which gives soft edges, and is what the adapters' styles (outlines, glows) are drawn from too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

SIZE = 32
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.92, 0.15),
    "green": (0.10, 0.60, 0.20),
    "cyan": (0.20, 0.85, 0.90),
    "blue": (0.12, 0.22, 0.85),
    "purple": (0.50, 0.12, 0.65),
    "pink": (1.00, 0.60, 0.75),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
SIZES: dict[str, tuple[float, float]] = {"small": (6.5, 7.5), "": (8.5, 11.0), "large": (12.0, 13.0)}
"""The word for a size → radii in pixels."""
MOST_OFF = 2.5
"""How far from the middle a shape may stand, in pixels each way."""
Points = Sequence[tuple[float, float]]


def _around(radii: Sequence[float], turn: float = 0.0) -> Points:
    """Corners at equal angles, at these distances, from straight up clockwise."""
    angles = [math.tau * (index / len(radii)) + turn for index in range(len(radii))]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _heart() -> Points:
    """Two lobes above a point: the usual curve of sines and cosines, in 32 corners."""
    angles = [math.tau * index / 32 for index in range(32)]
    rise = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(math.sin(a) ** 3, -(y + 2.5) / 15) for a, y in zip(angles, rise, strict=True)]


def _moon() -> Points:
    """A crescent, open to the right: an outer arc and an inner one back from horn to horn."""
    outer = [math.radians(40 + 280 * index / 24) for index in range(25)]
    horn = math.cos(outer[0]), math.sin(outer[0])
    bend = math.radians(65)
    radius = horn[1] / math.sin(bend)
    middle = horn[0] - radius * math.cos(bend) + 0.12
    inner = [-bend - (math.tau - 2 * bend) * index / 16 for index in range(1, 16)]
    return [(math.cos(a), math.sin(a)) for a in outer] + [
        (middle + radius * math.cos(a), radius * math.sin(a)) for a in inner
    ]


_CROSS = (0.34, 1.0)
POLYGONS: dict[str, Points] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -0.95), (1.0, 0.75), (-1.0, 0.75)],
    "star": _around([1.08, 0.45] * 5),
    "cross": [(x * _CROSS[i], y * _CROSS[j]) for x, y, i, j in (
        (-1, -1, 0, 1), (1, -1, 0, 1), (1, -1, 0, 0), (1, -1, 1, 0), (1, 1, 1, 0), (1, 1, 0, 0),
        (1, 1, 0, 1), (-1, 1, 0, 1), (-1, 1, 0, 0), (-1, 1, 1, 0), (-1, -1, 1, 0), (-1, -1, 0, 0),
    )],
    "diamond": [(0.0, -1.1), (0.72, 0.0), (0.0, 1.1), (-0.72, 0.0)],
    "heart": _heart(),
    "moon": _moon(),
}  # fmt: skip
ROUND: dict[str, tuple[float, float]] = {"circle": (0.0, 0.95), "ring": (0.55, 1.0)}
"""Inner and outer radius."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
"""What the base model is shown. The moon is left for an adapter."""
HELD_OUT = frozenset(zip(("cyan", "purple", "orange", "red", "green", "yellow", "blue", "white"), SHAPES, strict=True))
"""(colour, shape) that no training picture has: what these come out as says whether prompts compose."""


@dataclass(frozen=True)
class Scene:
    """One picture: what its caption says, and what it leaves open."""

    shape: str
    colour: str
    ground: str
    size: str = ""
    x: float = 16.0
    y: float = 16.0
    radius: float = 10.0
    angle: float = 0.0
    """Clockwise, in degrees."""

    def turned(self, angle: float) -> Scene:
        """The same with its shape turned to this angle."""
        return replace(self, angle=angle)


def random_scene(random: Random, shapes: Sequence[str] = SHAPES) -> Scene:
    """Any shape in any colour on any other, but for what is held out."""
    while True:
        shape = random.choice(shapes)
        colour, ground = random.sample(list(COLOURS), 2)
        if (colour, shape) not in HELD_OUT:
            break
    size = random.choices(("", "small", "large"), (4, 1, 1))[0]
    radius = random.uniform(*SIZES[size])
    reach = min(SIZE / 2 - radius - 1.5, MOST_OFF)
    x, y = (SIZE / 2 + random.uniform(-reach, reach) for _ in range(2))
    return Scene(shape, colour, ground, size, x, y, radius)


def colour_of(name: str) -> Tensor:
    """(3, 1, 1), 0 to 1."""
    return torch.tensor(COLOURS[name]).view(3, 1, 1)


def pixel_centres() -> tuple[Tensor, Tensor]:
    """x and y of each pixel's centre, (32, 32) each."""
    line = torch.arange(SIZE) + 0.5
    return line.expand(SIZE, SIZE), line[:, None].expand(SIZE, SIZE)


def distance(scene: Scene) -> Tensor:
    """(32, 32): how many pixels outside of the shape's edge each pixel's centre is; negative inside."""
    x, y = pixel_centres()
    sine, cosine = math.sin(math.radians(scene.angle)), math.cos(math.radians(scene.angle))
    dx, dy = (x - scene.x) / scene.radius, (y - scene.y) / scene.radius
    across, down = dx * cosine + dy * sine, dy * cosine - dx * sine
    if scene.shape in ROUND:
        inner, outer = ROUND[scene.shape]
        far = torch.hypot(across, down)
        return torch.maximum(far - outer, (inner - far) if inner else far - outer) * scene.radius
    return polygon_distance(across, down, POLYGONS[scene.shape]) * scene.radius


def polygon_distance(x: Tensor, y: Tensor, corners: Points) -> Tensor:
    """Signed distance of the points (H, W) to a closed polygon; negative inside (even-odd)."""
    first = torch.tensor(corners)[:, :, None, None]
    edge = first.roll(-1, 0) - first
    point = torch.stack([x, y])[None] - first
    along = ((point * edge).sum(1) / edge.square().sum(1)).clamp(0, 1)
    nearest = (point - along[:, None] * edge).square().sum(1).amin(0).sqrt()
    # a ray to the right crosses the edges that span the point's height and stand right of it
    spans = (point[:, 1] >= 0) != (point[:, 1] >= edge[:, 1])
    right = point[:, 0] < edge[:, 0] * point[:, 1] / torch.where(edge[:, 1] == 0, 1.0, edge[:, 1])
    inside = (spans & right).sum(0) % 2 == 1
    return torch.where(inside, -nearest, nearest)


def cover(far: Tensor) -> Tensor:
    """How much of each pixel lies within an edge, from its distance to it: 0 to 1."""
    return (0.5 - far).clamp(0, 1)


def over(below: Tensor, colour: Tensor, share: Tensor) -> Tensor:
    """A picture (3, H, W) with a colour painted over it where `share` (H, W) says."""
    return below + share * (colour - below)


def draw(scene: Scene) -> Tensor:
    """The picture (3, 32, 32), 0 to 1."""
    ground = colour_of(scene.ground).expand(3, SIZE, SIZE)
    return over(ground, colour_of(scene.colour), cover(distance(scene)))
