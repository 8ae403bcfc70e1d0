"""What all parts of the host share: command line, settings, state, and the model that is in use."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from ._absent import absent
from .options import OptionInfo, Options
from .shared_state import State

__getattr__ = absent(__name__)

cmd_opts = argparse.Namespace()
"""Filled by the launcher. `lora_dir` is always in it: the flag exists even without the built-in Lora."""
options_templates: dict[str, OptionInfo] = {}
opts = Options(options_templates)
state = State()
_HTML = Path(__file__).resolve().parent.parent / "html"


def html(filename: str) -> str:
    """A template of the host's page."""
    return (_HTML / filename).read_text(encoding="utf-8")


class _Shared(ModuleType):
    """Makes `shared.sd_model` ask for the model that is in use, and load it when it is asked for the first time."""

    @property
    def sd_model(self) -> nn.Module | None:
        from . import sd_models  # it imports this module

        return sd_models.model_data.get_sd_model()

    @sd_model.setter
    def sd_model(self, model: nn.Module) -> None:
        from . import sd_models

        sd_models.model_data.set_sd_model(model)


sys.modules[__name__].__class__ = _Shared
