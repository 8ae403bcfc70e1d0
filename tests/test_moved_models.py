"""Models that are sent away, copied or pickled while they hold adapters, and files that change behind a model."""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.errors import LoconError, PatchError
from lib_locon.files.pristine import SAMPLE_BYTES, SAMPLES
from lib_locon.hosts.sessions import Sessions
from lib_locon.patching import hooks

if TYPE_CHECKING:
    from lib_locon.report import Report

WIDTH = 8


def two_layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.fixture
def adapter(tmp_path: Path) -> lib_locon.Adapter:
    factors = {f"{i}.lora_up.weight": torch.ones(WIDTH, 2) for i in (0, 1)}
    factors |= {f"{i}.lora_down.weight": torch.full((2, WIDTH), 0.5) for i in (0, 1)}
    save_file(factors, tmp_path / "a.safetensors")
    return lib_locon.load(tmp_path / "a.safetensors")


def apply(session: lib_locon.Session, adapter: lib_locon.Adapter, strength: float = 1.0) -> Report:
    return session.apply([lib_locon.Use(adapter, lib_locon.Strengths.both(strength))])


# ---- the meta device


def test_a_model_without_numbers_keeps_no_other_from_its_base(adapter: lib_locon.Adapter) -> None:
    models = [two_layers() for _ in range(3)]
    before = [numbers(model) for model in models]
    sessions = Sessions()
    for model in models:
        apply(sessions.of(model, None), adapter)
    models[0].to("meta")
    with pytest.raises(PatchError, match=r"2 weights, 0\.weight first.*the meta device, which holds no numbers"):
        sessions.clear()
    assert same(models[1], before[1]) and same(models[2], before[2])
    assert not sessions.active


def test_the_weights_that_still_have_numbers_get_their_base(adapter: lib_locon.Adapter) -> None:
    model = two_layers()
    before = numbers(model)
    session = lib_locon.Session(model)
    apply(session, adapter)
    model[0].to("meta")
    with pytest.raises(PatchError, match=r"1 weights, 0\.weight first"):
        session.restore()
    assert torch.equal(model[1].weight, before["1.weight"])
    session.restore()  # said once
    assert not session.active


def test_a_set_for_such_a_model_runs_beside_the_layer_or_says_why_not(
    adapter: lib_locon.Adapter, tmp_path: Path
) -> None:
    model = two_layers()
    session = lib_locon.Session(model)
    apply(session, adapter)
    session.restore()
    model[0].to("meta")
    assert apply(session, adapter).adapters[0].used == 2 and model[0]._forward_hooks
    factors = {"0.lora_up.weight": torch.ones(WIDTH, 2), "0.lora_down.weight": torch.ones(2, WIDTH)}
    save_file({**factors, "0.dora_scale": torch.ones(WIDTH, 1)}, tmp_path / "d.safetensors")  # it needs the weight
    report = apply(session, lib_locon.load(tmp_path / "d.safetensors"))
    assert report.adapters[0].used == 0 and "the model's weight has no data (meta device)" in str(report)
    session.restore()


def test_a_change_that_meets_one_gives_all_others_their_base(adapter: lib_locon.Adapter) -> None:
    model = two_layers()
    before = numbers(model)
    session = lib_locon.Session(model)
    apply(session, adapter)
    model[0].to("meta")
    with pytest.raises(PatchError, match="the meta device"):
        session.apply([])
    assert torch.equal(model[1].weight, before["1.weight"]) and not session.active


def put(weight: object) -> Any:
    def change(layer: nn.Module) -> None:
        layer._parameters["weight"] = weight  # type: ignore[assignment]

    return change


class Refusing(nn.Parameter):
    """A tensor of somebody's own class, that fails whatever it is asked for."""

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> Any:
        raise ZeroDivisionError("nothing works here")


STRANGE = {
    "sparse": lambda layer: put(nn.Parameter(layer.weight.detach().to_sparse()))(layer),
    "none": put(None),
    "no tensor": put("weight"),
    "deleted": lambda layer: delattr(layer, "weight"),
    "refusing": lambda layer: put(Refusing(layer.weight.detach()))(layer),
}


