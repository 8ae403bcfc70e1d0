"""The whole model, laid out and named as the host holds `shared.sd_model` in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .clip import ClipTextModel
from .config import Config
from .init import fill
from .tokenizer import Tokenizer
from .unet import UNet

TIMESTEPS = 1000


def scaled_linear_alphas(first: float = 0.00085, last: float = 0.012) -> Tensor:
    """(1000,) fp32: how much of the picture is left at each timestep, under SD1's noise schedule."""
    # Explicit device: a default of "meta" would otherwise swallow these numbers.
    roots = torch.linspace(first**0.5, last**0.5, TIMESTEPS, dtype=torch.float64, device="cpu")
    return torch.cumprod(1 - roots**2, dim=0).float()


class DiffusionWrapper(nn.Module):
    """Holds the UNet one level down, where the host has it: `sd_model.model.diffusion_model`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.diffusion_model = UNet(config)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """As `UNet.forward`."""
        out: Tensor = self.diffusion_model(x, t, context)
        return out


class ClipEmbedder(nn.Module):
    """Tokenizer and text model: the class that SD1's own configuration names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(config.clip_max_length, config.clip_vocab)
        self.transformer = ClipTextModel(config)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, L, C)."""
        weight = next(self.transformer.parameters())
        out: Tensor = self.transformer(self.tokenizer(texts).to(weight.device))
        return out


class CondStage(nn.Module):
    """The host's wrapper for prompt syntax around the embedder; here only its name matters."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wrapped = ClipEmbedder(config)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, L, C)."""
        out: Tensor = self.wrapped(texts)
        return out


class FirstStage(nn.Module):
    """A fixed linear map between pictures of three channels and latents of four, in place of SD1's autoencoder.

    Three columns of a Hadamard matrix: orthogonal, so the way back is the transpose over four. A picture between
    0 and 1 with ordinary contrast has latents of variance near 1, which the noise schedule expects.
    """

    encoder: Tensor
    decoder: Tensor

    def __init__(self) -> None:
        super().__init__()
        rows = [[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]
        matrix = torch.tensor(rows, device="cpu")
        self.register_buffer("encoder", matrix)
        self.register_buffer("decoder", matrix.T.contiguous() / 4)

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W), 0 to 1 -> latents (B, 4, H, W)."""
        return torch.einsum("lc,bchw->blhw", self.encoder.to(pictures.dtype), pictures * 2 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, H, W) -> pictures (B, 3, H, W), around 0 to 1 and not clamped."""
        return torch.einsum("cl,blhw->bchw", self.decoder.to(latents.dtype), latents) / 2 + 0.5


class TinySD(nn.Module):
    """Text-to-image diffusion that predicts the noise. See `TinySD.random` for one that is ready to run."""

    alphas_cumprod: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = DiffusionWrapper(config)
        self.cond_stage_model = CondStage(config)
        self.first_stage_model = FirstStage()
        self.register_buffer("alphas_cumprod", scaled_linear_alphas(), persistent=False)

    @classmethod
    def skeleton(cls, config: Config) -> TinySD:
        """All modules, no memory: parameters on the meta device, to be counted or to be given their values."""
        with torch.device("meta"):
            return cls(config).eval()

    @classmethod
    def random(cls, seed: int = 0, config: Config | None = None) -> TinySD:
        """A model with the weights that belong to `seed`, fp32 on the CPU. Leaves the global random state alone."""
        model = cls.skeleton(config or Config.tiny())
        fill(model, torch.Generator(device="cpu").manual_seed(seed))
        return model

    def learned_conditioning(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, L, C) in the text model's dtype."""
        out: Tensor = self.cond_stage_model(prompts)
        return out

    def apply_model(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Noise in x (B, 4, H, W) at timesteps t (B,) int64; given back in x's dtype, computed in the weights'."""
        dtype = next(self.model.parameters()).dtype
        noise: Tensor = self.model(x.to(dtype), t, context.to(dtype))
        return noise.to(x.dtype)
