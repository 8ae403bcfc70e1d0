"""Measures the trained model and its adapters; the numbers of docs/tiny_sd.md are what this prints.

python -m extensions_builtin_shim.tiny_sd.evaluate
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from lib_locon import Session, Strengths, Use, load

from .captions import plain
from .checkpoint import CHECKPOINT, load_trained
from .judge import Verdict, judge
from .measures import share
from .model import TinySD
from .models.make_adapters import FOLDER
from .recipes import RECIPES
from .sampler import sample
from .shapes import COLOURS, HELD_OUT, Scene, random_scene
from .train import threads

STEPS, GUIDANCE, FIRST_SEED = 20, 2.5, 1000
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
AT_ONCE = 25
PROBES = (
    *(Scene("triangle", "red", "white"), Scene("square", "blue", "yellow"), Scene("star", "purple", "orange")),
    *(Scene("cross", "white", "red"), Scene("heart", "pink", "blue"), Scene("diamond", "green", "pink")),
    *(Scene("triangle", "orange", "blue"), Scene("square", "cyan", "red")),
)
"""What the adapters are measured on: shapes that show a tilt, and nothing black, which would pass for an outline."""
Sources = Sequence[tuple[Path, float]]


def paint(model: TinySD, scenes: Sequence[Scene], first_seed: int = FIRST_SEED) -> Tensor:
    """(B, 3, 32, 32): a picture for each scene's plainest caption, the seeds counting up."""
    parts = []
    for start in range(0, len(scenes), AT_ONCE):
        prompts = [plain(scene) for scene in scenes[start : start + AT_ONCE]]
        parts.append(sample(model, prompts, seed=first_seed + start, steps=STEPS, guidance=GUIDANCE))
    return torch.cat(parts)


def seen_scenes(count: int = 100) -> list[Scene]:
    """Scenes of the kind that the training showed, no two alike."""
    random = Random("seen")
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = random_scene(random)
        found.setdefault(plain(scene), scene)
    return list(found.values())


def held_out_scenes() -> list[Scene]:
    """Each colour of a shape that no training picture has, on every ground."""
    pairs = sorted(HELD_OUT)
    return [Scene(shape, colour, ground) for colour, shape in pairs for ground in COLOURS if ground != colour]


def wrong(pictures: Tensor, scenes: Sequence[Scene]) -> list[tuple[Scene, Verdict]]:
    """Which pictures show something else than was asked for, and what."""
    seen = [(scene, judge(picture)) for picture, scene in zip(pictures, scenes, strict=True)]
    return [(scene, verdict) for scene, verdict in seen if not verdict.says(scene)]


def with_adapters(model: TinySD, sources: Sources, scenes: Sequence[Scene], first_seed: int = FIRST_SEED) -> Tensor:
    """Pictures of the scenes with these adapters at these strengths in the model, which is given back as it was."""
    session = Session(model)
    session.apply([Use(load(path), Strengths.both(strength)) for path, strength in sources])
    try:
        return paint(model, scenes, first_seed)
    finally:
        session.restore()


def asked(style: str) -> list[Scene]:
    """The probes; for a concept, with its shape in their place."""
    word = RECIPES[style].word
    return [Scene(word, scene.colour, scene.ground) if word else scene for scene in PROBES]


def measured(pictures: Tensor, style: str) -> float:
    """The style's share in pictures of the probes: 1 is as in drawings."""
    return share(pictures, asked(style), style)


def growth(model: TinySD, style: str, folder: Path = FOLDER, strengths: Sequence[float] = STRENGTHS) -> list[float]:
    """The measure of a style at each strength."""
    path = folder / f"{style}.safetensors"
    return [measured(with_adapters(model, [(path, strength)], asked(style)), style) for strength in strengths]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measures the trained model and its adapters.")
    parser.add_argument("names", nargs="*", help="which adapters; all without any")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--lora-dir", type=Path, default=FOLDER)
    parser.add_argument("--only-adapters", action="store_true")
    given = parser.parse_args(arguments)
    with threads(1):
        model = load_trained(given.checkpoint)
        if not given.only_adapters:
            for name, scenes in (("seen", seen_scenes()), ("held out", held_out_scenes())):
                errors = wrong(paint(model, scenes), scenes)
                sys.stdout.write(f"{name}: {len(scenes) - len(errors)} of {len(scenes)} as asked\n")
                for scene, verdict in errors:
                    sys.stdout.write(f"  {plain(scene)}: {verdict}\n")
                sys.stdout.flush()
        for name in given.names or RECIPES:
            row = " ".join(f"{value:6.2f}" for value in growth(model, name, given.lora_dir))
            sys.stdout.write(f"{name:8} {RECIPES[name].family:12} {row}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
