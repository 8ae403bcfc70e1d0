"""What stands around each call of the denoising network in the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from extensions_builtin_shim.tiny_sd import TinySD
from extensions_builtin_shim.tiny_sd.sampler import timesteps

from . import script_callbacks
from ._absent import absent

if TYPE_CHECKING:
    from .processing import StableDiffusionProcessing

__getattr__ = absent(__name__)


class CFGDenoiser:
    """One for each image; `p` is the job, `step` how many steps are done, `context` (2, L, C) its prompts, encoded."""

    def __init__(self, p: StableDiffusionProcessing, model: TinySD, context: Tensor) -> None:
        self.p = p
        self.step = 0
        self.total_steps = p.steps
        self._model = model
        self._context = context

    def announce(self, step: int, steps: int, latents: Tensor) -> None:
        """Tells the extensions of the call that comes next. Without listeners it costs nothing."""
        self.step, self.total_steps = step, steps
        if not script_callbacks.callback_map["callbacks_cfg_denoiser"]:
            return
        cond, uncond = self._context[:1], self._context[1:]
        clean = self._model.alphas_cumprod[timesteps(steps)[step]]
        sigma = ((1 - clean) / clean).sqrt().expand(len(latents))
        params = script_callbacks.CFGDenoiserParams(latents, None, sigma, step, steps, cond, uncond, self)
        script_callbacks.cfg_denoiser_callback(params)
