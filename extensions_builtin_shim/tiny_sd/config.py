"""Sizes of a model: the same module tree, narrow for tests or at Stable Diffusion 1.5's true width."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Every number that decides a weight's shape, and the few that decide how the weights are used.

    `attention_levels` index `channel_mult`: level 0 is the full resolution, each next level is half of it.
    """

    model_channels: int
    norm_groups: int
    heads: int
    context_dim: int
    clip_hidden: int
    clip_heads: int
    clip_intermediate: int
    clip_vocab: int
    clip_max_length: int
    image_size: int
    clip_layers: int = 12
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    transformer_depth: int = 1
    in_channels: int = 4
    out_channels: int = 4

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built, here rather than deep inside a layer."""
        if self.context_dim != self.clip_hidden:
            raise ValueError(f"the UNet reads {self.context_dim} channels, the text model gives {self.clip_hidden}")
        for part, whole, what in (
            (self.norm_groups, self.model_channels, "model_channels into norm_groups"),
            (self.heads, self.model_channels, "model_channels into heads"),
            (self.clip_heads, self.clip_hidden, "clip_hidden into clip_heads"),
        ):
            if whole % part:
                raise ValueError(f"cannot divide {what}: {whole} / {part}")

    @classmethod
    def tiny(cls) -> Config:
        """Narrow and quick, with every module that SD1.5 has (391 UNet leaves, 12 CLIP layers)."""
        return cls(
            model_channels=16,
            norm_groups=8,
            heads=2,
            context_dim=64,
            clip_hidden=64,
            clip_heads=4,
            clip_intermediate=256,
            clip_vocab=512,
            clip_max_length=32,
            image_size=32,
        )

    @classmethod
    def sd15(cls) -> Config:
        """The true sizes: 859,520,964 UNet and 123,060,480 CLIP parameters. For the meta device and benchmarks."""
        return cls(
            model_channels=320,
            norm_groups=32,
            heads=8,
            context_dim=768,
            clip_hidden=768,
            clip_heads=12,
            clip_intermediate=3072,
            clip_vocab=49408,
            clip_max_length=77,
            image_size=64,
        )
