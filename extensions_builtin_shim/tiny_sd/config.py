"""Sizes of a model: the same module tree, narrow for tests or at Stable Diffusion 1.5's true width."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Every number that decides a weight's shape, and the few that decide how the weights are used.

    `attention_levels` index `channel_mult`: level 0 is the full resolution, each next level is half of it. A picture
    has `image_size` pixels each way, and the first stage makes one latent of each `patch` × `patch` of them.
    What the UNet's numbers mean is `prediction`: the noise ("eps", as in SD1) or the clean latents ("sample").
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
    patch: int = 1
    prediction: str = "eps"

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built, here rather than deep inside a layer."""
        if self.context_dim != self.clip_hidden:
            raise ValueError(f"the UNet reads {self.context_dim} channels, the text model gives {self.clip_hidden}")
        if self.prediction not in ("eps", "sample"):
            raise ValueError(f'the prediction must be "eps" or "sample", not {self.prediction!r}')
        for part, whole, what in (
            (self.norm_groups, self.model_channels, "model_channels into norm_groups"),
            (self.heads, self.model_channels, "model_channels into heads"),
            (self.clip_heads, self.clip_hidden, "clip_hidden into clip_heads"),
            (self.patch, self.image_size, "image_size into patch"),
        ):
            if whole % part:
                raise ValueError(f"cannot divide {what}: {whole} / {part}")

    @property
    def latent_size(self) -> int:
        """How many latents a picture has each way."""
        return self.image_size // self.patch

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
    def trained(cls) -> Config:
        """The model that `train` makes: pictures of 32 × 32, learnt on one core in an hour.

        Every module of SD1.5 but two: all levels are equally wide here, so that the skips into levels 1 and 2 need no
        convolution. The UNet says the clean latents: a patch of noise has 48 numbers to be known, a patch of the
        drawings few, and few pass through narrow layers.
        """
        return cls(
            model_channels=56,
            norm_groups=8,
            heads=2,
            context_dim=48,
            clip_hidden=48,
            clip_heads=3,
            clip_intermediate=192,
            clip_vocab=512,
            clip_max_length=77,
            image_size=32,
            channel_mult=(1, 1, 1, 1),
            in_channels=48,
            out_channels=48,
            patch=4,
            prediction="sample",
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