@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE)
def test_a_weight_that_became_something_else_keeps_no_other_from_its_base(
    change: Any, adapter: lib_locon.Adapter
) -> None:
    models = [two_layers() for _ in range(2)]
    before = numbers(models[0])
    sessions = Sessions()
    for model in models:
        apply(sessions.of(model, None), adapter)
    change(models[0][0])
    other = two_layers()  # compared with those that hold adapters
    apply(lib_locon.Session(other), adapter)
    with pytest.raises(PatchError, match=r"^1 weights, 0\.weight first, could not be given their base back"):
        sessions.clear()
    assert torch.equal(models[0][1].weight, before["1.weight"])
    assert same(models[1], before)


# ---- copies


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved])
def test_nothing_runs_beside_a_copy(make: Any, adapter: lib_locon.Adapter) -> None:
    model, x = two_layers(), torch.randn(3, WIDTH)
    base = model(x)
    session = lib_locon.Session(model, side_path=True)
    apply(session, adapter)
    patched = model(x)
    clone = make(model)
    assert torch.equal(clone(x), base) and torch.equal(model(x), patched) and not torch.equal(patched, base)
    other = lib_locon.Session(clone, side_path=True)
    assert not other.active
    assert not apply(other, adapter).warnings
    torch.testing.assert_close(clone(x), patched)
    other.restore()
    session.restore()
    assert torch.equal(clone(x), base) and torch.equal(model(x), base)
    assert not any(isinstance(hook, hooks.Hook) for hook in clone[0]._forward_hooks.values())


def test_a_pickled_model_is_loaded_where_this_package_is_not(adapter: lib_locon.Adapter, tmp_path: Path) -> None:
    model, x = two_layers(), torch.ones(1, WIDTH)
    base = model(x)
    apply(lib_locon.Session(model, side_path=True), adapter)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    script = f"""
import sys
sys.modules["lib_locon"] = None
import pickle, torch
model = pickle.load(open({str(tmp_path / "model")!r}, "rb"))
torch.save(model(torch.ones(1, {WIDTH})).detach(), {str(tmp_path / "output")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "output"), base)


def test_a_replica_of_data_parallel_runs_as_its_model_does(adapter: lib_locon.Adapter) -> None:
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(3, WIDTH)
    model = nn.Sequential(layer, nn.Linear(WIDTH, WIDTH))
    session = lib_locon.Session(model, side_path=True)
    apply(session, adapter)
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight, layer.bias
    assert torch.equal(replica(x), layer(x))
    session.restore()


@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
def test_a_copy_of_patched_weights_has_a_base_of_its_own_and_it_is_said(make: Any, adapter: lib_locon.Adapter) -> None:
    model = two_layers()
    before = numbers(model)
    session = lib_locon.Session(model)
    apply(session, adapter)
    clone = make(model)
    patched = numbers(clone)
    other = lib_locon.Session(clone)
    report = apply(other, adapter, 0.5)
    assert "copied from one that held adapters" in str(report)
    assert "copied from one that held adapters" in str(apply(other, adapter, 0.5)), "the same set again too"
    other.restore()
    assert same(clone, patched), "the numbers that it came with, none of the other model's"
    session.restore()
    assert same(model, before) and same(clone, patched)


def test_a_copy_of_a_base_is_nothing_to_speak_of(adapter: lib_locon.Adapter) -> None:
    model = two_layers()
    clone = copy.deepcopy(model)
    session = lib_locon.Session(model)
    apply(session, adapter)
    assert not apply(lib_locon.Session(clone), adapter).warnings
    session.restore()


# ---- a checkpoint file whose bytes change while its size and its time do not


def loaded(path: Path) -> tuple[nn.Module, lib_locon.Session, dict[str, Tensor]]:
    model = two_layers()
    save_file({name: weight.detach() for name, weight in model.named_parameters()}, path)
    os.utime(path, ns=(1, 1))
    session = lib_locon.Session(model)
    session.read_bases_from(path)
    return model, session, numbers(model)


def rewrite(path: Path, change: Any) -> None:
    """Changes the content in place; size and time stay."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    change(content)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns


def other_numbers(content: bytearray) -> None:
    content[-WIDTH * WIDTH :] = bytes(WIDTH * WIDTH)


