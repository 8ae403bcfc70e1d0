"""Writes the small adapters in `Lora/`, one per family.

    python -m extensions_builtin_shim.tiny_sd.models.make_adapters

Nothing in them was trained: their factors come from a hash of the seed and the key, so that every machine writes the
same bytes. Names, shapes and metadata are those that trainers write for SD1.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from extensions_builtin_shim.tiny_sd import Config, TinySD
from lib_locon.models.table import underscored
from lib_locon.models.unet_names import diffusers_names

SEED = 20261121
FOLDER = Path(__file__).with_name("Lora")
UNET = "model.diffusion_model."
Shapes = dict[str, tuple[int, ...]]
"""Suffix → shape."""


@dataclass(frozen=True)
class Module:
    """A layer of the model: how kohya's trainer names it, where it stands, and the shape of its weight."""

    name: str
    path: str
    shape: tuple[int, ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        """(3, 3) for a 3×3 convolution, () for a linear layer."""
        return self.shape[2:]

    def ends(self, *endings: str) -> bool:
        """Whether its path ends in one of these."""
        return self.path.endswith(endings)


@dataclass(frozen=True)
class Recipe:
    """One adapter. `factors` are a layer's factors; with unit entries their ΔW has an RMS near rank ** `power`."""

    title: str
    algo: str
    rank: int
    strength: float
    """The RMS of ΔW at strength 1, in that of an ordinary weight."""
    wanted: Callable[[Module], bool]
    factors: Callable[[Module, int], tuple[Shapes, float]]


def lora(module: Module, rank: int) -> tuple[Shapes, float]:
    """Plain: the kernel is in `down`."""
    out, channels, *kernel = module.shape
    ones = [1] * len(kernel)
    return {"lora_up.weight": (out, rank, *ones), "lora_down.weight": (rank, channels, *kernel)}, 0.5


def lora_tucker(module: Module, rank: int) -> tuple[Shapes, float]:
    """With a core for kernels above 1×1, plain for the rest, as trainers write it."""
    if math.prod(module.kernel) == 1:
        return lora(module, rank)
    out, channels, *kernel = module.shape
    down, core = (rank, channels, 1, 1), (rank, rank, *kernel)
    return {"lora_up.weight": (out, rank, 1, 1), "lora_down.weight": down, "lora_mid.weight": core}, 1.0


def loha(module: Module, rank: int) -> tuple[Shapes, float]:
    """Factors are matrices even for convolutions."""
    left, right = (module.shape[0], rank), (rank, math.prod(module.shape[1:]))
    return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}, 1.0


def loha_tucker(module: Module, rank: int) -> tuple[Shapes, float]:
    """With two cores for kernels above 1×1; the `_a` factors are then turned."""
    if math.prod(module.kernel) == 1:
        return loha(module, rank)
    core, left, right = (rank, rank, *module.kernel), (rank, module.shape[0]), (rank, module.shape[1])
    halves = [{f"hada_t{n}": core, f"hada_w{n}_a": left, f"hada_w{n}_b": right} for n in (1, 2)]
    return {**halves[0], **halves[1]}, 2.0


def lokr(module: Module, rank: int) -> tuple[Shapes, float]:
    """A whole 4×4 matrix times a low-rank one."""
    out, channels = module.shape[0] // 4, math.prod(module.shape[1:]) // 4
    return {"lokr_w1": (4, 4), "lokr_w2_a": (out, rank), "lokr_w2_b": (rank, channels)}, 0.5


def lokr_tucker(module: Module, rank: int) -> tuple[Shapes, float]:
    """With a core for kernels above 1×1; `w2_a` is then turned."""
    if math.prod(module.kernel) == 1:
        return lokr(module, rank)
    out, channels = module.shape[0] // 4, module.shape[1] // 4
    core = (rank, rank, *module.kernel)
    return {"lokr_w1": (4, 4), "lokr_t2": core, "lokr_w2_a": (rank, out), "lokr_w2_b": (rank, channels)}, 1.0


def attention(module: Module) -> bool:
    """What LoRA trainers at the least train: here the UNet's cross attention and the text encoder's attention."""
    in_unet = ".attn2." in module.path and module.ends("to_q", "to_k", "to_v", "to_out.0")
    return in_unet or module.ends("q_proj", "k_proj", "v_proj", "out_proj")


def decoder(module: Module) -> bool:
    """Cross attention and 3×3 convolutions in the second half of the UNet."""
    wanted = attention(module) or module.ends("in_layers.2", "out_layers.3")
    return wanted and module.path.startswith("output_blocks.")


