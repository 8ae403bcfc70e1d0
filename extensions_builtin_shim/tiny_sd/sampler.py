"""From a prompt to a picture: deterministic DDIM with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from .model import TIMESTEPS, FirstStage, TinySD

OnStep = Callable[[int, int, Tensor], None]


def timesteps(steps: int) -> list[int]:
    """`steps` timesteps from the noisiest down, evenly spaced; after the last comes the clean picture."""
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"steps must be 1 to {TIMESTEPS}, not {steps}")
    return [TIMESTEPS - 1 - index * TIMESTEPS // steps for index in range(steps)]


def initial_noise(model: TinySD, seed: int, batch_size: int) -> Tensor:
    """Latents (B, C, H, W) fp32 on the model's device. Picture i is that of `seed + i` alone, as in the host."""
    size = model.config.latent_size
    noise = [
        torch.randn(model.config.in_channels, size, size, generator=torch.Generator("cpu").manual_seed(seed + index))
        for index in range(batch_size)
    ]
    return torch.stack(noise).to(model.alphas_cumprod.device)


def as_pictures(first_stage: FirstStage, latents: Tensor) -> Tensor:
    """The nearest latents that real pictures could have had: (B, C, H, W) -> the same.

    Guidance and untrained weights overshoot. Clipping alone would leave flat black and white, so the brightest half
    per cent of each picture is clipped and the rest scaled back to fit. A guess within range stays as it is.
    """
    signed = first_stage.decode(latents) * 2 - 1
    reach = signed.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)[:, None, None, None]
    return first_stage.encode((signed / reach).clamp(-1, 1) / 2 + 0.5)


def guided_noise(model: TinySD, x: Tensor, t: int, context: Tensor, guidance: float) -> Tensor:
    """Noise in x (B, C, H, W), pushed away from the negative prompt. context (2B, L, C): prompt, then negative."""
    times = torch.full((context.shape[0],), t, device=x.device)
    wanted, unwanted = model.apply_model(torch.cat([x, x]), times, context).chunk(2)
    return unwanted + guidance * (wanted - unwanted)


@torch.no_grad()
def sample(
    model: TinySD,
    prompt: str | Sequence[str] | Tensor,
    negative_prompt: str = "",
    *,
    seed: int,
    steps: int,
    guidance: float = 5.0,
    batch_size: int = 1,
    on_step: OnStep | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W) fp32, 0 to 1. Picture i is that of `seed + i`, and of prompt i where several are given.

    Prompts may be encoded already, (2B, L, C): the B of them, then their negative ones.

    `on_step(step, steps, latents)` runs before each step, from 0, with latents (B, C, H, W): weights changed there
    count from that step on, and whatever it raises ends the sampling. The text is encoded once, at the start.
    """
    plan = timesteps(steps)
    if isinstance(prompt, Tensor):
        context = prompt
    else:
        prompts = [prompt] * batch_size if isinstance(prompt, str) else list(prompt)
        context = model.learned_conditioning([*prompts, *[negative_prompt] * len(prompts)])
    x = initial_noise(model, seed, len(context) // 2)
    alphas = [float(model.alphas_cumprod[t]) for t in plan] + [1.0]
    for step, t in enumerate(plan):
        if on_step is not None:
            on_step(step, steps, x)
        noise = guided_noise(model, x, t, context, guidance)
        here, after = alphas[step], alphas[step + 1]
        clean = as_pictures(model.first_stage_model, (x - (1 - here) ** 0.5 * noise) / here**0.5)
        if model.config.prediction == "sample":
            # What was cut off the picture must not stay in the noise, or it comes back with the opposite sign. (Random
            # weights, which guess noise, are out of range at every step: for them this would leave nothing else.)
            noise = (x - here**0.5 * clean) / (1 - here) ** 0.5
        x = after**0.5 * clean + (1 - after) ** 0.5 * noise
    return model.first_stage_model.decode(x).clamp(0, 1)


def to_image(picture: Tensor) -> Image.Image:
    """One picture (3, H, W) or (1, 3, H, W), 0 to 1, as an 8-bit RGB image."""
    if picture.ndim == 4:
        picture = picture.squeeze(0)
    levels = (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous()
    height, width, _ = levels.shape
    # Through bytes, so that numpy is not needed.
    return Image.frombytes("RGB", (width, height), bytes(levels.flatten().tolist()))
