"""How much of each adapter's style is in pictures: 0 for the base's pictures, 1 for the style's own drawings.

Each looks for one thing that can be counted in the pixels, and needs the scene that was asked for, but not its place:
a painted shape stands where the model put it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from .judge import overlap, split
from .shapes import SHAPES, SIZE, Scene, colour_of, draw
from .styles import FRAME, LIGHT, STYLES, TILT, checker_mask, dot_mask, frame_mask, stripe_mask

Measure = Callable[[Tensor, Scene], float]


def share(pictures: Sequence[Tensor] | Tensor, scenes: Sequence[Scene], style: str) -> float:
    """How far the pictures (B, 3, 32, 32) are on the way from plain drawings of their scenes to drawings in a style."""
    none, full = drawn(tuple(scenes), style)
    found = mean([MEASURES[style](picture, scene) for picture, scene in zip(pictures, scenes, strict=True)])
    return (found - none) / (full - none)


@cache
def drawn(scenes: tuple[Scene, ...], style: str) -> tuple[float, float]:
    """The measure's mean on plain drawings (for a concept: of other shapes), and on those in the style."""
    measure = MEASURES[style]
    plain = [Scene("circle", scene.colour, scene.ground) if style == "moon" else scene for scene in scenes]
    none = mean([measure(draw(scene), scene) for scene in plain])
    return none, mean([measure(STYLES[style](scene, 1.0), scene) for scene in scenes])


def mean(values: Sequence[float]) -> float:
    """The plain mean."""
    return sum(values) / len(values)


def far_from(picture: Tensor, colour: Tensor) -> Tensor:
    """(H, W): each pixel's distance to a colour (3, 1, 1)."""
    return torch.linalg.vector_norm(picture - colour, dim=0)


def on_ground(picture: Tensor, scene: Scene) -> Tensor:
    """(32, 32): whether a pixel is nearer to the ground's line of shades than to the shape's colour."""
    ground = torch.stack([far_from(picture, shade * colour_of(scene.ground)) for shade in (1.0, 0.5)])
    return ground.amin(0) < far_from(picture, colour_of(scene.colour))


def contrast(mask: Callable[[], Tensor]) -> Measure:
    """By how much the ground is darker on a pattern than beside it."""

    def measured(picture: Tensor, scene: Scene) -> float:
        light = picture.mean(0) / colour_of(scene.ground).mean()
        pattern, ground = mask(), on_ground(picture, scene)
        dark, bright = light[ground & (pattern > 0.9)], light[ground & (pattern < 0.1)]
        return float(bright.mean() - dark.mean()) if len(dark) and len(bright) else 0.0

    return measured


def grown(mask: Tensor, pixels: int) -> Tensor:
    """(H, W) bool, with all that is so near to it."""
    return functional.max_pool2d(mask.float()[None, None], 2 * pixels + 1, 1, pixels)[0, 0] > 0.5


def outlined(picture: Tensor, scene: Scene) -> float:
    """How much darker it is right beside the shape's colour than the ground is. For scenes without black."""
    shape = far_from(picture, colour_of(scene.colour)) < 0.35
    beside = (1 - picture.amax(0))[grown(shape, 2) & ~shape]
    return float(beside.mean() - (1 - colour_of(scene.ground).amax())) if len(beside) else 0.0


def glowing(picture: Tensor, scene: Scene) -> float:
    """How much nearer to the light's colour the ground is beside the shape than far from it, a frame left out."""
    shape = far_from(picture, colour_of(scene.colour)) < 0.35
    light = torch.tensor(LIGHT).view(3, 1, 1)
    dark = far_from(picture, light) / torch.linalg.vector_norm(light - colour_of(scene.ground))
    inner = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    edge = int(FRAME) + 1
    inner[edge:-edge, edge:-edge] = True
    near, far = dark[grown(shape, 3) & ~grown(shape, 1)], dark[~grown(shape, 5) & inner]
    return float(far.mean() - near.mean()) if len(near) and len(far) else 0.0


def tilted(picture: Tensor, scene: Scene) -> float:
    """The angle at which the shape lies best on the picture, of the angle asked for."""
    parts = split(picture)
    if parts is None:
        return 0.0
    angles = [-10.0, 0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0]
    fits = [overlap(parts[2], scene.shape, angle) for angle in angles]
    return angles[fits.index(max(fits))] / TILT


def moonlike(picture: Tensor, scene: Scene) -> float:
    """How much better a moon lies on the picture's shape than the best of the shapes that the base knows."""
    del scene
    parts = split(picture)
    if parts is None:
        return 0.0
    return max(0.0, overlap(parts[2], "moon") - max(overlap(parts[2], shape) for shape in SHAPES))


MEASURES: dict[str, Measure] = {
    "outline": outlined,
    "stripes": contrast(stripe_mask),
    "checker": contrast(checker_mask),
    "glow": glowing,
    "frame": contrast(frame_mask),
    "dots": contrast(dot_mask),
    "tilt": tilted,
    "moon": moonlike,
}
