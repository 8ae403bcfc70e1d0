"""The loaded models, and which of them is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from extensions_builtin_shim.tiny_sd import TinySD

from . import extra_networks, script_callbacks
from ._absent import absent

__getattr__ = absent(__name__)


class SdModelData:
    """The model in use, loaded when it is asked for the first time. Several can be loaded at once."""

    def __init__(self) -> None:
        self.sd_model: TinySD | None = None
        self.loaded_sd_models: list[TinySD] = []
        self.make: Callable[[], TinySD] = TinySD.random
        """For the launcher: where the model comes from."""
        self._lock = threading.RLock()

    def get_sd_model(self) -> TinySD:
        """The model in use."""
        with self._lock:
            return self.sd_model if self.sd_model is not None else load_model()

    def set_sd_model(self, model: nn.Module) -> None:
        """Uses another model, as when a checkpoint is chosen that is still loaded: nothing is announced."""
        self.sd_model = cast(TinySD, model)
        if self.sd_model not in self.loaded_sd_models:
            self.loaded_sd_models.append(self.sd_model)

    def clear(self) -> None:
        """Forgets all models."""
        self.sd_model = None
        self.loaded_sd_models.clear()


model_data = SdModelData()


def load_model() -> TinySD:
    """A new model object: announced first, then its empty prompt is encoded, for which an empty set is activated."""
    model = model_data.make()
    model_data.set_sd_model(model)
    script_callbacks.model_loaded_callback(model)
    model.cond_stage_model_empty_prompt = get_empty_cond(model)
    return model


def get_empty_cond(sd_model: TinySD) -> Tensor:
    """The encoded empty prompt. No adapter may be in it, so the host activates none."""
    from .processing import StableDiffusionProcessingTxt2Img  # it imports this module

    extra_networks.activate(StableDiffusionProcessingTxt2Img(), {})
    with torch.no_grad():
        return sd_model.learned_conditioning([""])


def reload_model_weights(weights: Mapping[str, Tensor]) -> None:
    """Another checkpoint into the model object that is there: the tensors stay, their numbers change."""
    model = model_data.get_sd_model()
    model.load_state_dict(dict(weights))
    script_callbacks.model_loaded_callback(model)
