"""A session and its model: one state for all sessions, freed with the model, and nothing kept of a failed set."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lib_locon
from lib_locon import products


def adapter(folder: Path, name: str = "a", width: int = 6, scale: float = 1.0) -> lib_locon.Adapter:
    path = folder / f"{name}.safetensors"
    save_file(
        {"linear.lora_up.weight": scale * torch.ones(8, 1), "linear.lora_down.weight": torch.ones(1, width)}, path
    )
    return lib_locon.load(path)


def model() -> nn.ModuleDict:
    return nn.ModuleDict({"linear": nn.Linear(6, 8)})


def test_two_sessions_on_one_model_know_of_each_other(tmp_path: Path) -> None:
    one = model()
    base = one["linear"].weight.detach().clone()
    first, second = lib_locon.Session(one), lib_locon.Session(one)
    a, b = adapter(tmp_path), adapter(tmp_path, "b", scale=2.0)
    first.apply([lib_locon.Use(a)])
    second.apply([lib_locon.Use(b)])
    assert torch.equal(one["linear"].weight, base + 2)
    assert first.apply([lib_locon.Use(a)]).written == 1
    first.restore()
    second.restore()
    assert torch.equal(one["linear"].weight, base)


def test_a_set_that_fails_before_its_first_write_takes_the_old_one_away_too(tmp_path: Path) -> None:
    one = model()
    base = one["linear"].weight.detach().clone()
    session, a = lib_locon.Session(one), adapter(tmp_path)
    session.apply([lib_locon.Use(a)])
    with pytest.raises(lib_locon.PatchError):
        session.apply([lib_locon.Use(a, lib_locon.Strengths.both(1e39))])
    assert torch.equal(one["linear"].weight, base)


def test_a_model_is_freed_though_sessions_and_adapters_live(tmp_path: Path) -> None:
    one = model()
    session = lib_locon.Session(one)
    a = adapter(tmp_path)
    session.apply([lib_locon.Use(a)])
    gone = weakref.ref(one["linear"])
    del one
    assert gone() is None
    assert session is not None


def test_a_model_is_freed_though_the_class_of_a_layer_holds_it(tmp_path: Path) -> None:
    one = model()
    one["linear"].__class__ = type("Wrapped", (nn.Linear,), {"whole": lambda _, model=one: model})
    lib_locon.Session(one).apply([lib_locon.Use(adapter(tmp_path))])
    lib_locon.Session(one).restore()
    alive = weakref.ref(one)
    del one
    gc.collect()
    assert alive() is None


def test_what_is_kept_does_not_grow_with_the_changes(tmp_path: Path) -> None:
    """A curve changes its strength at each step of each image; 20 images of 20 steps."""
    one = model()
    session, found = lib_locon.Session(one), adapter(tmp_path)

    def apply(step: int) -> None:
        session.apply([lib_locon.Use(found, lib_locon.Strengths.both(1 + step / 1000))])

    def kept() -> list[tuple[object, int]]:
        parts = (session._state, session.engine, session.engine.store, session.side)
        held = [(part, name, value) for part in parts for name, value in vars(part).items()]
        return [((type(part), name), len(value)) for part, name, value in held if hasattr(value, "__len__")]

    apply(0)
    before = kept()
    assert len(before) > 5
    for step in range(1, 400):
        apply(step)
    assert kept() == before


def test_a_network_that_only_resembles_a_pipeline_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {}
    for name in ("transformer.text_model.fc", "lm_head"):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(1, 6)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(8, 1)
    save_file(tensors, path)
    inner = nn.ModuleDict({"text_model": nn.ModuleDict({"fc": nn.Linear(6, 8)})})
    one = nn.ModuleDict({"transformer": inner, "lm_head": nn.Linear(6, 8)})
    report = lib_locon.Session(one).apply([lib_locon.Use(lib_locon.load(path))]).adapters[0]
    assert (report.used, report.unmatched) == (2, ())


@pytest.mark.parametrize("wrong", [{"strengths": 0.8}, {"dyn": 0}, {"dyn": 1.5}])
def test_wrong_arguments_are_sentences(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(lib_locon.LoconError, match=r"such as|whole number"):
        lib_locon.Use(adapter(tmp_path), **wrong)  # type: ignore[arg-type]


def test_a_file_cut_short_after_it_was_loaded_does_no_harm(tmp_path: Path) -> None:
    """In a process of its own: a view of the mapped file would end it."""
    code = f"""
import sys, shutil; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch, lib_locon
from torch import nn
adapter = lib_locon.load({str(tmp_path / "big.safetensors")!r})
shutil.copyfile({str(tmp_path / "small.safetensors")!r}, {str(tmp_path / "big.safetensors")!r})
model = nn.ModuleDict({{"linear": nn.Linear(200000, 8)}})
print(lib_locon.Session(model).apply([lib_locon.Use(adapter)]).adapters[0].used)
"""
    adapter(tmp_path, "big", 200_000)
    adapter(tmp_path, "small")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_a_change_takes_none_of_the_random_numbers_that_images_are_made_of(tmp_path: Path) -> None:
    one = model()
    for once in (products._onednn, products._mkl_is_as_good):  # what is tried out once in a process
        once.cache_clear()
    before, pythons = torch.get_rng_state(), random.getstate()
    session = lib_locon.Session(one)
    session.apply([lib_locon.Use(adapter(tmp_path))])
    session.restore()
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == pythons


@pytest.mark.parametrize("kind", ["lora", "loha", "dora"])
def test_what_the_host_chose_for_its_images_does_not_reach_the_sum(tmp_path: Path, kind: str) -> None:
    path, generator = tmp_path / "a.safetensors", torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    pair = {"lora_up.weight": rand(8, 3), "lora_down.weight": rand(3, 6)}
    factors = {
        "lora": pair,
        "loha": {"hada_w1_a": rand(8, 3), "hada_w1_b": rand(3, 6), "hada_w2_a": rand(8, 3), "hada_w2_b": rand(3, 6)},
        "dora": {**pair, "dora_scale": rand(8, 1)},
    }[kind]
    save_file({f"linear.{suffix}": tensor for suffix, tensor in factors.items()}, path)
    one = model()
    session, a = lib_locon.Session(one), lib_locon.load(path)
    session.apply([lib_locon.Use(a)])
    plain = one["linear"].weight.detach().clone()
    session.restore()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            session.apply([lib_locon.Use(a)])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(one["linear"].weight, plain)
