"""Names and shapes of real models and real adapters, read from ``tests/fixtures``. No values, no code.

``models/``     every parameter as the webui 1.10.1 holds it: its own classes (ldm, sgm, open_clip, mmdit, transformers)
                on the meta device, after its hijack. ``flux`` is BFL's class. ``sd35_large_mmdit`` is the transformer.
``diffusers/``  the same networks as diffusers 0.42.1 holds them.
``adapters/``   real adapters, from the tables that InvokeAI tests its converters with (commit 8e71a8a).

A table is one line a tensor: its name, and its shape as ``320x4x3x3`` (``-`` for a single number).
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterable, Mapping
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import nn

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
Shapes = dict[str, tuple[int, ...]]
UNETS = ("sd15", "sd21", "sdxl", "sdxl_refiner")
MODELS = (*UNETS, "sd15_inpaint", "sd3", "sd35_medium", "sd35_large", "flux", "flux_bare")
FAMILY = {
    "sd15": "SD1",
    "sd15_inpaint": "SD1",
    "sd21": "SD2",
    "sdxl": "SDXL",
    "sdxl_refiner": "SDXL refiner",
    "sd3": "SD3",
    "sd35_medium": "SD3",
    "sd35_large": "SD3",
    "flux": "Flux",
    "flux_bare": "Flux",
}
ADAPTERS = tuple(sorted(path.name.removesuffix(".txt.gz") for path in (FIXTURES / "adapters").glob("*.txt.gz")))
_UNET = "model.diffusion_model."
_DUAL_BLOCKS = 13
"""SD3.5 medium has a second attention in its first 13 blocks."""


@cache
def read(kind: str, name: str) -> Shapes:
    """A table as it is stored; not to be changed."""
    lines = gzip.decompress((FIXTURES / kind / f"{name}.txt.gz").read_bytes()).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines)
    return {key: () if shape == "-" else tuple(map(int, shape.split("x"))) for key, shape in pairs}


@cache
def live(name: str) -> Shapes:
    """What ``named_parameters`` of the webui's model gives."""
    if name == "sd15_inpaint":
        return {**read("models", "sd15"), f"{_UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}
    if name == "sd35_large":
        return {**_under(_UNET, read("models", "sd35_large_mmdit")), **_part(read("models", "sd3"), "text_encoders.")}
    if name == "sd35_medium":
        return _sd35_medium()
    if name == "flux_bare":  # as BFL publishes it
        return dict(read("models", "flux"))
    if name == "flux":  # with its text encoders in one file
        text = _part(read("models", "sd3"), "text_encoders.")
        return {
            **_under(_UNET, read("models", "flux")),
            **{key: shape for key, shape in text.items() if ".clip_g." not in key},
        }
    return dict(read("models", name))


def checkpoint(name: str) -> Shapes:
    """The names in a checkpoint file: the webui's, without its hijack's levels (compared with the classes once)."""
    return {key.replace(".wrapped", ""): shape for key, shape in live(name).items()}


def unet(name: str) -> Shapes:
    """The UNet or transformer alone, names below ``diffusion_model.``."""
    shapes = live(name)
    return shapes if name == "flux_bare" else {k.removeprefix(_UNET): v for k, v in _part(shapes, _UNET).items()}


def _sd35_medium() -> Shapes:
    """SD3's table with what SD3.5 medium has beside: norms of q and k, and the second attention (9 modulations)."""
    shapes: Shapes = {}
    for key, shape in live("sd3").items():
        name = key.removeprefix(f"{_UNET}joint_blocks.")
        dual = name != key and int(name.split(".")[0]) < _DUAL_BLOCKS and ".x_block." in name
        if dual and "adaLN" in name:
            shape = (9 * 1536, *shape[1:])
        shapes[key] = shape
        if name.endswith("attn.qkv.weight"):
            attentions = ("attn.", "attn2.") if dual else ("attn.",)
            for attention in attentions:
                stem = key.removesuffix("attn.qkv.weight") + attention
                shapes.update({f"{stem}ln_q.weight": (64,), f"{stem}ln_k.weight": (64,)})
            if dual:
                stem = key.removesuffix("attn.qkv.weight") + "attn2."
                shapes.update({f"{stem}qkv.weight": shape, f"{stem}qkv.bias": shape[:1]})
                shapes.update({f"{stem}proj.weight": (1536, 1536), f"{stem}proj.bias": (1536,)})
    return shapes


def _part(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if key.startswith(prefix)}


def _under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"{prefix}{key}": shape for key, shape in shapes.items()}


def modules(shapes: Iterable[str]) -> list[str]:
    """The modules that own these parameters."""
    return list(dict.fromkeys(path.rpartition(".")[0] for path in shapes))


def narrow(shapes: Mapping[str, tuple[int, ...]], divisor: int = 16) -> Shapes:
    """The same names, each wide axis a part of its width: for tests with values."""
    return {
        key: tuple(size // divisor if size % divisor == 0 and size >= 4 * divisor else size for size in shape)
        for key, shape in shapes.items()
    }


def network(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> nn.Module:
    """A tree of modules with random parameters of these names and shapes, all multiples of 1/512."""
    generator = torch.Generator().manual_seed(seed)
    root = nn.Module()
    for path, shape in shapes.items():
        *levels, parameter = path.split(".")
        place = root
        for level in levels:
            if level not in place._modules:
                place.add_module(level, nn.Module())
            place = place.get_submodule(level)
        values = torch.randint(-2048, 2048, shape, generator=generator) / 512
        place.register_parameter(parameter, nn.Parameter(values, requires_grad=False))
    return root


def hollow(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of these tensors in fp16, all zeros; sparse on disk, whatever its size."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path
