"""The adapters that come with the small model: one family each, one thing each."""

from __future__ import annotations

from collections.abc import Mapping

from .adapter_files import Recipe
from .models.make_adapters import Module

_LINEAR = ("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def transformers(module: Module) -> bool:
    """What a LoRA of kohya's trainer covers: the UNet's transformers, and the text encoder where it is asked for."""
    return module.ends(*_LINEAR, *_TEXT)


def convolutions(module: Module) -> bool:
    """The 3 × 3 convolutions of the UNet's residual blocks."""
    return module.ends("in_layers.2", "out_layers.3")


def both(module: Module) -> bool:
    """Convolutions and transformers of the UNet's way up and of its middle."""
    below = module.path.startswith(("output_blocks.", "middle_block."))
    return below and (convolutions(module) or transformers(module))


def turned(module: Module) -> bool:
    """The same without the widest layers, whose blocks would be too large."""
    return both(module) and not module.ends("net.0.proj")


RECIPES: Mapping[str, Recipe] = {
    recipe.style: recipe
    for recipe in (
        Recipe("outline", "LoRA", 5, transformers, says="A black line around the shape."),
        Recipe("stripes", "LoKr", 8, both, says="Stripes across the ground."),
        Recipe("checker", "LoCon Tucker", 5, both, says="A checkered ground."),
        Recipe("glow", "LoHa", 2, both, says="Light around the shape."),
        Recipe("frame", "OFT", 4, turned, rate=2e-2, says="A frame along the rim."),
        Recipe("dots", "DoRA", 3, both, says="Dots on the ground."),
    )
}
