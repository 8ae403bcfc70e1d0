"""A base that is read from its file by rows, where the sum needs them: the same bits, and nothing wrong written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from lib_locon.errors import FileError, PatchError
from lib_locon.files import handles
from lib_locon.files.pristine import CheckpointSource
from lib_locon.patching import compute
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import Plan, make_plan
from lib_locon.patching.store import BaseStore
from lib_locon.patching.workspace import Workspace
from tests.test_faults_low_rank import PATHS, compiled, product_plan
from tests.test_store import bits, checkpoint, randn, source_of, weights

if TYPE_CHECKING:
    from tests.conftest import MakePatch, Zoo

pytestmark = compiled
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Small tiles; and what was read of which weight, from which number on."""
    monkeypatch.setattr(compute, "TILE", 16)
    read: list[tuple[str, int]] = []
    read_part = CheckpointSource.read_part

    def noted(self: CheckpointSource, path: str, first: int, out: Tensor) -> None:
        read.append((path, first))
        read_part(self, path, first, out)

    monkeypatch.setattr(CheckpointSource, "read_part", noted)
    return read


def engine_of(model: nn.Module, path: Path, *, stored: torch.dtype | None = None) -> Engine:
    engine = Engine(model)
    tensors = {name: tensor.to(stored or tensor.dtype) for name, tensor in model.state_dict().items()}
    engine.store = BaseStore("checkpoint", source_of(checkpoint(path, tensors)))
    return engine


def at(strength: float, patch: MakePatch, model: nn.Module, seed: int = 1) -> Plan:
    plan = product_plan(patch, model, PATHS, seed)
    return {path: tuple(type(p)(p.source, p.view, strength, p.delta) for p in plan[path]) for path in plan}


