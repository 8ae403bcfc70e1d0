"""Trains the small model from nothing.

    python -m extensions_builtin_shim.tiny_sd.train

Everything is drawn from the seed: pictures, captions, noise. Ctrl-C keeps where it was in `--state`, and the same
command goes on from there, to the same weights. The checkpoint is written as it goes and is usable at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import torch
from torch import Generator, Tensor, nn

from .attention import SpatialTransformer
from .captions import caption
from .checkpoint import CHECKPOINT, save
from .config import Config
from .diffusion import noise_loss
from .model import TinySD
from .reading import learn_to_read
from .shapes import SHAPES, draw, random_scene
from .unet import ResBlock, UNet

SEED = 20261122
STEPS = 7500
CAPTIONS = 16
NOISES = 2
"""Times that each scene is noised."""
SHOWN = (*SHAPES, "star")
"""What the pictures are of: a star's arms are the finest thing to learn, so it is shown twice as often as the rest."""
DROPPED = 0.1
"""The share of captions left empty, without which there is nothing to guide away from."""
RATE, WARM_UP, FALLING = 1e-3, 200, 0.25
"""The learning rate rises over so many steps, stays, and falls to 0 over this share of all steps. Until then it does
not depend on their number, so a run can be made longer or shorter on the way."""
AVERAGED = 0.999
STATE = Path("out/tiny_sd.state.pt")
CURVE = CHECKPOINT.with_suffix(".loss.csv")


def untrained(seed: int = SEED) -> TinySD:
    """A model to start from: torch's usual weights, and nothing yet from the layers that end a block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinySD(Config.trained())
    for module in model.modules():
        if isinstance(module, ResBlock):
            silence(module.out_layers[3])
        elif isinstance(module, SpatialTransformer):
            silence(module.proj_out)
        elif isinstance(module, UNet):
            silence(module.out[2])
    positions = model.cond_stage_model.wrapped.transformer.text_model.embeddings.position_embedding
    with torch.no_grad():
        positions.weight.mul_(0.02)  # at full size they would drown the words
    return model


def silence(layer: nn.Module) -> None:
    """All its numbers 0, as ldm starts the last layer of each block."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def batch(seed: int, step: int) -> tuple[Tensor, list[str]]:
    """Step `step`'s pictures (CAPTIONS, 3, 32, 32) and captions: a function of seed and step alone."""
    random = Random(f"{seed} {step}")
    scenes = [random_scene(random, SHOWN) for _ in range(CAPTIONS)]
    texts = ["" if random.random() < DROPPED else caption(scene, random) for scene in scenes]
    return torch.stack([draw(scene) for scene in scenes]), texts


def rate(step: int, steps: int) -> float:
    """The learning rate's share."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (FALLING * steps))


class Training:
    """The model, its running average, the optimiser and the losses so far."""

    def __init__(self, seed: int, steps: int) -> None:
        self.seed, self.steps, self.step = seed, steps, 0
        self.model = untrained(seed)
        self.model.cond_stage_model.requires_grad_(False)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.model.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.losses: list[float] = []
        self.reads = False
        self.seconds = 0.0

    def read(self) -> None:
        """What comes first: the text encoder."""
        started = time.perf_counter()
        text = self.model.cond_stage_model.requires_grad_(True)
        for step, loss, right in learn_to_read(self.model, self.seed):
            if step % 10 == 0:
                sys.stderr.write(f"\rreading {step}  loss {loss:.3f}  {right:4.0%} of the sentences understood ")
                sys.stderr.flush()
        text.requires_grad_(False)
        self.reads = True
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.seconds += time.perf_counter() - started

    def advance(self) -> None:
        """One step."""
        started = time.perf_counter()
        pictures, texts = batch(self.seed, self.step)
        generator = Generator().manual_seed(self.seed * 1_000_000 + self.step)
        with torch.no_grad():
            rows = self.model.learned_conditioning(texts).repeat_interleave(NOISES, 0)
        loss = noise_loss(self.model, pictures.repeat_interleave(NOISES, 0), rows, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * rate(self.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.follow()
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the average towards the weights, faster at first."""
        share = 1 - min(AVERAGED, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), list(self.model.state_dict().values()), share)

    def averaged(self) -> TinySD:
        """A model of its own with the averaged weights, in fp16."""
        model = TinySD(self.model.config)
        model.load_state_dict(self.average)
        return model.half().eval()

    def keep(self, path: Path) -> None:
        """Writes all that is needed to go on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        held = {"model": self.model.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict()}
        known = {"seed": self.seed, "steps": self.steps, "step": self.step, "reads": self.reads}
        torch.save({**held, **known, "losses": self.losses, "seconds": self.seconds}, part)
        part.replace(path)

    @classmethod
    def resumed(cls, path: Path, seed: int, steps: int) -> Training:
        """What `keep` wrote, if it is the beginning of the same run; else from the start."""
        training = cls(seed, steps)
        if path.is_file():
            held = torch.load(path, weights_only=True)
            falling = held["step"] > (1 - FALLING) * min(steps, held["steps"])
            if held["seed"] == seed and (held["steps"] == steps or not falling):
                training.model.load_state_dict(held["model"])
                training.optimizer.load_state_dict(held["optimizer"])
                training.average = held["average"]
                training.step, training.reads = held["step"], held["reads"]
                training.losses, training.seconds = held["losses"], held["seconds"]
        return training


def recipe(training: Training) -> dict[str, object]:
    """What is written into the checkpoint's header: how to make it again."""
    return {
        "command": "python -m extensions_builtin_shim.tiny_sd.train",
        "seed": training.seed,
        "steps": f"{training.step} of {training.steps}",
        "batch": str(CAPTIONS * NOISES),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(training.seconds),
    }


