"""Teaches the text encoder to read, before the UNet learns to draw: SD1's was trained before it too, and then frozen.

From the end of the sentence on, every position (the padding too, which cross-attention sees like any other) has to
tell the shape, its colour, the ground and the size, or that the sentence leaves them open. Four linear layers ask for
it; they are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional

from .captions import caption
from .model import TinySD
from .shapes import COLOURS, SHAPES, SIZES, Scene, random_scene
from .tokenizer import END, PAD

STEPS, CAPTIONS, RATE = 700, 16, 1e-3
DROPPED = 0.1
_ANSWERS = (SHAPES, tuple(COLOURS), tuple(COLOURS), tuple(SIZES))


def said(scene: Scene, text: str) -> list[int]:
    """What a caption tells of shape, colour, ground and size: the number of the answer, the last for nothing."""
    if not text:
        return [len(SHAPES), len(COLOURS), len(COLOURS), list(SIZES).index("")]
    words = text.replace(",", "").split()
    colour = list(COLOURS).index(scene.colour) if scene.colour in words else len(COLOURS)
    ground = list(COLOURS).index(scene.ground) if scene.ground in words else len(COLOURS)
    return [SHAPES.index(scene.shape), colour, ground, list(SIZES).index(scene.size)]


def sentences(seed: int, step: int) -> tuple[list[str], Tensor]:
    """Captions and what they say (B, 4)."""
    random = Random(f"{seed} reading {step}")
    scenes = [random_scene(random) for _ in range(CAPTIONS)]
    texts = ["" if random.random() < DROPPED else caption(scene, random) for scene in scenes]
    return texts, torch.tensor([said(scene, text) for scene, text in zip(scenes, texts, strict=True)])


def learn_to_read(model: TinySD, seed: int, steps: int = STEPS) -> Iterator[tuple[int, float, float]]:
    """Trains the text encoder in place; yields after each step its number, the loss, and the share of right answers."""
    embedder = model.cond_stage_model.wrapped
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList(nn.Linear(model.config.clip_hidden, len(answers) + 1) for answers in _ANSWERS)
    parameters = [*embedder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for step in range(steps):
        texts, answers = sentences(seed, step)
        ids = embedder.tokenizer(texts)
        after = (ids == END) | (ids == PAD)
        rows = embedder.transformer(ids)[after]
        wanted = answers.repeat_interleave(after.sum(1), 0)
        guesses = [head(rows) for head in heads]
        losses = [functional.cross_entropy(guess, wanted[:, index]) for index, guess in enumerate(guesses)]
        loss = torch.stack(losses).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, 3 * (steps - step) / steps)
        optimizer.step()
        optimizer.zero_grad()
        right = torch.stack([guess.argmax(1) == wanted[:, index] for index, guess in enumerate(guesses)])
        yield step + 1, float(loss.detach()), float(right.all(0).float().mean())