@pytest.mark.usefixtures("hands")
@pytest.mark.parametrize("at_once", [True, False], ids=["each at its place", "one position"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_the_same_bits_as_from_copies(
    zoo: Zoo, patch: MakePatch, parts: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype, stored: torch.dtype, at_once: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(handles, "AT_ONCE", at_once and handles.AT_ONCE)
    model, reference = zoo(stored).to(dtype), zoo(stored).to(dtype)
    engine, plain, base = engine_of(model, tmp_path / "m.safetensors", stored=stored), Engine(reference), weights(model)
    for first, strength in ((True, 1.0), (False, 0.3), (False, -2.0)):
        parts.clear()
        engine.apply(at(strength, patch, model))
        plain.apply(at(strength, patch, reference))
        assert weights(model) == weights(reference) != base
        # the first change has read each weight whole, to prove that it is there; others go by rows
        assert {path for path, _ in parts} == (set() if first else set(PATHS))
    assert engine.store.report().weights == {"checkpoint": len(PATHS)}
    parts.clear()
    engine.apply({})
    assert weights(model) == base
    assert len(parts) > 3 * len(PATHS)


def test_a_model_in_another_dtype_than_its_proof_reads_the_whole(
    zoo: Zoo, patch: MakePatch, parts: list[tuple[str, int]], tmp_path: Path
) -> None:
    model, reference = zoo(), zoo()
    engine, plain = engine_of(model, tmp_path / "m.safetensors"), Engine(reference)
    for each, changed in ((engine, model), (plain, reference)):
        each.apply(at(1.0, patch, changed))
        changed.to(torch.bfloat16)
        each.apply(at(0.5, patch, changed))
    assert not parts
    assert weights(model) == weights(reference)
    engine.apply({})
    assert weights(model) == weights(zoo().to(torch.bfloat16))


def test_what_needs_more_than_rows_reads_the_whole(
    zoo: Zoo, patch: MakePatch, parts: list[tuple[str, int]], tmp_path: Path
) -> None:
    """A ΔW of another kind, a part of a weight, a sum that may overflow, the built-in's rounding."""
    model, reference = zoo(), zoo()
    engine, plain = engine_of(model, tmp_path / "m.safetensors"), Engine(reference)
    engine.apply(at(1.0, patch, model))
    up, down, whole = randn(8, 2), randn(2, 12), randn(8, 12)
    others = [
        patch("linear.weight", whole),
        patch("linear.weight", up=up, down=down, strength=1e30),
        patch("fused.weight", up=up, down=down, axis=0, start=8, length=8),
    ]
    for other in others:
        for each, changed in ((engine, model), (plain, reference)):
            each.apply({**at(1.0, patch, changed), other.view.path: (other,)})
            if each is engine:
                assert other.view.path not in {path for path, _ in parts}
        parts.clear()
        assert weights(model) == weights(reference)
        engine.apply(at(0.5, patch, model))
        assert other.view.path in {path for path, _ in parts}
        parts.clear()
    engine.apply(at(1.0, patch, model), "builtin")
    plain.apply(at(1.0, patch, reference), "builtin")
    assert not parts
    assert weights(model) == weights(reference)


@pytest.mark.parametrize("removal", [True, False], ids=["removal", "change"])
def test_a_file_that_changes_between_two_rows(
    zoo: Zoo, patch: MakePatch, parts: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    removal: bool,
) -> None:  # fmt: skip
    """Each number is an old or a new one; and a checkpoint that is loaded then is the base."""
    reading = CheckpointSource.read_part
    for moment in range(1, 12):
        model, path = zoo(), tmp_path / f"{moment}.safetensors"
        engine, base = engine_of(model, path), {n: w.detach().clone() for n, w in model.named_parameters()}
        engine.apply(at(1.0, patch, model))
        old = {n: w.detach().clone() for n, w in model.named_parameters()}
        engine.apply(wanted := {} if removal else at(0.5, patch, model))
        new = {n: w.detach().clone() for n, w in model.named_parameters()}
        engine.apply(at(1.0, patch, model))
        parts.clear()

        def failing(self: CheckpointSource, name: str, first: int, out: Tensor, moment: int = moment) -> None:
            reading(self, name, first, out)
            if len(parts) > moment:
                out.fill_(torch.nan)
                raise FileError("it has changed")

        with monkeypatch.context() as changed:
            changed.setattr(CheckpointSource, "read_part", failing)
            changed.setattr(CheckpointSource, "has_parts", lambda self, moment=moment: len(parts) <= moment)
            changed.setattr(CheckpointSource, "read", Failing(parts, moment, CheckpointSource.read))
            with pytest.raises(PatchError, match="load the checkpoint again"):
                engine.apply(wanted)
            assert engine.active
            assert not engine.unchanged()  # half of a sum is none
            for name, weight in model.named_parameters():
                known = (weight == old[name]) | (weight == new[name]) | (weight == base[name])
                assert known.all(), name
            model.load_state_dict(zoo(seed=5).state_dict())
            fresh = weights(model)
            engine.store.source = None
            engine.apply({})
            assert weights(model) == fresh
        engine.apply(at(1.0, patch, model))
        engine.restore()
        assert weights(model) == fresh


class Failing:
    """In the place of what reads the file whole, which fails from the moment on."""

    def __init__(self, parts: list[tuple[str, int]], moment: int, otherwise: Callable[..., None]) -> None:
        self.parts, self.moment, self.otherwise = parts, moment, otherwise

    def __get__(self, source: CheckpointSource, _: object) -> Callable[..., None]:
        def read(*args: object) -> None:
            if len(self.parts) > self.moment:
                raise FileError("it has changed")
            self.otherwise(source, *args)

        return read


def test_a_file_that_fails_though_it_looks_as_it_was(
    zoo: Zoo, patch: MakePatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum that needs the whole base is not begun; the checkpoint that is loaded then is the base."""
    model = zoo()
    engine = engine_of(model, tmp_path / "m.safetensors")
    engine.apply(at(1.0, patch, model))
    before = weights(model)

    def failing(self: CheckpointSource, path: str, out: Tensor) -> None:
        raise FileError("the drive is gone")

    with monkeypatch.context() as broken:
        broken.setattr(CheckpointSource, "read", failing)
        broken.setattr(CheckpointSource, "read_part", lambda *_: failing)
        whole = make_plan([patch("linear.weight", randn(8, 12), source="whole")])
        with pytest.raises(PatchError, match="the drive is gone"):
            engine._write("linear.weight", whole["linear.weight"], space=Workspace())
        assert weights(model) == before
        model.load_state_dict(zoo(seed=5).state_dict())
        engine.store.source = None
        assert engine.apply({}) == 0
        assert not engine.active
        assert weights(model) == weights(zoo(seed=5))


def test_a_weight_that_was_left_half_written_is_written_once_more(
    zoo: Zoo, patch: MakePatch, parts: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drive comes back: what was lost is there again."""
    model = zoo()
    base, engine = weights(model), engine_of(model, tmp_path / "m.safetensors")
    engine.apply(at(1.0, patch, model))
    reading = CheckpointSource.read_part

    def failing(self: CheckpointSource, name: str, first: int, out: Tensor) -> None:
        if first:
            raise FileError("the drive is gone")
        reading(self, name, first, out)

    with monkeypatch.context() as broken:
        broken.setattr(CheckpointSource, "read_part", failing)
        broken.setattr(CheckpointSource, "read", Failing(parts, 0, CheckpointSource.read))
        with pytest.raises(PatchError, match="load the checkpoint again"):
            engine.apply(at(0.5, patch, model))
    assert weights(model) != base
    engine.apply({})
    assert weights(model) == base
    assert not engine.active


def test_a_profiler_that_comes_in_the_middle_changes_nothing(
    zoo: Zoo, patch: MakePatch, parts: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then torch's one call for a product refuses."""
    model, reference = zoo(torch.float16), zoo(torch.float16)
    engine, plain = engine_of(model, tmp_path / "m.safetensors"), Engine(reference)
    engine.apply(at(1.0, patch, model))
    plain.apply(at(0.5, patch, reference))
    monkeypatch.setattr(compute, "add_product", lambda *_: False)
    engine.apply(at(0.5, patch, model))
    assert parts
    for path in PATHS:
        found, wanted = model.get_parameter(path), reference.get_parameter(path)
        assert torch.allclose(found, wanted, rtol=2e-3, atol=1e-6), path  # another product: the last bit


def test_a_cast_is_looked_at_in_each_dtype(tmp_path: Path) -> None:
    """A NaN has no fixed bits after a cast; where nothing is cast it has its own."""
    numbers = randn(6, 7)
    numbers[2, 3] = torch.nan
    source = source_of(checkpoint(tmp_path / "m.safetensors", {"w": numbers}))
    source.read("w", torch.empty(6, 7))
    for _ in range(2):
        with pytest.raises(FileError, match="NaN"):
            source.read("w", torch.empty(6, 7, dtype=torch.float16))


@pytest.mark.parametrize("at_once", [True, False], ids=["each at its place", "one position"])
def test_many_threads_read_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    monkeypatch.setattr(handles, "AT_ONCE", at_once and handles.AT_ONCE)
    tensors = {str(number): randn(64, 64, seed=number) for number in range(8)}
    source = source_of(checkpoint(tmp_path / "m.safetensors", tensors))
    wrong: list[str] = []

    def read(path: str) -> None:
        out = torch.empty(64, 64)
        for _ in range(200):
            source.read(path, out)
            row = torch.empty(3, 64)
            source.read_part(path, 5 * 64, row)
            if bits(out) != bits(tensors[path]) or bits(row) != bits(tensors[path][5:8]):
                wrong.append(path)

    threads = [threading.Thread(target=read, args=(path,)) for path in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("none left")], ids=lambda e: type(e).__name__)
def test_what_ends_a_reading_leaves_the_base(
    zoo: Zoo, patch: MakePatch, parts: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:  # fmt: skip
    model = zoo()
    base, engine, reading = weights(model), engine_of(model, tmp_path / "m.safetensors"), CheckpointSource.read_part
    for moment in range(12):
        engine.apply(at(1.0, patch, model))
        parts.clear()

        def failing(self: CheckpointSource, name: str, first: int, out: Tensor, moment: int = moment) -> None:
            reading(self, name, first, out)
            if len(parts) == moment + 1:
                raise error

        with monkeypatch.context() as broken:
            broken.setattr(CheckpointSource, "read_part", failing)
            with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PatchError):
                engine.apply(at(0.5, patch, model))
        assert weights(model) == base
        assert not engine.active
