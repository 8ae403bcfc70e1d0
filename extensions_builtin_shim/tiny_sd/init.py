"""Random weights that paint: pictures with shapes in them, different for each prompt, before any training.

Plain unit-variance weights pass the noise through and drown the deep layers. The numbers here were chosen by looking:
soft patches of colour, and a change of any one layer shows.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from .unet import ResBlock

# A 3x3 blur of unit energy. Kernels lean towards it, so that noise turns into patches rather than into more noise.
BLUR = ((1 / 6, 1 / 3, 1 / 6), (1 / 3, 2 / 3, 1 / 3), (1 / 6, 1 / 3, 1 / 6))
# How much of a kernel is plain noise beside the blur: without any, there would be no edges.
ROUGHNESS = 0.35
# What the way up takes from the way down, against what comes from the deeper levels; their squares add up to 2. Equal
# parts would halve the deeper levels' say twelve times over.
RECALLED, CARRIED = 0.7, math.sqrt(2 - 0.7**2)

# How much louder or quieter than unit variance a layer speaks, by the end of its name.
GAINS = {
    "attn2.to_q": 1.5,
    "attn2.to_k": 1.5,
    "attn2.to_v": 1.5,
    "attn2.to_out.0": 1.5,
    "proj_out": 1.5,
    "self_attn.out_proj": 0.5,
    "mlp.fc2": 0.5,
    "position_embedding": 0.3,
}


def gain_of(name: str) -> float:
    """The gain of the module called `name`; 1 for most."""
    return next((gain for suffix, gain in GAINS.items() if name.endswith(suffix)), 1.0)


def normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Standard normal numbers, fp32 on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def weight_for(module: nn.Module, name: str, shape: torch.Size, generator: Generator) -> Tensor:
    """An fp32 weight for one of the kinds of layer that the model is made of."""
    noise = normal(shape, generator)
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        return 1 + 0.1 * noise
    if isinstance(module, nn.Embedding):
        return gain_of(name) * noise
    if shape[2:] == (3, 3):
        mixing = normal((*shape[:2], 1, 1), generator)
        noise = mixing * torch.tensor(BLUR, device="cpu") + ROUGHNESS * noise
    return gain_of(name) / math.sqrt(shape[1]) * noise


def prefer_carried(block: ResBlock) -> None:
    """Turn down the inputs that `block` recalls from the way down, and the others up."""
    for layer in (block.in_layers[2], block.skip_connection):
        if block.recalled and isinstance(layer, nn.Conv2d):
            layer.weight[:, : -block.recalled] *= CARRIED
            layer.weight[:, -block.recalled :] *= RECALLED


@torch.no_grad()
def fill(model: nn.Module, generator: Generator) -> None:
    """Give every parameter (on the meta device until now) its numbers, in the order of the modules."""
    for name, module in model.named_modules():
        for field, parameter in list(module.named_parameters(recurse=False)):
            if field == "bias":
                value = 0.1 * normal(parameter.shape, generator)
            else:
                value = weight_for(module, name, parameter.shape, generator)
            setattr(module, field, nn.Parameter(value))
    for module in model.modules():
        if isinstance(module, ResBlock):
            prefer_carried(module)
