"""The denoiser: SD1's UNet with ldm's module tree and parameter names, at any width."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import SpatialTransformer
from .config import Config


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Timesteps (B,) -> (B, channels) fp32: cosines then sines, at wavelengths from 2 pi to 20,000 pi."""
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """The 3x3 convolution used everywhere; stride 1 keeps the size, stride 2 halves it."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


class ResBlock(nn.Module):
    """Two normed convolutions with the timestep added between them, beside a skip.

    The last `recalled` of the inputs are those remembered from the way down.
    """

    def __init__(self, inputs: int, outputs: int, config: Config, recalled: int = 0) -> None:
        super().__init__()
        self.recalled = recalled
        self.in_layers = nn.Sequential(nn.GroupNorm(config.norm_groups, inputs), nn.SiLU(), conv3x3(inputs, outputs))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.model_channels * 4, outputs))
        # index 2 is SD1's dropout; it holds no weights but owns the number
        self.out_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, outputs), nn.SiLU(), nn.Identity(), conv3x3(outputs, outputs)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, inputs, H, W), emb (B, 4*model_channels) -> (B, outputs, H, W)."""
        hidden = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return torch.add(self.skip_connection(x), self.out_layers(hidden))


class Downsample(nn.Module):
    """Halve height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then smooth with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        out: Tensor = self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class Stage(nn.ModuleList):
    """Layers run one after another, each given what it asks for. A list, so that its children are named 0, 1, 2."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, 4*model_channels), context (B, L, context_dim) -> a feature map."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def down_stages(config: Config) -> Iterable[tuple[Stage, int]]:
    """The way down, each stage with the number of channels that it gives."""
    channels = config.model_channels
    yield Stage([conv3x3(config.in_channels, channels)]), channels
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            width = config.model_channels * mult
            yield res_stage(channels, width, level, config), width
            channels = width
        if level + 1 < len(config.channel_mult):
            yield Stage([Downsample(channels)]), channels


def up_stages(config: Config, skips: list[int]) -> Iterable[Stage]:
    """The way up. Each stage takes the last of `skips` (channels given on the way down) beside its input."""
    channels = skips[-1]
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for index in range(config.num_res_blocks + 1):
            width = config.model_channels * mult
            recalled = skips.pop()
            stage = res_stage(channels + recalled, width, level, config, recalled)
            channels = width
            if level > 0 and index == config.num_res_blocks:
                stage.append(Upsample(channels))
            yield stage


def res_stage(inputs: int, outputs: int, level: int, config: Config, recalled: int = 0) -> Stage:
    """A residual block, followed by attention where this level has it."""
    stage = Stage([ResBlock(inputs, outputs, config, recalled)])
    if level in config.attention_levels:
        stage.append(SpatialTransformer(outputs, config))
    return stage


class UNet(nn.Module):
    """Predicts the noise in a latent from the latent, the timestep and the text. Differentiable throughout."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model_channels = config.model_channels
        time_width = config.model_channels * 4
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        stages, skips = zip(*down_stages(config), strict=True)
        deepest = skips[-1]
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = Stage(
            [
                ResBlock(deepest, deepest, config),
                SpatialTransformer(deepest, config),
                ResBlock(deepest, deepest, config),
            ]
        )
        self.output_blocks = nn.ModuleList(up_stages(config, list(skips)))
        first = config.model_channels * config.channel_mult[0]
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, first), nn.SiLU(), conv3x3(first, config.out_channels)
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """x (B, in_channels, H, W), timesteps (B,), context (B, L, context_dim) -> noise (B, out_channels, H, W).

        All in the weights' dtype; H and W must survive halving at every level but the last.
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        kept: list[Tensor] = []
        for stage in self.input_blocks:
            x = stage(x, emb, context)
            kept.append(x)
        x = self.middle_block(x, emb, context)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, kept.pop()], dim=1), emb, context)
        noise: Tensor = self.out(x)
        return noise
