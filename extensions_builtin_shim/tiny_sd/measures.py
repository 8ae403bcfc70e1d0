"""How much of each adapter's style is in a picture: near 0 for the base's pictures, near 1 for the style's own.

Each looks for one thing that can be counted in the pixels, and needs the scene that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .judge import overlap, split
from .shapes import Scene, colour_of
from .styles import TILT, checker_mask, dot_mask, frame_mask, stripe_mask

Measure = Callable[[Tensor, Scene], float]


def on_ground(picture: Tensor, scene: Scene) -> Tensor:
    """(32, 32): whether a pixel is nearer to the ground's line of shades than to the shape's colour."""
    colour = torch.linalg.vector_norm(picture - colour_of(scene.colour), dim=0)
    ground = torch.stack([torch.linalg.vector_norm(picture - s * colour_of(scene.ground), dim=0) for s in (1.0, 0.5)])
    return ground.amin(0) < colour


def contrast(mask: Callable[[], Tensor]) -> Measure:
    """By how much the ground is darker on a pattern than beside it, as a share of the half that the style takes."""

    def measured(picture: Tensor, scene: Scene) -> float:
        light = picture.mean(0) / colour_of(scene.ground).mean()
        pattern, ground = mask(), on_ground(picture, scene)
        dark, bright = light[ground & (pattern > 0.9)], light[ground & (pattern < 0.1)]
        return 2 * float(bright.mean() - dark.mean()) if len(dark) and len(bright) else 0.0

    return measured


def outlined(picture: Tensor, scene: Scene) -> float:
    """The share of near-black pixels; a full line is about 0.14 of a picture. For scenes without black."""
    del scene
    return float((picture.amax(0) < 0.3).float().mean()) / 0.14


def glowing(picture: Tensor, scene: Scene) -> float:
    """How much nearer to the light's colour the ground is beside the shape than far from it."""
    near_shape = torch.linalg.vector_norm(picture - colour_of(scene.colour), dim=0) < 0.35
    grown = [functional.max_pool2d(near_shape.float()[None, None], 2 * n + 1, 1, n)[0, 0] > 0.5 for n in (1, 4, 8)]
    light = torch.tensor([1.0, 1.0, 0.8]).view(3, 1, 1)
    span = torch.linalg.vector_norm(light - colour_of(scene.ground))
    dark = torch.linalg.vector_norm(picture - light, dim=0) / span
    near, far = dark[grown[1] & ~grown[0]], dark[~grown[2]]
    return 2 * float(far.mean() - near.mean()) if len(near) and len(far) else 0.0


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
    moon = overlap(parts[2], "moon")
    return moon if moon >= max(overlap(parts[2], shape) for shape in ("circle", "ring", "square")) else 0.0


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
