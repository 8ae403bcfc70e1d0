"""Trains the adapters of the small model, one style or concept each.

    python -m extensions_builtin_shim.tiny_sd.train_adapters [NAME…]

The change of each weight is asked of lib_locon's own families, by the code that reads the files afterwards. Names and
metadata are kohya's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from lib_locon.families.build import Hints, build_layers
from lib_locon.families.dora import DoRALayer
from lib_locon.families.layer import Layer

from .adapter_files import SEED, Factors, Recipe, file_bytes, first_factors, metadata
from .captions import caption
from .checkpoint import CHECKPOINT, load_trained
from .diffusion import noise_loss
from .grid import preview
from .model import TinySD
from .models.make_adapters import FOLDER, Module, modules_of
from .recipes import RECIPES
from .shapes import SHAPES, random_scene
from .styles import STYLES
from .train import DROPPED, NOISES, threads

SCENES = 8


@dataclass(frozen=True)
class Trained:
    """A layer under training: its name in the file, its weight's name in the model, and its factors."""

    module: Module
    parameter: str
    factors: Factors


def layers_of(model: TinySD, recipe: Recipe) -> list[Trained]:
    """The recipe's layers with their first factors."""
    generator = Generator().manual_seed(SEED)
    weights = dict(model.named_parameters())
    found = []
    for module in modules_of(model):
        in_text = "text_model" in module.path
        if recipe.wanted(module) and (recipe.text or not in_text):
            parameter = f"{module.path}.weight" if in_text else f"model.diffusion_model.{module.path}.weight"
            factors = first_factors(recipe, module, weights[parameter], generator)
            found.append(Trained(module, parameter, {suffix: t.requires_grad_() for suffix, t in factors.items()}))
    return found


def change(layer: Layer, base: Tensor) -> Tensor:
    """ΔW at strength 1, so that a gradient reaches the factors (the engine's own way adds in place)."""
    inner = layer.family.delta(base) * layer.scale
    if not isinstance(layer, DoRALayer):
        return inner
    merged = base + inner
    norm = torch.linalg.vector_norm(merged.flatten(1), dim=1).view_as(layer.magnitude)
    return merged * (layer.magnitude / (norm + DoRALayer.EPSILON)) - base


def changed_weights(
    model: TinySD, trained: Sequence[Trained], recipe: Recipe, strength: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """The weights with the adapter in them."""
    alpha = None if recipe.family == "OFT" else recipe.alpha
    for item in trained:
        base = model.get_parameter(item.parameter)
        layers, unread = build_layers(item.factors, Hints(alpha=alpha, dora_on_output=True))
        if unread or len(layers) != 1:
            raise RuntimeError(f"{item.module.name}: its factors are not one layer: {unread}")
        yield item.parameter, base + strength * change(layers[0], base)


class WithAdapter(nn.Module):
    """Text and noise in one call, so that one set of changed weights serves both."""

    def __init__(self, model: TinySD) -> None:
        super().__init__()
        self.inner = model

    def forward(self, pictures: Tensor, texts: list[str], generator: Generator) -> Tensor:
        """The loss."""
        rows = self.inner.learned_conditioning(texts).repeat_interleave(NOISES, 0)
        return noise_loss(self.inner, pictures.repeat_interleave(NOISES, 0), rows, generator)


def batch(recipe: Recipe, step: int) -> tuple[float, Tensor, list[str]]:
    """Step `step`'s strength, its pictures with so much of the style, and their captions.

    Every second step is at strength 1, the others are anywhere below, or half the strength would be no half of the
    style. The concept's word stands in every second caption.
    """
    random = Random(f"{SEED} {recipe.style} {step}")
    strength = 1.0 if step % 2 or recipe.word else random.random()
    concept = (recipe.word,) if recipe.word else SHAPES
    scenes = [random_scene(random, SHAPES if index % 2 else concept) for index in range(SCENES)]
    pictures = torch.stack([STYLES[recipe.style](scene, strength) for scene in scenes])
    return strength, pictures, ["" if random.random() < DROPPED else caption(scene, random) for scene in scenes]


def train(model: TinySD, recipe: Recipe) -> tuple[dict[str, Tensor], Counter[str]]:
    """The factors by their keys in a file, and how often which caption was shown."""
    trained = layers_of(model, recipe)
    model.requires_grad_(False)
    wrapped = WithAdapter(model)
    factors = [factor for item in trained for factor in item.factors.values()]
    optimizer = torch.optim.AdamW(factors, recipe.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    shown: Counter[str] = Counter()
    recent: list[float] = []
    for step in range(recipe.steps):
        strength, pictures, texts = batch(recipe, step)
        shown.update(texts)
        weights = {f"inner.{name}": weight for name, weight in changed_weights(model, trained, recipe, strength)}
        generator = Generator().manual_seed(SEED * 1_000 + step)
        loss = functional_call(wrapped, weights, (pictures, texts, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / 20, 2 * (recipe.steps - step) / recipe.steps)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], float(loss.detach())]
        if step % 10 == 9:
            sys.stderr.write(f"\r{recipe.style} {step + 1}/{recipe.steps}  loss {sum(recent) / len(recent):.4f} ")
            sys.stderr.flush()
    keys = {f"{i.module.name}.{suffix}": tensor for i in trained for suffix, tensor in i.factors.items()}
    if recipe.family != "OFT":
        keys |= {f"{item.module.name}.alpha": torch.tensor(recipe.alpha) for item in trained}
    return keys, shown


def user_metadata(recipe: Recipe) -> str:
    """What the webui's metadata editor keeps beside a file.

    Without "sd version": by its widths the model is none of those that can be chosen, and the card would be hidden.
    """
    known = {
        "description": recipe.says,
        "activation text": recipe.word,
        "preferred weight": 1.0,
        "notes": f"{recipe.family}, rank {recipe.rank}; made for tiny_sd by train_adapters.",
    }
    return json.dumps(known, indent=4) + "\n"


def write(recipe: Recipe, tensors: Mapping[str, Tensor], shown: Mapping[str, int], folder: Path) -> Path:
    """The adapter, and its card's text beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recipe.style}.safetensors"
    tags = {text: count for text, count in sorted(shown.items(), key=lambda item: (-item[1], item[0]))[:40] if text}
    path.write_bytes(file_bytes(tensors, metadata(recipe, tags, recipe.steps * SCENES)))
    path.with_suffix(".json").write_text(user_metadata(recipe), encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Trains the small model's adapters.")
    parser.add_argument("names", nargs="*", help="which; all without any")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    with threads(given.threads):
        for name in given.names or RECIPES:
            started = time.perf_counter()
            path = write(RECIPES[name], *train(load_trained(given.checkpoint), RECIPES[name]), given.out)
            preview(load_trained(given.checkpoint), name, given.out).save(path.with_suffix(".png"), optimize=True)
            sys.stderr.write(f"{path.name}: {path.stat().st_size} bytes, {time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    main()
