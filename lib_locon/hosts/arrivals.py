"""Notices when another model goes on with a run: the host's refiner takes over between two steps and tells nobody."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle

TEXT_ENCODERS = ("cond_stage_model", "conditioner")
"""Where a model of the host keeps what encodes its prompts."""


class Arrivals:
    """Says of each model that was shown to it when its prompts are about to be encoded."""

    def __init__(self, tell: Callable[[nn.Module], object]) -> None:
        self._tell = tell
        self._handles: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()

    def watch(self, model: nn.Module) -> None:
        """Harmless to repeat; needed again when the host puts another text encoder into the model."""
        known = weakref.ref(model)
        for name in TEXT_ENCODERS:
            encoder = getattr(model, name, None)
            if isinstance(encoder, nn.Module) and encoder not in self._handles:
                self._handles[encoder] = encoder.register_forward_pre_hook(lambda *_: self._before(known()))

    def _before(self, model: nn.Module | None) -> None:
        # the host encodes an empty prompt while it loads a model, and keeps it: no adapter may be in that
        if model is not None and hasattr(model, "cond_stage_model_empty_prompt"):
            self._tell(model)

    def remove(self) -> None:
        """Takes everything out of the models again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
