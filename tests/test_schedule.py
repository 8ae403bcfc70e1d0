"""Strengths that depend on the step, in the headless webui: which weights each step is computed with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from extensions_builtin_shim.launch import launch
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.models.blocks import place_of
from lib_locon.prompt.blocks import SD
from tests import random_adapters

Weights = dict[str, Tensor]
STEPS = 6


@functools.cache
def model() -> TinySD:
    return TinySD.random(0)


class Watched:
    """A webui, and the weights that its model has at each step of the last run."""

    def __init__(self) -> None:
        self.webui = launch(lora_dir=random_adapters.folder(), make_model=lambda: copy.deepcopy(model()))
        from modules import shared

        self.shared = shared
        self.seen: list[Weights] = []
        shared.sd_model.model.register_forward_pre_hook(lambda *_: self.seen.append(self.now()))

    def now(self) -> Weights:
        return {name: weight.detach().clone() for name, weight in self.shared.sd_model.named_parameters()}

    def run(self, prompt: str, steps: int = STEPS, seed: int = 1) -> Any:
        self.seen.clear()
        return self.webui.generate(prompt, seed=seed, steps=steps)

    def weights(self, prompt: str) -> Weights:
        """Those at the first step."""
        self.run(prompt, 1)
        return self.seen[0]


@pytest.fixture
def watched() -> Iterator[Watched]:
    running = Watched()
    yield running
    running.webui.close()


def same(first: Weights, second: Weights, part: str = "") -> bool:
    return all(torch.equal(weight, second[name]) for name, weight in first.items() if name.startswith(part))


# arguments -> the constant arguments that the weights of each step are those of
SCHEDULES: dict[str, list[str]] = {
    "1:0@0,1@1": ["1:0", "1:0.25", "1:0.5", "1:0.75", "1:1", "1:1"],
    "0.5@0,1@1": [
        "0.5",
        "0.5:0.625",
        "0.5:0.75",
        "0.5:0.875",
        "0.5:1",
        "0.5:1",
    ],  # the text encoder has the first step's
    "0.5:stop=3": ["0.5", "0.5", "0.5:0", "0.5:0", "0.5:0", "0.5:0"],
    "0.5:start=3": ["0", "0", *["0:0.5"] * 4],
    "1:lbw=X,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1:out=0@2,1@4": [*["1:out=0"] * 3, "1:out=0.5", "1:out=1", "1:out=1"],
}


@pytest.mark.parametrize("arguments", SCHEDULES)
def test_each_step_has_its_own_weights(watched: Watched, arguments: str) -> None:
    blocks = ":lbw=ALL" if "lbw" in arguments else ""
    wanted = [watched.weights(f"a circle <lora:tiny_lora:{words}{blocks}>") for words in SCHEDULES[arguments]]
    watched.run(f"a circle <lora:tiny_lora:{arguments}>")
    assert len(watched.seen) == STEPS
    assert [same(found, other) for found, other in zip(watched.seen, wanted, strict=True)] == [True] * STEPS
    name = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
    assert len({float(weights[name].sum()) for weights in wanted}) == len(set(SCHEDULES[arguments]))


def test_a_schedule_changes_the_image_and_the_next_run_knows_nothing_of_it(watched: Watched) -> None:
    plain = watched.run("a circle").image.tobytes()
    constant = watched.run("a circle <lora:tiny_lora:1>").image.tobytes()
    scheduled = watched.run("a circle <lora:tiny_lora:1:stop=3>")
    assert scheduled.image.tobytes() not in (plain, constant)
    assert watched.run("a circle <lora:tiny_lora:1:stop=3>").image.tobytes() == scheduled.image.tobytes()
    assert watched.run("a circle <lora:tiny_lora:1>").image.tobytes() == constant
    assert watched.run("a circle").image.tobytes() == plain
    assert same(watched.now(), dict(model().named_parameters()))
    assert any("tiny_lora (LoRA) at 1 at steps 1–2: " in line for line in scheduled.comments)


def test_a_schedule_that_acts_at_no_step_is_no_adapter(watched: Watched) -> None:
    plain = watched.run("a circle").image.tobytes()
    run = watched.run("a circle <lora:tiny_lora:1:step=3-3>")
    assert run.image.tobytes() == plain
    assert any("acts at no step" in line for line in run.comments)


def test_without_a_schedule_no_step_writes_anything(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_locon.session import Session

    applied: list[object] = []
    real: Callable[..., Any] = Session.apply

    def counted(self: Session, uses: Any) -> Any:
        applied.append(uses)
        return real(self, uses)

    monkeypatch.setattr(Session, "apply", counted)
    watched.run("a circle <lora:tiny_lora:1:te1=0.5:lbw=OUTALL:hr=0.5>")
    assert len(applied) == 1
    watched.run("a circle <lora:tiny_lora:1:stop=3>")
    assert len(applied) == 1 + 1 + STEPS


def test_a_step_that_fails_gives_the_base_and_says_so(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_locon.errors import PatchError
    from lib_locon.session import Session

    real: Callable[..., Any] = Session.apply
    calls: list[int] = []

    def failing(self: Session, uses: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            self.restore()
            raise PatchError("out of memory")
        return real(self, uses)

    monkeypatch.setattr(Session, "apply", failing)
    run = watched.run("a circle <lora:tiny_lora:1:0.5@0,1@1>")
    base = dict(model().named_parameters())
    assert [same(weights, base) for weights in watched.seen] == [False, False, True, True, True, True]
    assert "no adapter is in this image from step 3 on: out of memory" in run.comments


def test_block_weights_and_patterns_change_each_layer_by_its_ratio(watched: Watched) -> None:
    base = dict(model().named_parameters())
    full = watched.weights("a circle <lora:tiny_lora:1>")
    values = dict.fromkeys(SD, 0.0) | {"BASE": 0.5, "IN02": 1.0, "MID": -1.0, "OUT05": 0.25}
    lbw = ",".join(map(str, values.values()))
    some = watched.weights(f"a circle <lora:tiny_lora:1:te1=0.5:lbw={lbw}:attn2.to_k=0.5>")
    changed = {name for name in base if not torch.equal(full[name], base[name])}
    assert len(changed) > 20
    blocks = set()
    for name in changed:
        block, _ = place_of("te1" if name.startswith("cond_stage") else "unet", name)
        blocks.add(block)
        factor = values[block] * (0.5 if block == "BASE" or ".attn2.to_k." in name else 1.0)
        delta = full[name] - base[name]
        assert torch.allclose(some[name] - base[name], factor * delta, atol=1e-6), name
    assert {"BASE", "MID", "IN02", "OUT05", "IN01"} <= blocks


def test_blocks_without_a_value_are_said_under_the_image(watched: Watched) -> None:
    (line,) = watched.run(f"a circle <lora:tiny_lora:1:lbw=1{',0' * 11}>", steps=1).comments
    assert line.endswith("no values for IN01, IN02, OUT06, OUT07, OUT08, OUT09, OUT10, OUT11, which counts as 0")
    (line,) = watched.run("a circle <lora:tiny_lora:1:lbw=ALL>", steps=1).comments
    assert line.endswith("layers")


def test_random_block_weights_follow_the_images_seed(watched: Watched) -> None:
    prompt = f"a circle <lora:tiny_lora:1:lbw={','.join('R' * 26)}>"
    first, again, other = (watched.run(prompt, seed=seed) for seed in (1, 1, 2))
    assert first.comments == again.comments != other.comments
    assert first.sha256 == again.sha256


def test_the_users_presets_are_a_setting(watched: Watched) -> None:
    from lib_locon.settings import PRESETS

    watched.shared.opts.set(PRESETS.key, f"MINE:{','.join(['0'] * 26)}")
    weights = watched.weights("a circle <lora:tiny_lora:1:lbw=MINE>")
    base = dict(model().named_parameters())
    inside = {name for name in base if "_blocks." in name or "middle_block." in name or "encoder.layers" in name}
    assert same({name: weights[name] for name in inside}, base)
    watched.shared.opts.set(PRESETS.key, "")
    assert any("no preset 'MINE'" in line for line in watched.run("a circle <lora:tiny_lora:1:lbw=MINE>").comments)


class Job:
    """The parts of the host's processing object that a hires pass uses."""

    def __init__(self, **fields: Any) -> None:
        self.lines: list[str] = []
        self.comment = self.lines.append
        self.__dict__.update(fields)


