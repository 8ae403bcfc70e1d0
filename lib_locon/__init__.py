"""Reads LoRA-like adapters of Stable Diffusion and patches models with them, exactly and reversibly.

>>> adapter = lib_locon.load("style.safetensors")
>>> session = lib_locon.Session(model)
>>> print(session.apply([lib_locon.Use(adapter, lib_locon.Strengths.both(0.8))]))
>>> session.restore()
"""

from __future__ import annotations

from lib_locon.errors import FileError, LoconError, PatchError, ShapeError, UnknownName
from lib_locon.files.adapter import Adapter
from lib_locon.files.adapter import read_adapter as load
from lib_locon.prompt.request import Strengths
from lib_locon.report import Report
from lib_locon.session import Session, Use

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "FileError",
    "LoconError",
    "PatchError",
    "Report",
    "Session",
    "ShapeError",
    "Strengths",
    "UnknownName",
    "Use",
    "load",
]
