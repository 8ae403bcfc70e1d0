"""The adapters that come with the small model: one family each, one thing each."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .adapter_files import Recipe
from .models.make_adapters import Module

_LINEAR = ("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_LATE = 6
"""The way up from here on is at 4 × 4 and 8 × 8 patches, where patterns are made."""


def transformers(module: Module) -> bool:
    """What a LoRA of kohya's trainer covers: the UNet's transformers, and the text encoder where it is asked for."""
    return module.ends(*_LINEAR, *_TEXT)


def convolutions(module: Module) -> bool:
    """The 3 × 3 convolutions of the UNet's residual blocks."""
    return module.ends("in_layers.2", "out_layers.3")


def up(module: Module) -> bool:
    """Convolutions and transformers of the UNet's way up."""
    return module.path.startswith("output_blocks.") and (convolutions(module) or transformers(module))


def both(module: Module) -> bool:
    """The same, and the middle."""
    middle = module.path.startswith("middle_block.") and (convolutions(module) or transformers(module))
    return middle or up(module)


def turned(module: Module) -> bool:
    """The same without the widest layers, whose blocks would be too large."""
    return both(module) and not module.ends("net.0.proj")


def late(module: Module) -> bool:
    """The second half of the way up."""
    return up(module) and int(re.findall(r"\d+", module.path)[0]) >= _LATE


def convolutions_up(module: Module) -> bool:
    """The way up without its transformers: for what depends on the neighbours alone."""
    return up(module) and convolutions(module)


RECIPES: Mapping[str, Recipe] = {
    recipe.style: recipe
    for recipe in (
        Recipe("outline", "LoRA", 3, transformers, says="A black line around the shape."),
        Recipe("tilt", "LoCon", 2, both, says="The shape leans to the right."),
        Recipe("checker", "LoCon Tucker", 4, both, says="A checkered ground."),
        Recipe("glow", "LoHa", 3, convolutions_up, steps=500, says="Light around the shape."),
        Recipe("stripes", "LoKr", 8, up, says="Stripes across the ground."),
        Recipe("dots", "DoRA", 4, late, says="Dots on the ground."),
        Recipe("frame", "OFT", 4, turned, rate=2e-2, says="A frame along the rim."),
        Recipe("moon", "LoRA", 2, transformers, steps=500, text=True, word="moon", says="A shape new to the model."),
    )
}