@pytest.mark.skipif(os.name == "nt", reason="no such time there")
def test_other_bytes_under_the_same_time_are_never_taken_for_the_base(
    adapter: lib_locon.Adapter, tmp_path: Path
) -> None:
    path = tmp_path / "base.safetensors"
    model, session, before = loaded(path)
    apply(session, adapter)
    rewrite(path, other_numbers)
    with pytest.raises(LoconError, match="has changed since it was loaded"):
        session.restore()
    wrong = load_file(path)
    assert all(
        torch.equal(weight, before[name]) or not torch.equal(weight, wrong[name])
        for name, weight in model.named_parameters()
        if not torch.equal(before[name], wrong[name])
    )


@pytest.mark.skipif(os.name == "nt", reason="no such time there")
@pytest.mark.parametrize("looked_at", [False, True])
def test_a_change_beside_the_samples_is_seen_however_often_the_file_was_looked_at(
    looked_at: bool, tmp_path: Path
) -> None:
    width = 256
    factors = {"0.lora_up.weight": torch.ones(width, 2), "0.lora_down.weight": torch.ones(2, width)}
    save_file(factors, tmp_path / "a.safetensors")
    model, path = nn.Sequential(nn.Linear(width, width, bias=False)), tmp_path / "base.safetensors"
    save_file({"0.weight": model[0].weight.detach()}, path)
    os.utime(path, ns=(1, 1))
    session = lib_locon.Session(model)
    session.read_bases_from(path)
    apply(session, lib_locon.load(tmp_path / "a.safetensors"))
    held = numbers(model)

    def one_byte(content: bytearray) -> None:
        content[path.stat().st_size // SAMPLES + SAMPLE_BYTES + 100] ^= 1

    rewrite(path, one_byte)
    if looked_at:
        assert not session.engine.store.report().file_changed, "the samples do not tell"
    with pytest.raises(LoconError, match="has changed since it was loaded"):
        session.restore()
    assert same(model, held)
    rewrite(path, one_byte)
    session.restore()
    assert torch.equal(model[0].weight, load_file(path)["0.weight"])


@pytest.mark.skipif(os.name == "nt", reason="no such time there")
@pytest.mark.parametrize("how", ["renamed", "linked", "mode", "deleted", "read again"])
def test_a_file_that_is_only_moved_or_touched_is_read_on(how: str, adapter: lib_locon.Adapter, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    model, session, before = loaded(path)
    apply(session, adapter)
    if how == "renamed":
        path.rename(tmp_path / "other.safetensors")
    elif how == "linked":
        (tmp_path / "link.safetensors").hardlink_to(path)
    elif how == "mode":
        path.chmod(0o600)
    elif how == "deleted":
        path.unlink()
    else:
        shutil.copy(path, tmp_path / "copy.safetensors")
    apply(session, adapter, 0.25)
    session.restore()
    assert same(model, before)


def test_content_that_changes_without_any_time_is_seen_by_its_samples(
    adapter: lib_locon.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib_locon.files import handles

    # a drive that keeps no ctime, or a write through a memory map that has not reached it yet
    real = os.fstat
    monkeypatch.setattr(handles.os, "fstat", lambda number: _Still(real(number)))
    model, session, _ = loaded(tmp_path / "base.safetensors")
    apply(session, adapter)
    rewrite(tmp_path / "base.safetensors", other_numbers)
    with pytest.raises(LoconError, match="has changed since it was loaded"):
        apply(session, adapter, 0.5)
    assert model is not None  # its session lives as long as it does


class _Still:
    """A file's state whose ctime stands still."""

    def __init__(self, found: os.stat_result) -> None:
        self._found = found

    def __getattr__(self, name: str) -> Any:
        return 0 if name == "st_ctime_ns" else getattr(self._found, name)


def test_samples_cost_next_to_nothing(tmp_path: Path) -> None:
    from lib_locon.files.pristine import _sampled

    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 32)
    with io.FileIO(path) as large:
        _sampled(large, 1 << 32)
        started = time.process_time()
        _sampled(large, 1 << 32)
        assert time.process_time() - started < 0.05
