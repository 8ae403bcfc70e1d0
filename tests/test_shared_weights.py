"""Weights that others have too: two parameters over one memory, a model and a part of it, several devices, a model
that is gone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import lib_locon
from lib_locon import PatchError, Session, Use
from lib_locon.families.ia3 import IA3
from lib_locon.patching import compute, storage
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import Plan, make_plan

if TYPE_CHECKING:
    from tests.conftest import MakePatch, WriteAdapter


def adapter(write: WriteAdapter, path: Path, *modules: str, size: float = 1.0) -> lib_locon.Adapter:
    factors = {"lora_up.weight": torch.full((6, 1), size), "lora_down.weight": torch.ones(1, 6)}
    return lib_locon.load(write(path, dict.fromkeys(modules, factors)))


def plan_of(patch: MakePatch, model: nn.Module, *paths: str) -> Plan:
    return make_plan(patch(path, torch.ones(model.get_parameter(path).shape)) for path in paths)


def over(*weights: Tensor) -> nn.ParameterDict:
    return nn.ParameterDict({f"w{number}": nn.Parameter(weight) for number, weight in enumerate(weights)})


@pytest.mark.parametrize("second", ["whole", "rows", "columns of both"])
def test_two_parameters_over_the_same_numbers_are_refused(second: str, patch: MakePatch) -> None:
    """The second one's base would be what the first was changed to."""
    memory = torch.rand(12, 8)
    parts = {"whole": (memory, memory), "rows": (memory, memory[4:6])}
    model = over(*parts.get(second, (memory[:, :5], memory[:, 4:])))
    base = memory.clone()
    engine = Engine(model)
    with pytest.raises(PatchError, match=r"w0 and w1 are two parameters over the same memory.*is the base again"):
        engine.apply(plan_of(patch, model, "w0", "w1"))
    assert torch.equal(memory, base)
    for path in ("w0", "w1", "w0"):  # one after the other: each then finds the base
        assert engine.apply(plan_of(patch, model, path)) > 0
    engine.restore()
    assert torch.equal(memory, base)


def test_parameters_between_each_other_share_no_number(patch: MakePatch) -> None:
    memory = torch.rand(12, 8)
    base = memory.clone()
    model = over(memory[:, :5], memory[:, 5:], memory.clone()[:4])
    engine = Engine(model)
    assert engine.apply(plan_of(patch, model, "w0", "w1", "w2")) == 3
    assert torch.equal(memory, base + 1)
    engine.restore()
    assert torch.equal(memory, base)


def test_one_parameter_under_two_names_is_one_weight(patch: MakePatch) -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 6, bias=False), "other": nn.Linear(6, 6, bias=False)})
    model["other"].weight = nn.init.zeros_(model["one"].weight)
    patches = [patch(path, torch.ones(6, 6), source=path) for path in ("one.weight", "other.weight")]
    engine = Engine(model)
    assert engine.apply(make_plan(patches)) == 1
    assert (model["one"].weight == 2).all()
    engine.restore()
    assert (model["one"].weight == 0).all()


def test_a_compiled_model_and_its_inner_one_are_one_model(write_adapter: WriteAdapter, tmp_path: Path) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(6, 6)})
    base = model["linear"].weight.detach().clone()
    a, b = (adapter(write_adapter, tmp_path / f"{n}.safetensors", "linear", size=n) for n in (1, 2))
    plain, compiled = Session(model), Session(torch.compile(model, backend="eager"))
    plain.apply([Use(a)])
    compiled.apply([Use(b)])
    assert torch.equal(model["linear"].weight, base + 2)
    plain.apply([])
    assert torch.equal(model["linear"].weight, base)
    assert not compiled.active


