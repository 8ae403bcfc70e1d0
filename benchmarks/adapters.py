"""Random adapters as trainers write them: safetensors, fp16, kohya's names, every module that kohya's C3Lier trains.

For SD1.5 these are 350 modules: 278 of the UNet (linear layers and convolutions of its blocks), 72 of the text encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from lib_locon.families import SUFFIXES
from lib_locon.models.table import TargetTable

Shape: TypeAlias = tuple[int, ...]
Make: TypeAlias = Callable[[Shape, Generator], dict[str, Tensor]]

_TRAINED = {
    "unet": ("down_blocks_", "mid_block_", "up_blocks_"),
    "te1": ("text_model_encoder_layers_",),
    "te2": ("text_model_encoder_layers_",),
}
"""Component → how the names of trained modules begin, in kohya's spelling."""


def trained(table: TargetTable) -> dict[str, str]:
    """Module as kohya names it → path of its weight: all weights with two axes or more, inside the blocks."""
    found: dict[str, str] = {}  # by path: the other spellings of a name come after kohya's own
    for component, starts in _TRAINED.items():
        prefix = "lora_te_" if component == "te1" and "te2" not in table.aliases else f"lora_{component}_"
        for alias, target in table.aliases.get(component, {}).items():
            views = target.views.get("weight", ())
            # several views are what a fused projection's name stands for: C3Lier trains its parts
            if len(views) == 1 and alias.startswith(starts) and len(table.shapes[views[0].path]) > 1:
                found.setdefault(views[0].path, prefix + alias)
    return {name: path for path, name in found.items()}


def locon(shape: Shape, generator: Generator, rank: int) -> dict[str, Tensor]:
    """A convolution's `down` has the kernel, its `up` is 1×1."""
    up = _random((shape[0], rank, *(1 for _ in shape[2:])), generator)
    return {"lora_up.weight": up, "lora_down.weight": _random((rank, *shape[1:]), generator), "alpha": _alpha(rank)}


def dora(shape: Shape, generator: Generator, rank: int) -> dict[str, Tensor]:
    """LoCon with a length for every row of the weight."""
    lengths = 1 + _random((shape[0], *(1 for _ in shape[1:])), generator)
    return {**locon(shape, generator, rank), "dora_scale": lengths}


def loha(shape: Shape, generator: Generator, rank: int) -> dict[str, Tensor]:
    """Without a core: convolutions as matrices."""
    sizes = {"a": (shape[0], rank), "b": (rank, prod(shape[1:]))}
    factors = {f"hada_w{i}_{side}": _random(size, generator) for i in (1, 2) for side, size in sizes.items()}
    return {**factors, "alpha": _alpha(rank)}


def lokr(shape: Shape, generator: Generator, factor: int) -> dict[str, Tensor]:
    """Both matrices whole, as LyCORIS makes them with `factor=8, full_matrix=True`."""
    (a, c), (b, d) = _split(shape[0], factor), _split(shape[1], factor)
    return {"lokr_w1": _random((a, b), generator), "lokr_w2": _random((c, d, *shape[2:]), generator)}


KINDS: Mapping[str, Make] = {
    "locon-r8": partial(locon, rank=8),
    "locon-r32": partial(locon, rank=32),
    "lokr-f8": partial(lokr, factor=8),
    "loha-r32": partial(loha, rank=32),
    **({"dora-r32": partial(dora, rank=32)} if "dora_scale" in SUFFIXES else {}),
}
"""What can be made; a kind is here only when lib_locon reads it."""

RANKS: Mapping[str, int] = {"locon-r8": 8, "locon-r32": 32, "lokr-f8": 0, "loha-r32": 2 * 32, "dora-r32": 32}
"""Multiplications and additions for each number of ΔW in the products that a kind is made of."""


def write(path: Path, kind: str, table: TargetTable, seed: int = 0) -> Path:
    """Writes a file of the kind for all trained modules of the model; the same bytes for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{module}.{suffix}": tensor
        for module, weight in trained(table).items()
        for suffix, tensor in KINDS[kind](table.shapes[weight], generator).items()
    }
    save_file(tensors, path)
    return path


def _random(shape: Shape, generator: Generator) -> Tensor:
    return torch.empty(shape).uniform_(-0.1, 0.1, generator=generator).half()


def _alpha(rank: int) -> Tensor:
    return torch.tensor(rank / 2)


def _split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, the smaller first, one of them `factor` where that divides."""
    if size % factor:
        raise ValueError(f"{size} cannot be divided by {factor}")
    return min(factor, size // factor), max(factor, size // factor)
