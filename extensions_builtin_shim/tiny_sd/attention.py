"""The transformer half of the UNet: pixels attend to each other and to the text. Names are ldm's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import Config


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads*D) -> (B, heads, L, D)."""
    batch, length, channels = x.shape
    return x.view(batch, length, heads, channels // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads*D)."""
    return x.transpose(1, 2).flatten(-2)


class CrossAttention(nn.Module):
    """Multi-head attention from pixels to `context`, or to the pixels themselves without one."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        # SD1 keeps a dropout beside the projection, hence the name to_out.0
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, N, C), context (B, L, context_dim) -> (B, N, C)."""
        source = x if context is None else context
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(x), self.to_k(source), self.to_v(source)))
        mixed: Tensor = self.to_out(join_heads(functional.scaled_dot_product_attention(q, k, v)))
        return mixed


class GatedProjection(nn.Module):
    """GEGLU: one projection gives values and gates."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, inner)."""
        projected: Tensor = self.proj(x)
        value, gate = projected.chunk(2, dim=-1)
        return value * functional.gelu(gate)


class FeedForward(nn.Module):
    """Gated two-layer network, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # index 1 is SD1's dropout; it holds no weights but owns the number
        self.net = nn.Sequential(
            GatedProjection(channels, channels * 4), nn.Identity(), nn.Linear(channels * 4, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        out: Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each normed first and added to what came in."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, config.heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, config.context_dim, config.heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, L, context_dim) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return torch.add(x, self.ff(self.norm3(x)))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map. proj_in and proj_out are 1x1 convolutions, as in SD1."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config) for _ in range(config.transformer_depth)
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), context (B, L, context_dim) -> (B, C, H, W)."""
        pixels = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            pixels = block(pixels, context)
        image = pixels.transpose(1, 2).reshape(x.shape)
        return torch.add(x, self.proj_out(image))
