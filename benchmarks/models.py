"""Models of true shapes with random weights: what the numbers are has no say in how long a copy or a product takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import sdxl
from benchmarks.memory import available
from extensions_builtin_shim.tiny_sd import Config, TinySD

MODELS = ("tiny", "sd15", "sdxl", "sdxl-small")
SMALL = 16  # numbers along the longest axis of a weight of the last
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COPIES = 3.5  # the model, the floor's copy, the engine's copies, and room for temporaries


def skeleton(name: str) -> nn.Module:
    """The named model without memory, on the meta device."""
    if name == "sdxl":
        return tree(sdxl.shapes())
    if name == "sdxl-small":
        return tree({path: tuple(min(size, SMALL) for size in shape) for path, shape in sdxl.shapes().items()})
    return TinySD.skeleton(Config.tiny() if name == "tiny" else Config.sd15())


def random_model(name: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The named model on the CPU, the same for the same seed. Raises MemoryError where it would not fit."""
    model = skeleton(name).to(dtype)
    need = int(COPIES * sum(parameter.nbytes for parameter in model.parameters()))
    free = available()
    if free is not None and free < need:
        raise MemoryError(f"{name} in {dtype} needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    model.to_empty(device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False).uniform_(-0.05, 0.05, generator=generator)
    return model.eval()


def save_checkpoint(model: nn.Module, path: Path) -> Path:
    """Writes the model's file: as real ones, without the levels that the host puts into a loaded model."""
    save_file({name.replace(".wrapped.", "."): weight for name, weight in model.named_parameters()}, path)
    os.utime(path, ns=(0, 0))  # a file of this very second is not relied on
    return path


def tree(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Nested modules, on the meta device, that hold parameters of these paths and shapes and can do nothing else."""
    root = nn.Module()
    for path, shape in shapes.items():
        *parents, name = path.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return root
