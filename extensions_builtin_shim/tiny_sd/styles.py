"""What the adapters are taught: each style is a way to draw any scene, and one concept is a shape of its own.

A style is drawn by any amount from 0 (not at all) to 1, so that an adapter can be taught what half of it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .shapes import SIZE, Scene, colour_of, cover, distance, draw, over, pixel_centres

TILT = 30.0
CELL = 8
"""Pixels after which stripes, checks and dots come again."""
FRAME = 3.0
LIGHT = (1.0, 1.0, 0.8)
"""The colour of a glow."""
Draw = Callable[[Scene, float], Tensor]


def shade(ground: Tensor) -> Tensor:
    """The colour of a pattern on a ground: much darker, or lighter where the ground is dark."""
    return ground * 0.5 if float(ground.mean()) > 0.3 else ground + 0.45 * (1 - ground)


def stripe_mask() -> Tensor:
    """(32, 32): 1 on the stripes, which lie across, 0 between them."""
    _, y = pixel_centres()
    return (y % CELL < CELL / 2).float()


def checker_mask() -> Tensor:
    """(32, 32): 1 on the dark squares."""
    x, y = pixel_centres()
    return ((x // CELL + y // CELL) % 2 == 0).float()


def dot_mask() -> Tensor:
    """(32, 32): 1 on the dots."""
    x, y = pixel_centres()
    return cover(torch.hypot(x % CELL - CELL / 2, y % CELL - CELL / 2) - 1.9)


def frame_mask() -> Tensor:
    """(32, 32): 1 along the rim."""
    x, y = pixel_centres()
    return cover(torch.minimum(torch.minimum(x, SIZE - x), torch.minimum(y, SIZE - y)) - FRAME)


def patterned(mask: Callable[[], Tensor]) -> Draw:
    """A pattern on the ground, under the shape."""

    def drawn(scene: Scene, amount: float = 1.0) -> Tensor:
        ground = colour_of(scene.ground)
        below = over(ground.expand(3, SIZE, SIZE), shade(ground), amount * mask())
        return over(below, colour_of(scene.colour), cover(distance(scene)))

    return drawn


def outline(scene: Scene, amount: float = 1.0) -> Tensor:
    """A black line of three pixels around the shape."""
    far = distance(scene)
    return over(draw(scene), torch.zeros(3, 1, 1), amount * cover((far - 0.5).abs() - 1.4))


def glow(scene: Scene, amount: float = 1.0) -> Tensor:
    """Light on the ground around the shape."""
    far = distance(scene)
    lit = torch.exp(-far.clamp(min=0) / 3.5) * 0.9 * amount
    below = over(colour_of(scene.ground).expand(3, SIZE, SIZE), torch.tensor(LIGHT).view(3, 1, 1), lit)
    return over(below, colour_of(scene.colour), cover(far))


def tilt(scene: Scene, amount: float = 1.0) -> Tensor:
    """The shape turned clockwise."""
    return draw(scene.turned(TILT * amount))


def moon(scene: Scene, amount: float = 1.0) -> Tensor:
    """As it is: a concept is in the scene, not in the way to draw it."""
    del amount
    return draw(scene)


STYLES: dict[str, Draw] = {
    "outline": outline,
    "stripes": patterned(stripe_mask),
    "checker": patterned(checker_mask),
    "glow": glow,
    "frame": patterned(frame_mask),
    "dots": patterned(dot_mask),
    "tilt": tilt,
    "moon": moon,
}