def test_a_model_and_a_part_of_it_never_hold_adapters_in_one_weight(
    write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    part = nn.ModuleDict({"linear": nn.Linear(6, 6), "free": nn.Linear(6, 6)})
    whole = nn.ModuleDict({"unet": part})
    base = part["linear"].weight.detach().clone()
    on_linear = [Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear", "unet.linear"))]
    on_free = [Use(adapter(write_adapter, tmp_path / "b.safetensors", "free", "unet.free"))]
    for one, other in ((Session(part), Session(whole)), (Session(whole), Session(part))):
        one.apply(on_linear)
        assert other.apply(on_free).written == 1  # another weight
        with pytest.raises(PatchError, match="holds an adapter of a Session for another model"):
            other.apply(on_linear)
        assert one.apply([*on_linear, *on_linear]).written == 1
        assert torch.equal(part["linear"].weight, base + 2)
        one.apply([])
        assert other.apply(on_linear).written == 1
        assert torch.equal(part["linear"].weight, base + 1)
        other.apply([])
        assert torch.equal(part["linear"].weight, base)


def test_sessions_for_a_model_and_a_part_of_it_wait_for_each_other(write_adapter: WriteAdapter, tmp_path: Path) -> None:
    part = nn.ModuleDict({"linear": nn.Linear(6, 6)})
    whole = nn.ModuleDict({"unet": part})
    one, other = Session(part), Session(whole)
    uses = [Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear", "unet.linear"))]
    done = threading.Event()
    with one._state.lock:
        thread = threading.Thread(target=lambda: (other.apply(uses), done.set()))
        thread.start()
        assert not done.wait(0.2)
    thread.join()
    assert done.is_set()


@pytest.mark.parametrize("held", [True, False], ids=["with an adapter", "after it"])
def test_the_base_of_a_model_that_is_gone_is_freed(write_adapter: WriteAdapter, tmp_path: Path, held: bool) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(6, 6)})
    session = Session(model)
    session.apply(uses := [Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear"))])
    session.apply(uses if held else [])
    assert session.engine.base_bytes == 6 * 6 * 4
    del model
    assert session.engine.base_bytes == 0
    assert not session.active
    session.restore()


def test_the_base_lives_as_long_as_its_module(write_adapter: WriteAdapter, tmp_path: Path) -> None:
    """The host may take a part out of a model and let go of the rest."""
    part = nn.ModuleDict({"linear": nn.Linear(6, 6)})
    base = part["linear"].weight.detach().clone()
    session = Session(whole := nn.ModuleDict({"unet": part}))
    session.apply([Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear", "unet.linear"))])
    del whole
    assert torch.equal(part["linear"].weight, base + 1)
    session.restore()
    assert torch.equal(part["linear"].weight, base)


def test_sums_on_several_devices_are_looked_at_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[torch.device, torch.dtype, int]] = []

    def overflows(extremes: Tensor, dtype: torch.dtype) -> bool:
        looked.append((extremes.device, dtype, len(extremes)))
        return extremes.is_meta

    monkeypatch.setattr(compute, "overflows", overflows)
    cpu, meta = torch.zeros(2), torch.zeros(2, device="meta")  # which stands for a GPU
    noted = {"a": (cpu, torch.half), "b": (meta, torch.half), "c": (cpu, torch.half), "d": (cpu, torch.float)}
    assert compute.overflowing(noted) == ["b"]
    places = [(cpu.device, torch.half, 4), (meta.device, torch.half, 2), (meta.device, torch.half, 2)]
    assert looked == [*places, (cpu.device, torch.float, 2)]


def test_single_numbers_stay_where_they_can_be_looked_at_without_waiting() -> None:
    elsewhere = IA3(torch.ones(6), torch.tensor(1)).to(torch.device("meta"))
    assert elsewhere.vector.is_meta
    assert bool(elsewhere.on_input)


def test_each_weight_is_looked_at_once_in_a_change(
    write_adapter: WriteAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 6, bias=False), "other": nn.Linear(6, 6, bias=False)})
    uses = [Use(adapter(write_adapter, tmp_path / f"{n}.safetensors", "one", "other", size=n)) for n in (1, 2)]
    session = Session(model)
    session.apply(uses)
    looks: list[tuple[nn.Module, str]] = []
    look = storage._cannot_hold

    def counted(module: nn.Module, name: str, findings: storage.Findings) -> str | None:
        looks.append((module, name))
        return look(module, name, findings)

    monkeypatch.setattr(storage, "_cannot_hold", counted)
    session.apply([uses[1]])
    assert looks == [(model["one"], "weight"), (model["other"], "weight")]
    looks.clear()
    session.apply(uses)  # another change looks anew
    assert looks == [(model["one"], "weight"), (model["other"], "weight")]
