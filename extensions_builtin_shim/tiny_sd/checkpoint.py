"""The model as a file, under the names that SD1 checkpoints use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lib_locon.files.reader import SafetensorsFile

from .config import Config
from .model import TinySD

CONFIG_KEY = "tiny_sd_config"
CHECKPOINT = Path(__file__).parent / "models" / "Stable-diffusion" / "tiny_sd.safetensors"
"""The trained model (see docs/tiny_sd.md)."""


def checkpoint_name(name: str) -> str:
    """A parameter's name in the file. The host's wrappers exist in memory only."""
    return ".".join(part for part in name.split(".") if part != "wrapped")


def save(model: TinySD, path: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Write all weights and fixed maps, each in its dtype, with the sizes and `texts` in the header."""
    tensors = {checkpoint_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={CONFIG_KEY: json.dumps(asdict(model.config)), **(texts or {})})


def load(path: str | Path) -> TinySD:
    """The model in a file that `save` wrote, on the CPU in the file's dtypes.

    A file without the sizes (another tool may have rewritten it) is taken for a tiny one; missing, extra or
    misshapen tensors raise RuntimeError, and a file that is no safetensors file FileError.
    """
    file = SafetensorsFile(path)
    model = TinySD.skeleton(read_config(file.metadata))
    live = {checkpoint_name(name): name for name in model.state_dict()}
    with file.tensors() as data:
        stored = {live.get(name, name): data.get_tensor(name) for name in file.entries}
    model.load_state_dict(stored, assign=True)
    return model


def load_trained(path: str | Path = CHECKPOINT) -> TinySD:
    """The trained model in fp32: the file holds fp16, in which a processor is slow and less exact."""
    return load(path).float()


def read_config(metadata: dict[str, str]) -> Config:
    """The sizes from a file's header, or the tiny ones."""
    if CONFIG_KEY not in metadata:
        return Config.tiny()
    stored: dict[str, Any] = json.loads(metadata[CONFIG_KEY])
    # JSON knows no tuples
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    return Config(**fields)
