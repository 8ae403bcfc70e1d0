"""The whole model, laid out and named as the host holds `shared.sd_model` in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

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
    """A fixed map between pictures and latents, in place of SD1's autoencoder. Exactly invertible, nothing is learnt.

    Each square of `patch` pixels becomes one latent of all its numbers (space to depth), mixed by an orthogonal matrix.
    For single pixels that is three columns of a Hadamard matrix, which gives four latents as SD1 has; else it is the
    identity. A picture between 0 and 1 with ordinary contrast has latents of variance near 1, which the noise schedule
    expects.
    """

    encoder: Tensor
    decoder: Tensor

    def __init__(self, patch: int = 1) -> None:
        super().__init__()
        self.patch = patch
        if patch == 1:
            rows = [[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]
            matrix = torch.tensor(rows, device="cpu")
        else:
            matrix = torch.eye(3 * patch**2, device="cpu")
        self.register_buffer("encoder", matrix)
        # the columns are orthogonal and equally long, so the way back is the transpose over their squared length
        self.register_buffer("decoder", matrix.T.contiguous() / float(matrix[:, 0].square().sum()))

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W), 0 to 1 -> latents (B, 4, H, W), or (B, 3·patch², H/patch, W/patch)."""
        parts = functional.pixel_unshuffle(pictures * 2 - 1, self.patch)
        return torch.einsum("lc,bchw->blhw", self.encoder.to(parts.dtype), parts)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pictures (B, 3, H, W), around 0 to 1 and not clamped."""
        parts = torch.einsum("cl,blhw->bchw", self.decoder.to(latents.dtype), latents)
        return functional.pixel_shuffle(parts, self.patch) / 2 + 0.5


class TinySD(nn.Module):
    """Text-to-image diffusion. See `TinySD.random` for one that is ready to run."""

    alphas_cumprod: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = DiffusionWrapper(config)
        self.cond_stage_model = CondStage(config)
        self.first_stage_model = FirstStage(config.patch)
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
        """Noise in x (B, C, H, W) at timesteps t (B,) int64; given back in x's dtype, computed in the weights'."""
        dtype = next(self.model.parameters()).dtype
        guess: Tensor = self.model(x.to(dtype), t, context.to(dtype)).to(x.dtype)
        if self.config.prediction == "eps":
            return guess
        kept = self.alphas_cumprod[t][:, None, None, None]
        return (x - kept.sqrt() * guess) / (1 - kept).sqrt()
