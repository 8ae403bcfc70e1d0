"""What is minimised, for the model and for its adapters alike: the error of the guess."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .model import TIMESTEPS, TinySD

MOST = 5.0
"""How much more an error in the nearly clean picture may count than one in the noisiest."""


def random_timesteps(count: int, generator: Generator) -> Tensor:
    """(count,) int64, one in each of `count` equal parts of the schedule, so that every batch sees all of it."""
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (places * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)


def noise_loss(model: TinySD, pictures: Tensor, texts: Tensor, generator: Generator) -> Tensor:
    """Mean weighted squared error. pictures (B, 3, H, W), 0 to 1; texts (B, L, C)."""
    latents = model.first_stage_model.encode(pictures)
    noise = torch.randn(latents.shape, generator=generator)
    t = random_timesteps(len(latents), generator)
    kept = model.alphas_cumprod[t][:, None, None, None]
    guess = model.apply_model(kept.sqrt() * latents + (1 - kept).sqrt() * noise, t, texts)
    # The error of the clean latents, also where noise is all that the UNet sees and only the text tells of them (the
    # noise's own error would count that for next to nothing). Towards low noise it counts more, up to a limit.
    weights = (1 / (1 - kept)).clamp(max=MOST) * (1 - kept) / kept
    error: Tensor = (guess - noise).square()
    return (weights * error).mean()
