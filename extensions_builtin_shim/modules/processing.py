"""From a request to images, with the extra networks at the right moments."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from extensions_builtin_shim.tiny_sd import TinySD, sample, to_image

from . import extra_networks, sd_models, shared
from ._absent import absent
from .sd_samplers_cfg_denoiser import CFGDenoiser
from .shared import opts, state
from .timer import Timer

__getattr__ = absent(__name__)


@dataclass
class StableDiffusionProcessing:
    """One job: `n_iter` batches of `batch_size` images each."""

    prompt: str | list[str] = ""
    negative_prompt: str = ""
    seed: int = -1
    steps: int = 20
    cfg_scale: float = 5.0
    batch_size: int = 1
    n_iter: int = 1
    override_settings: dict[str, object] = field(default_factory=dict)
    disable_extra_networks: bool = False
    comments: dict[str, int] = field(default_factory=dict)
    extra_generation_params: dict[str, object] = field(default_factory=dict)
    scripts: Any = None
    iteration: int = 0
    all_prompts: list[str] = field(default_factory=list)
    all_seeds: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    extra_network_data: dict[str, list[extra_networks.ExtraNetworkParams]] = field(default_factory=dict)
    # what was encoded last and for what; kept for one job, as the host does with `persistent_cond_cache` off
    cached_c: list[Any] = field(default_factory=lambda: [None, None])
    cached_uc: list[Any] = field(default_factory=lambda: [None, None])
    c: Tensor | None = None
    uc: Tensor | None = None

    @property
    def sd_model(self) -> TinySD:
        """The model in use."""
        return sd_models.model_data.get_sd_model()

    def comment(self, text: str) -> None:
        """Puts a line under the image. The same line twice is shown once."""
        self.comments[text] = 1

    def setup_prompts(self) -> None:
        """One prompt and one seed for each image of the job."""
        count = self.batch_size * self.n_iter
        self.all_prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt] * count
        if len(self.all_prompts) != count:
            raise ValueError(f"{len(self.all_prompts)} prompts were given for {count} images")
        first = random.randrange(2**32) if self.seed == -1 else self.seed
        self.all_seeds = [first + index for index in range(count)]

    def parse_extra_network_prompts(self) -> None:
        """Takes the tags out of this batch's prompts; the first prompt's tags are the batch's."""
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    def setup_conds(self) -> None:
        """Encodes this batch's prompts: `c` (B, L, C), and the negative one: `uc` (1, L, C)."""
        networks = self.extra_network_data
        self.uc = self.get_conds_with_caching(_encode, [self.negative_prompt], self.steps, [self.cached_uc], networks)
        self.c = self.get_conds_with_caching(_encode, self.prompts, self.steps, [self.cached_c], networks)

    def get_conds_with_caching(
        self,
        function: Callable[[TinySD, list[str], int], Tensor],
        required_prompts: list[str],
        steps: int,
        caches: list[list[Any]],
        extra_network_data: dict[str, list[extra_networks.ExtraNetworkParams]],
    ) -> Tensor:
        """`function` of the model, the prompts and the steps, unless a cache has it for the same prompts and tags."""
        wanted = (required_prompts, steps, shared.sd_model, extra_network_data)
        for known, result in caches:
            if known == wanted:
                return cast("Tensor", result)
        caches[0][:] = wanted, function(shared.sd_model, required_prompts, steps)
        return cast("Tensor", caches[0][1])


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """From text alone. The hires pass is not in the stand-in."""


@dataclass
class Processed:
    """What came of a job. `seconds` is the stand-in's own."""

    images: list[Image.Image]
    infotexts: list[str]
    all_seeds: list[int]
    comments: str
    seconds: dict[str, float]


class _Interrupted(Exception):
    """The user stopped the job; carries the latents so far."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


def process_images(p: StableDiffusionProcessing) -> Processed:
    """Runs a job."""
    with _overridden(p.override_settings):
        return process_images_inner(p)


def process_images_inner(p: StableDiffusionProcessing) -> Processed:
    """All batches: tags out, networks on, images; networks off only when the last batch had tags."""
    p.setup_prompts()
    if state.job_count == -1:
        state.job_count = p.n_iter
    timer = Timer()
    images: list[Image.Image] = []
    infotexts: list[str] = []
    for iteration in range(p.n_iter):
        if state.interrupted:
            break
        p.iteration = iteration
        batch = slice(iteration * p.batch_size, (iteration + 1) * p.batch_size)
        p.prompts, p.seeds = p.all_prompts[batch], p.all_seeds[batch]
        p.parse_extra_network_prompts()
        timer.record("other")
        if not p.disable_extra_networks:
            extra_networks.activate(p, p.extra_network_data)
        timer.record("activate")
        if p.scripts is not None:
            p.scripts.process_batch(p, batch_number=iteration, prompts=p.prompts, seeds=p.seeds)
        p.setup_conds()
        images += [_sample(p, index) for index in range(len(p.prompts))]
        timer.record("sample")
        infotexts += [_infotext(p, index) for index in range(len(infotexts), len(images))]
        state.nextjob()
    if not p.disable_extra_networks and p.extra_network_data:
        extra_networks.deactivate(p, p.extra_network_data)
    comments = "".join(f"{comment}\n" for comment in p.comments)
    return Processed(images, infotexts, p.all_seeds, comments, timer.records)


@contextmanager
def _overridden(settings: dict[str, object]) -> Iterator[None]:
    """Settings for one job. Only those that are in `opts.data` are put back: the host leaks the others."""
    before = {key: opts.data[key] for key in settings if key in opts.data}
    try:
        for key, value in settings.items():
            opts.set(key, value)
        yield
    finally:
        for key, value in before.items():
            opts.set(key, value)


def _encode(model: TinySD, prompts: list[str], steps: int) -> Tensor:
    del steps  # the host's prompts can change from step to step
    with torch.no_grad():
        return model.learned_conditioning(prompts)


def _sample(p: StableDiffusionProcessing, index: int) -> Image.Image:
    assert p.c is not None and p.uc is not None
    model, context = p.sd_model, torch.cat([p.c[index : index + 1], p.uc])
    denoiser = CFGDenoiser(p, model, context)

    def on_step(step: int, steps: int, latents: Tensor) -> None:
        state.sampling_step, state.sampling_steps = step, steps
        if state.interrupted:
            raise _Interrupted(latents)
        denoiser.announce(step, steps, latents)

    try:
        picture = sample(model, context, seed=p.seeds[index], steps=p.steps, guidance=p.cfg_scale, on_step=on_step)
    except _Interrupted as stopped:
        picture = model.first_stage_model.decode(stopped.latents).clamp(0, 1)
    return to_image(picture)


def _infotext(p: StableDiffusionProcessing, index: int) -> str:
    """The text that the webui keeps in an image: prompt as written, negative prompt, one line of parameters."""
    size = p.sd_model.config.image_size
    known: dict[str, object] = {
        "Steps": p.steps,
        "Sampler": "DDIM",
        "CFG scale": p.cfg_scale,
        "Seed": p.all_seeds[index],
        "Size": f"{size}x{size}",
        "Model": "tiny_sd",
    }
    parameters = ", ".join(f"{key}: {_quoted(value)}" for key, value in {**known, **p.extra_generation_params}.items())
    negative = [f"Negative prompt: {p.negative_prompt}"] if p.negative_prompt else []
    return "\n".join([p.all_prompts[index], *negative, parameters])


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
