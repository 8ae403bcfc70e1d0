"""Adapter files as kohya's trainer writes them: the layers' names, the factors to begin with, and the metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .models.make_adapters import Module, Shapes, loha, lokr, lora, lora_tucker, safetensors_bytes

SEED = 20261123
Factors = dict[str, Tensor]
"""Suffix → tensor, of one layer."""
# Beginning at 0, these leave the base as it is until the first step.
_SILENT = ("lora_up.weight", "hada_w2_a", "lokr_w2_b", "oft_blocks")


@dataclass(frozen=True)
class Recipe:
    """One adapter: what it is taught, in which family, on which layers."""

    style: str
    family: str
    rank: int
    wanted: Callable[[Module], bool]
    rate: float = 1e-2
    steps: int = 250
    text: bool = False
    """Whether layers of the text encoder are trained too."""
    word: str = ""
    """The activation word."""
    says: str = ""

    @property
    def alpha(self) -> float:
        """Half the rank, so that whoever forgets it is twice too strong."""
        return self.rank / 2


def shapes_for(recipe: Recipe, module: Module) -> Shapes:
    """Suffix → shape."""
    if recipe.family == "OFT":
        blocks = recipe.rank
        return {"oft_blocks": (blocks, module.shape[0] // blocks, module.shape[0] // blocks)}
    makers = {"LoRA": lora, "LoCon": lora, "DoRA": lora, "LoCon Tucker": lora_tucker, "LoHa": loha, "LoKr": lokr}
    return makers[recipe.family](module, recipe.rank)[0]


def first_factors(recipe: Recipe, module: Module, weight: Tensor, generator: Generator) -> Factors:
    """The factors to begin with: random ones beside one that is 0."""
    factors: Factors = {}
    for suffix, shape in shapes_for(recipe, module).items():
        if suffix in _SILENT:
            factors[suffix] = torch.zeros(shape)
        else:
            factors[suffix] = torch.randn(shape, generator=generator) * first_size(suffix, shape)
    if recipe.family == "DoRA":
        norms = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
        factors["dora_scale"] = norms.reshape(-1, *[1] * (weight.ndim - 1))
    return factors


def first_size(suffix: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a factor's first numbers, as trainers choose it."""
    if suffix.startswith("hada"):
        return 0.1 if suffix.endswith("1_a") else 1.0
    return 1 / math.sqrt(math.prod(shape[1:]))


def network(recipe: Recipe) -> tuple[str, dict[str, object]]:
    """The module that would have trained it, and its arguments."""
    if recipe.family == "LoRA":
        return "networks.lora", {}
    if recipe.family in ("LoCon", "DoRA"):
        extra: dict[str, object] = {"dora_wd": True, "wd_on_out": True} if recipe.family == "DoRA" else {}
        return "lycoris.kohya", {"algo": "locon", "conv_dim": recipe.rank, "conv_alpha": recipe.alpha, **extra}
    algo = {"LoCon Tucker": "locon", "LoHa": "loha", "LoKr": "lokr", "OFT": "diag-oft"}[recipe.family]
    return "lycoris.kohya", {"algo": algo, "use_tucker": recipe.family == "LoCon Tucker"}


def metadata(recipe: Recipe, tags: Mapping[str, int], pictures: int) -> dict[str, str]:
    """What kohya's trainer writes."""
    module, arguments = network(recipe)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": recipe.style,
        "modelspec.description": recipe.says,
        "modelspec.resolution": "32x32",
        "modelspec.prediction_type": "sample",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "ss_output_name": recipe.style,
        "ss_network_module": module,
        "ss_network_dim": str(recipe.rank),
        "ss_network_alpha": str(recipe.alpha),
        "ss_network_args": json.dumps(arguments),
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "tiny_sd.safetensors",
        "ss_v2": "False",
        "ss_resolution": "(32, 32)",
        "ss_learning_rate": str(recipe.rate),
        "ss_max_train_steps": str(recipe.steps),
        "ss_steps": str(recipe.steps),
        "ss_num_train_images": str(pictures),
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_mixed_precision": "no",
        "ss_seed": str(SEED),
        "ss_tag_frequency": json.dumps({f"1_{recipe.style}": dict(tags)}),
        "ss_training_comment": "trained by extensions_builtin_shim.tiny_sd.train_adapters; see docs/tiny_sd.md",
    }


def file_bytes(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """The whole file in fp16, with the two hashes by which the built-in Lora and its forerunner know files."""
    half = {key: tensor.detach().half() for key, tensor in tensors.items()}
    bare = safetensors_bytes(half, texts)
    data = bare[8 + int.from_bytes(bare[:8], "little") :]
    hashes = {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(bare[0x100000:0x110000]).hexdigest()[:8],
    }
    return safetensors_bytes(half, {**texts, **hashes})
