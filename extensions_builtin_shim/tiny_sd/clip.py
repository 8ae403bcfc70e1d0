"""The text encoder: CLIP's, under the names that Hugging Face gives its parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import join_heads, split_heads
from .config import Config


class Hijacked(nn.Module):
    """A module seen through one more name. The host wraps the token embedding so, to splice in textual inversions."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) int64 -> (B, L, C)."""
        out: Tensor = self.wrapped(ids)
        return out


class Embeddings(nn.Module):
    """What a token is plus where it stands."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token_embedding = Hijacked(nn.Embedding(config.clip_vocab, config.clip_hidden))
        self.position_embedding = nn.Embedding(config.clip_max_length, config.clip_hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) int64 -> (B, L, C)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return torch.add(self.token_embedding(ids), self.position_embedding(positions))


class SelfAttention(nn.Module):
    """Each token attends to itself and to those before it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed: Tensor = self.out_proj(join_heads(functional.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return mixed


class Mlp(nn.Module):
    """Two layers with the quick GELU, x * sigmoid(1.702 x), that OpenAI trained CLIP-L with."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, inner)
        self.fc2 = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        hidden = self.fc1(x)
        out: Tensor = self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return out


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each normed first and added to what came in."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.clip_hidden, config.clip_heads)
        self.layer_norm1 = nn.LayerNorm(config.clip_hidden)
        self.mlp = Mlp(config.clip_hidden, config.clip_intermediate)
        self.layer_norm2 = nn.LayerNorm(config.clip_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return torch.add(x, self.mlp(self.layer_norm2(x)))


class Encoder(nn.Module):
    """The stack of layers, one level of its own because the names have it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.clip_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nn.Module):
    """Token ids to one vector for each position."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.clip_hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) int64, L <= clip_max_length -> (B, L, C)."""
        out: Tensor = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        return out


class ClipTextModel(nn.Module):
    """The outermost level, which adds only `text_model.` to every name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) int64 -> (B, L, C), the last layer's output after the final norm."""
        out: Tensor = self.text_model(ids)
        return out
