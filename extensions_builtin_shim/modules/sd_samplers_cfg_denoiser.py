"""What stands around each call of the denoising network in the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extensions_builtin_shim.tiny_sd import TinySD
from extensions_builtin_shim.tiny_sd.sampler import timesteps

from . import script_callbacks
from ._absent import absent

if TYPE_CHECKING:
    from .processing import StableDiffusionProcessing

__getattr__ = absent(__name__)


class CFGDenoiser:
    """One for each image; `p` is the job, `step` how many steps are done."""

    def __init__(self, p: StableDiffusionProcessing, model: TinySD, prompt: str) -> None:
        self.p = p
        self.step = 0
        self.total_steps = p.steps
        self._model = model
        self._prompt = prompt
        self._texts: Tensor | None = None

    def announce(self, step: int, steps: int, latents: Tensor) -> None:
        """Tells the extensions of the call that comes next. Without listeners it costs nothing."""
        self.step, self.total_steps = step, steps
        if not script_callbacks.callback_map["callbacks_cfg_denoiser"]:
            return
        cond, uncond = self._encoded()
        clean = self._model.alphas_cumprod[timesteps(steps)[step]]
        sigma = ((1 - clean) / clean).sqrt().expand(len(latents))
        params = script_callbacks.CFGDenoiserParams(latents, None, sigma, step, steps, cond, uncond, self)
        script_callbacks.cfg_denoiser_callback(params)

    def _encoded(self) -> tuple[Tensor, Tensor]:
        # encoded once, at the first step: in the host too the text does not follow what a callback does to the weights
        if self._texts is None:
            with torch.no_grad():
                self._texts = self._model.learned_conditioning([self._prompt, self.p.negative_prompt])
        return self._texts[:1], self._texts[1:]