def test_the_hires_pass_has_its_own_strengths(watched: Watched) -> None:
    from modules import extra_networks, script_callbacks, shared

    tags = [extra_networks.ExtraNetworkParams(["tiny_lora", "0.5", "0.25", "hr=0.75@0,0.5@1"])]
    network = extra_networks.extra_network_registry["lora"]
    wanted = {words: watched.weights(f"<lora:tiny_lora:{words}>") for words in ("0.5:0.25", "0.75", "0.75:0.5")}

    job = Job(seeds=[1])
    network.activate(job, tags)
    assert same(watched.now(), wanted["0.5:0.25"])
    assert "te 0.5, unet 0.25:" in job.lines[-1]
    # with little memory the host encodes the hires prompt before the first pass, without the pass's flag
    early = Job(seeds=[1], is_hr_pass=False, hr_extra_network_data={"lora": tags})
    network.activate(early, tags)
    assert same(watched.now(), wanted["0.75"])
    job.is_hr_pass = True
    network.activate(job, tags)
    assert same(watched.now(), wanted["0.75"])
    assert "te 0.75, unet 0.75@0,0.5@1:" in job.lines[-1]
    nothing = torch.zeros(1)
    last = script_callbacks.CFGDenoiserParams(nothing, None, nothing, 5, 6, nothing, nothing, SimpleNamespace())
    script_callbacks.cfg_denoiser_callback(last)
    assert same(watched.now(), wanted["0.75:0.5"])
    network.deactivate(job)
    network.activate(Job(), [])
    assert same(watched.now(), dict(model().named_parameters()))
    assert shared.sd_model is not None


def test_encoded_prompts_are_forgotten_when_what_a_tag_means_for_the_text_has_changed(watched: Watched) -> None:
    from modules import extra_networks

    network = extra_networks.extra_network_registry["lora"]

    def forgets(arguments: str, seed: int = 1) -> bool:
        cache, other = ["key", "encoded"], ["key", "encoded"]
        params = [extra_networks.ExtraNetworkParams(["tiny_lora", *arguments.split(":")])] if arguments else []
        network.activate(Job(seeds=[seed], cached_c=cache, cached_hr_uc=other, cached_uc=None), params)
        assert cache == other
        return cache == [None, None]

    random = f"1:lbw=R{',1' * 25}"
    assert forgets("0.5")
    assert not forgets("0.5")
    assert not forgets("0.5:1:stop=3")  # the same for the text
    assert forgets("te1=0.25:0.5")
    assert forgets(random)
    assert not forgets(random)
    assert forgets(random, seed=2)
    assert forgets("")
    assert not forgets("")