def third_level(module: Module) -> bool:
    """A part of that, to keep the files small, and attention at the text encoder's end, whose effect is easily seen."""
    number = int((re.findall(r"\d+", module.path) or "0")[0])
    if "text_model" in module.path:
        return number >= 8 and attention(module)
    return decoder(module) and 6 <= number <= 8


RECIPES: Mapping[str, Recipe] = {
    "tiny_lora": Recipe("LoRA", "", 2, 0.2, attention, lora),
    "tiny_locon": Recipe("LoCon", "locon", 2, 0.5, decoder, lora),
    "tiny_locon_tucker": Recipe("LoCon Tucker", "locon", 4, 0.3, third_level, lora_tucker),
    "tiny_loha": Recipe("LoHa", "loha", 2, 0.3, third_level, loha),
    "tiny_loha_tucker": Recipe("LoHa Tucker", "loha", 3, 0.3, third_level, loha_tucker),
    "tiny_lokr": Recipe("LoKr", "lokr", 2, 0.3, third_level, lokr),
    "tiny_lokr_tucker": Recipe("LoKr Tucker", "lokr", 4, 0.3, third_level, lokr_tucker),
}


def modules_of(model: nn.Module) -> list[Module]:
    """Every linear layer and convolution of the model under its name in a kohya file."""
    layers = {
        path: tuple(layer.weight.shape)
        for path, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    ldm = {path.removeprefix(UNET): shape for path, shape in layers.items() if path.startswith(UNET)}
    found = [Module(f"lora_unet_{underscored(alias)}", path, ldm[path]) for path, alias in diffusers_names(ldm).items()]
    for path, shape in layers.items():
        _, text_model, rest = path.partition("text_model")
        if text_model:
            found.append(Module(f"lora_te_text_model{underscored(rest)}", path, shape))
    return found


def numbers(key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of mean 0 and variance 1 that belong to the key."""
    drawn = hashlib.shake_256(f"{SEED} {key}".encode()).digest(math.prod(shape))
    levels = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).to(torch.float64)
    return ((levels - 127.5) / math.sqrt((256**2 - 1) / 12)).reshape(shape)


def tensors(title: str, recipe: Recipe, modules: Iterable[Module]) -> dict[str, Tensor]:
    """All tensors of one adapter, in fp16. alpha is half the rank, so whoever forgets it is twice too strong."""
    found: dict[str, Tensor] = {}
    for module in filter(recipe.wanted, modules):
        shapes, power = recipe.factors(module, recipe.rank)
        ordinary = 1 / math.sqrt(module.shape[1])
        each = (recipe.strength * ordinary / 0.5 / recipe.rank**power) ** (1 / len(shapes))
        for suffix, shape in shapes.items():
            key = f"{module.name}.{suffix}"
            found[key] = (numbers(f"{title} {key}", shape) * each).to(torch.float16)
        found[f"{module.name}.alpha"] = torch.tensor(recipe.rank / 2, dtype=torch.float16)
    return found


def metadata(name: str, recipe: Recipe) -> dict[str, str]:
    """What trainers write, and that this is none of theirs."""
    args = {"algo": recipe.algo, "conv_dim": recipe.rank, "conv_alpha": recipe.rank / 2}
    if "Tucker" in recipe.title:
        args["use_tucker"] = True
    return {
        "ss_output_name": name,
        "ss_network_module": "lycoris.kohya" if recipe.algo else "networks.lora",
        "ss_network_dim": str(recipe.rank),
        "ss_network_alpha": str(recipe.rank / 2),
        "ss_network_args": json.dumps(args if recipe.algo else {}),
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "tiny_sd",
        "ss_seed": str(SEED),
        "ss_training_comment": f"a {recipe.title} for tests, made by make_adapters.py; nothing was trained",
    }


def safetensors_bytes(found: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """The file's bytes. Written here since the safetensors library promises no order of the metadata."""
    header: dict[str, object] = {"__metadata__": dict(texts)}
    data = b""
    for key, tensor in sorted(found.items()):
        values = [float(value) for value in tensor.flatten()]
        packed = struct.pack(f"<{len(values)}e", *values)
        place = [len(data), len(data) + len(packed)]
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": place}
        data += packed
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write_all(folder: Path = FOLDER) -> list[Path]:
    """Writes every adapter into `folder` and returns the files."""
    modules = modules_of(TinySD.skeleton(Config.tiny()))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, recipe in RECIPES.items():
        paths.append(folder / f"{name}.safetensors")
        paths[-1].write_bytes(safetensors_bytes(tensors(name, recipe, modules), metadata(name, recipe)))
    return paths


if __name__ == "__main__":
    for path in write_all():
        sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes\n")
