"""All or nothing on a GPU: interrupts at every operation, and a checkpoint file that is lost meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lib_locon
from lib_locon.errors import PatchError
from tests.conftest import WriteAdapter
from tests.second_device.device import DEVICES
from tests.second_device.test_sets import parameters, same
from tests.second_device.test_waits import factors, layers
from tests.second_device.ways import WAYS, keep
from tests.test_store import HOUR


class Interrupt(TorchDispatchMode):
    """Ctrl-C before the operation of that number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


@pytest.fixture
def held(write_adapter: WriteAdapter, tmp_path: Path) -> Callable[..., tuple[nn.Module, lib_locon.Session, Any, Any]]:
    """held(way) -> a model on a GPU, its session, and two sets, of LoRA and of DoRA."""

    def make(way: str) -> tuple[nn.Module, lib_locon.Session, Any, Any]:
        model = layers(2)
        session = lib_locon.Session(model)
        keep(session, way, tmp_path, model.state_dict())
        sets = []
        for kind in ("lora", "dora"):
            generator = torch.Generator().manual_seed(1)
            modules = {name: factors(kind, layer.weight, generator) for name, layer in model.items()}
            path = write_adapter(tmp_path / f"{kind}.safetensors", modules)
            sets.append([lib_locon.Use(lib_locon.load(path), lib_locon.Strengths.both(0.7))])
        model.to(DEVICES[0])
        return model, session, *sets

    return make


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_at_any_operation_leaves_the_base(way: str, held: Callable[..., Any]) -> None:
    model, session, one, other = held(way)
    base = parameters(model)
    session.apply(one)
    patched = parameters(model)
    points = []
    for uses, before in ((one, []), (other, one), ([], other)):  # a first set, another one, none
        for number in range(1, 1000):
            session.apply(before)
            try:
                with Interrupt(number):
                    session.apply(uses)
            except KeyboardInterrupt:
                assert same(model, base)
                assert not session.active
            else:
                points.append(number)
                break
    assert len(points) == 3
    assert min(points) > 3  # two layers, and what is asked of each
    session.apply(one)
    assert same(model, patched)
    session.restore()
    assert same(model, base)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_interrupts_while_a_gpu_is_waited_for_leave_the_base_that_is_loaded_then(
    times: int, held: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, session, one, _ = held("checkpoint")
    wait, left = torch.cuda.synchronize, [times]

    def interrupted(device: object = None) -> None:
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        wait(device)

    monkeypatch.setattr(torch.cuda, "synchronize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.apply(one)
    while left[0]:
        with pytest.raises(KeyboardInterrupt):
            session.restore()
    other = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    model.load_state_dict(other)
    session.apply(one)
    session.restore()
    assert same(model, {name: value.cpu() for name, value in other.items()})


def test_a_file_whose_time_alone_has_changed_is_read_on(held: Callable[..., Any], tmp_path: Path) -> None:
    model, session, one, other = held("checkpoint")
    base = parameters(model)
    for uses in (one, other, []):
        session.apply(uses)
        then = (tmp_path / "model.safetensors").stat().st_mtime_ns - HOUR
        os.utime(tmp_path / "model.safetensors", ns=(then, then))
    session.apply(one)
    session.restore()
    assert same(model, base)


def test_a_file_that_is_lost_meanwhile_is_said_and_nothing_wrong_is_written(
    held: Callable[..., Any], tmp_path: Path
) -> None:
    model, session, one, other = held("checkpoint")
    base = parameters(model)
    session.apply(one)
    before = parameters(model)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    for uses in (other, []):
        with pytest.raises(PatchError, match="load the checkpoint again"):
            session.apply(uses)
    now = parameters(model)
    for name in base:
        assert any(torch.equal(now[name], numbers[name]) for numbers in (base, before)), name
    model.load_state_dict({name: tensor.to(DEVICES[0]) for name, tensor in base.items()})  # as it says
    session.apply([])
    assert not session.active
    assert same(model, base)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", [0, 1])
def test_weights_that_were_made_in_inference_mode_beside_others(way: str, first: int, held: Callable[..., Any]) -> None:
    """Hosts load parts of a model so; torch lets nobody write into these outside of that mode."""
    model, session, one, other = held(way)
    plain = parameters(model)
    with torch.inference_mode():
        layer = model[f"layer{first}"]
        for name, value in layer.named_parameters():
            setattr(layer, name, nn.Parameter(value.clone(), requires_grad=False))
    session.apply(one)
    wanted = parameters(model)
    for uses in (other, [], one):
        session.apply(uses)
    assert same(model, wanted)
    assert not same(model, plain)
    session.restore()
    assert same(model, plain)


def test_when_a_change_is_over_all_copies_are_there(held: Callable[..., Any]) -> None:
    """Also those of another GPU: the next who reads one may be the processor."""
    model, session, one, _ = held("ram")
    model["layer1"].to(DEVICES[1])
    base = parameters(model)
    session.apply(one)
    copies = session.engine.store._copies
    assert {model.get_parameter(name).device for name in copies} == set(DEVICES)
    assert all(torch.equal(copy, base[name]) for name, copy in copies.items())


def test_a_proof_is_of_its_change_only(held: Callable[..., Any]) -> None:
    model, session, one, _ = held("checkpoint")
    session.apply(one)
    session.apply([])
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2)
    edited = parameters(model)
    session.engine.store.policy = "ram"
    session.apply(one)
    session.restore()
    assert same(model, edited)