def write(training: Training, checkpoint: Path, curve: Path) -> None:
    """The averaged model, and the mean loss of every 50 steps."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    part = checkpoint.with_suffix(".part")
    save(training.averaged(), part, {"recipe": json.dumps(recipe(training))})
    part.replace(checkpoint)
    groups = [training.losses[start : start + 50] for start in range(0, len(training.losses), 50)]
    rows = [f"{50 * index + len(group)},{sum(group) / len(group):.5f}" for index, group in enumerate(groups)]
    curve.write_text("\n".join(["step,loss", *rows, ""]), encoding="utf-8")


def show(training: Training, started: float, first: int) -> None:
    """The progress bar: one line on stderr, written over."""
    done = training.step / training.steps
    left = (time.perf_counter() - started) / max(training.step - first, 1) * (training.steps - training.step)
    recent = training.losses[-50:]
    bar = "█" * int(30 * done) + "░" * (30 - int(30 * done))
    sys.stderr.write(
        f"\r{bar} {training.step}/{training.steps}  loss {sum(recent) / len(recent):.4f}  {left / 60:.0f} min left "
    )
    sys.stderr.flush()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """How sums are split depends on the number of threads, and so do the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(training: Training, state: Path, checkpoint: Path, curve: Path, stop: threading.Event) -> None:
    """To the end, or to Ctrl-C."""
    if not training.reads:
        training.read()
        training.keep(state)
    started, first = time.perf_counter(), training.step
    while training.step < training.steps and not stop.is_set():
        training.advance()
        if training.step % 10 == 0:
            show(training, started, first)
        if training.step % 250 == 0:
            training.keep(state)
            write(training, checkpoint, curve)
    training.keep(state)
    if training.step < training.steps:
        sys.stderr.write(f"\nstopped at step {training.step}; the same command goes on from there\n")
        raise SystemExit(130)
    write(training, checkpoint, curve)
    sys.stderr.write(f"\n{checkpoint}: {checkpoint.stat().st_size} bytes\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Trains the small model from nothing; Ctrl-C and again goes on.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--curve", type=Path, default=CURVE)
    parser.add_argument("--state", type=Path, default=STATE)
    given = parser.parse_args(arguments)
    # so a process manager's "please end" keeps the state too, and Ctrl-C does where a shell had it ignored
    stop = threading.Event()  # looked at between steps: half of one must not be kept
    for wanted in (signal.SIGINT, signal.SIGTERM):
        signal.signal(wanted, lambda *_: stop.set())
    with threads(given.threads):
        run(Training.resumed(given.state, given.seed, given.steps), given.state, given.out, given.curve, stop)


if __name__ == "__main__":
    main()
