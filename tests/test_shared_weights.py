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
from lib_locon.patching import overflow, places, storage
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
    on_linear = [Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear"))]
    on_free = [Use(adapter(write_adapter, tmp_path / "b.safetensors", "free"))]
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
    uses = [Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear"))]
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
    session.apply([Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear"))])
    del whole
    assert torch.equal(part["linear"].weight, base + 1)
    session.restore()
    assert torch.equal(part["linear"].weight, base)


def test_sums_on_several_devices_are_looked_at_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[torch.device, torch.dtype, int]] = []

    def overflows(extremes: Tensor, dtype: torch.dtype) -> bool:
        looked.append((extremes.device, dtype, len(extremes)))
        return extremes.is_meta

    monkeypatch.setattr(overflow, "overflows", overflows)
    cpu, meta = torch.zeros(2), torch.zeros(2, device="meta")  # which stands for a GPU
    noted = {"a": (cpu, torch.half), "b": (meta, torch.half), "c": (cpu, torch.half), "d": (cpu, torch.float)}
    assert overflow.overflowing(noted) == ["b"]
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


def test_two_parts_and_the_whole_of_them_wait_for_each_other(write_adapter: WriteAdapter, tmp_path: Path) -> None:
    """The whole comes last, as a pipeline does after its parts."""
    parts = [nn.ModuleDict({"linear": nn.Linear(6, 6)}) for _ in range(2)]
    sessions = [Session(part) for part in parts]
    whole = Session(nn.ModuleDict({"unet": parts[0], "text_encoder": parts[1]}))
    kept = whole.table  # and its model is kept by nobody: the parts are
    assert kept is not None
    uses = [Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear"))]
    for session in sessions:
        done = threading.Event()
        with whole._state.alone():
            thread = threading.Thread(target=lambda session=session, done=done: (session.apply(uses), done.set()))
            thread.start()
            assert not done.wait(0.1)
        thread.join()
        assert done.is_set()


def test_a_parameter_outlives_one_of_its_modules(patch: MakePatch) -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 6, bias=False), "other": nn.Linear(6, 6, bias=False)})
    model["other"].weight = nn.init.zeros_(model["one"].weight)
    engine = Engine(model)
    engine.apply(plan_of(patch, model, "one.weight"))
    model["one"] = nn.Linear(6, 6, bias=False)
    engine.restore()
    assert (model["other"].weight == 0).all()
    assert not engine.active


def test_the_same_set_again_says_that_a_module_of_it_is_gone(patch: MakePatch) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(6, 6, bias=False), "other": nn.Linear(6, 6, bias=False)})
    engine = Engine(model)
    plan = plan_of(patch, model, "linear.weight", "other.weight")
    engine.apply(plan)
    model["linear"] = nn.Linear(6, 6, bias=False)
    with pytest.raises(PatchError, match=r"linear.weight.*is gone"):
        engine.apply(plan)


def test_a_weight_that_another_module_took_over_is_not_forgotten(patch: MakePatch) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(6, 6, bias=False)})
    engine = Engine(model)
    engine.apply(plan_of(patch, model, "linear.weight"))
    taken = nn.Module()
    taken.inner = nn.ParameterList([model["linear"].weight])
    model["linear"] = taken
    with pytest.raises(PatchError, match=r"linear.weight.*is gone"):
        engine.restore()


def test_what_was_two_parameters_may_be_one_and_the_other_way_round(patch: MakePatch) -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 6, bias=False), "other": nn.Linear(6, 6, bias=False)})
    for weight in (model["one"].weight, model["other"].weight):
        nn.init.zeros_(weight)
    engine, apart = Engine(model), model["other"].weight
    both = make_plan(patch(path, torch.ones(6, 6), source=path) for path in ("one.weight", "other.weight"))
    model["other"].weight = model["one"].weight
    assert engine.apply(both) == 1
    assert (model["one"].weight == 2).all()
    engine.restore()
    engine = Engine(model)
    model["other"].weight = apart
    assert engine.apply(both) == 2
    assert (model["one"].weight == 1).all()
    assert (apart == 1).all()
    engine.restore()
    assert (model["one"].weight == 0).all()
    assert (apart == 0).all()


def test_a_module_that_was_replaced_is_said_and_a_new_session_knows_the_new_one(
    write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
    base = model["other"].weight.detach().clone()
    session, uses = Session(model), [Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear", "other"))]
    session.apply(uses)
    model["linear"] = nn.Linear(6, 6)
    fresh = model["linear"].weight.detach().clone()
    with pytest.raises(PatchError, match=r"linear.weight.*is gone; make a new Session"):
        session.apply(uses)
    assert torch.equal(model["other"].weight, base)
    assert not session.active
    assert Session(model).apply(uses).written == 2
    assert torch.equal(model["linear"].weight, fresh + 1)
    Session(model).restore()
    assert torch.equal(model["linear"].weight, fresh)
    assert torch.equal(model["other"].weight, base)


def test_a_checkpoint_loaded_into_a_part_is_no_adapter_to_the_whole(
    write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    part = nn.ModuleDict({"linear": nn.Linear(6, 6)})
    whole = nn.ModuleDict({"unet": part})
    uses = [Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear"))]
    first = Session(part)
    first.apply(uses)
    part.load_state_dict({"linear.weight": torch.zeros(6, 6), "linear.bias": torch.zeros(6)})
    second = Session(whole)
    assert second.apply(uses).written == 1
    assert (part["linear"].weight == 1).all()
    second.apply([])
    assert (part["linear"].weight == 0).all()
    assert not first.active


def test_models_that_share_a_parameter_only_know_of_each_other(write_adapter: WriteAdapter, tmp_path: Path) -> None:
    one, other = (nn.ModuleDict({"linear": nn.Linear(6, 6)}) for _ in range(2))
    other["linear"].weight = one["linear"].weight
    uses = [Use(adapter(write_adapter, tmp_path / "a.safetensors", "linear"))]
    Session(one).apply(uses)
    with pytest.raises(PatchError, match="for another model"):
        Session(other).apply(uses)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_overlaps_is_told_by_memory_and_found_among_many(device: str) -> None:
    """`w2` begins in `w0`, and ends before `w1`, which lies between the two and shares nothing with it."""
    memory = torch.zeros(12, 8, device=device)
    weights = {"w0": memory[:, :5], "w1": memory[:, 5:], "w2": memory[6:, :2], "empty": memory[:0]}
    if device == "meta":  # as on a GPU whose addresses are not those of memory
        places.refuse_overlaps(weights)
        return
    with pytest.raises(PatchError, match="w0 and w2 are two parameters"):
        places.refuse_overlaps(weights)
    places.refuse_overlaps({name: weight for name, weight in weights.items() if name != "w2"})
    with pytest.raises(PatchError, match="w0 and w3 are"):  # of another dtype: not looked at any closer
        places.refuse_overlaps({"w0": weights["w0"], "w3": memory.view(torch.int16)[:, 12:]})
    rows = memory.expand(3, 12, 8)
    with pytest.raises(PatchError):
        places.refuse_overlaps({"w0": weights["w0"], "w4": rows})
