"""A checkpoint file of which nothing but the time has changed while an adapter is in, as backups and syncs leave it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from lib_locon.errors import PatchError
from lib_locon.files.pristine import CheckpointSource
from lib_locon.files.reader import SafetensorsFile
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import Plan, make_plan
from lib_locon.patching.store import BaseStore
from tests.test_faults_low_rank import PATHS, product_plan
from tests.test_store import HOLDS, HOUR, checkpoint, source_of, ways, weights

if TYPE_CHECKING:
    from tests.conftest import MakePatch, Zoo


class Bench:
    """A model, its engine and its file. `plans` are of products (read by rows) and of others (read whole)."""

    def __init__(self, model: nn.Module, path: Path, stored: torch.dtype, hold: bool, patch: MakePatch) -> None:
        self.model, self.path = model, path
        checkpoint(path, {name: tensor.to(stored) for name, tensor in model.state_dict().items()})
        self.engine = Engine(model)
        self.engine.store = BaseStore("auto", source_of(path, hold=hold))
        self.base = weights(model)
        generator = torch.Generator().manual_seed(0)
        whole = (
            patch(name, torch.randn(weight.shape, generator=generator), source="whole")
            for name, weight in model.named_parameters()
        )
        self.plans: tuple[Plan, ...] = (product_plan(patch, model, PATHS, 1), make_plan(whole))

    def touch(self, hours: float = 1.0) -> None:
        """The file's time, so long before it was."""
        then = self.path.stat().st_mtime_ns - int(hours * HOUR)
        os.utime(self.path, ns=(then, then))

    def write(self, content: bytes) -> None:
        """In place, so long ago that it could be believed."""
        with self.path.open("r+b") as file:
            file.write(content)
        self.touch()


@pytest.fixture(params=[(torch.float32, torch.float16), (torch.float16, torch.float16)], ids=["cast", "as it is"])
def bench(request: pytest.FixtureRequest, zoo: Zoo, patch: MakePatch, tmp_path: Path) -> Callable[..., Bench]:
    def make(*, hold: bool = True) -> Bench:
        dtype, stored = request.param
        return Bench(zoo(dtype), tmp_path / "model.safetensors", stored, hold, patch)

    return make


@HOLDS
@pytest.mark.parametrize("which", [0, 1], ids=["by rows", "whole"])
def test_its_bases_are_there(bench: Callable[..., Bench], hold: bool, which: int) -> None:
    it = bench(hold=hold)
    for then in ({}, it.plans[which], it.plans[1 - which]):
        it.engine.apply(it.plans[which])
        held = weights(it.model)
        it.touch()
        it.engine.apply(then)
        if then is it.plans[which]:
            assert weights(it.model) == held
        it.touch()
        it.engine.restore()
        assert weights(it.model) == it.base
        assert not it.engine.active
    assert ways(it.engine.store) == {}


def test_with_nothing_in_the_model_weights_are_read_from_it_again(bench: Callable[..., Bench]) -> None:
    it = bench()
    it.touch()
    it.engine.apply(it.plans[0])
    assert ways(it.engine.store) == {"checkpoint": len(it.plans[0])}


def test_written_lately_it_is_not_believed_yet(bench: Callable[..., Bench]) -> None:
    it = bench()
    it.engine.apply(it.plans[0])
    held = weights(it.model)
    it.path.touch()
    with pytest.raises(PatchError, match="load the checkpoint again"):
        it.engine.apply({})
    assert weights(it.model) == held
    it.touch(0.1)
    it.engine.apply({})
    assert weights(it.model) == it.base


def one_number(it: Bench) -> None:
    """Of the last weight that an adapter has changed, by the least that there is."""
    content, entry = bytearray(it.path.read_bytes()), SafetensorsFile(it.path).entries[list(it.plans[0])[-1]]
    content[entry.start] ^= 1
    it.write(bytes(content))


def all_numbers(it: Bench) -> None:
    content = it.path.read_bytes()
    start = SafetensorsFile(it.path).data_start
    it.write(content[:start] + bytes(byte ^ 1 for byte in content[start:]))


def longer(it: Bench) -> None:
    it.write(it.path.read_bytes() + b"\0")


@HOLDS
@pytest.mark.parametrize("change", [one_number, all_numbers, longer])
def test_with_other_bytes_it_is_believed_for_no_weight(
    bench: Callable[..., Bench], hold: bool, change: Callable[[Bench], None]
) -> None:
    it = bench(hold=hold)
    it.engine.apply(it.plans[0])
    held, content = weights(it.model), it.path.read_bytes()
    change(it)
    for attempt in (lambda: it.engine.apply({}), it.engine.restore, lambda: it.engine.apply(it.plans[1])):
        with pytest.raises(PatchError, match="load the checkpoint again"):
            attempt()
        now = weights(it.model)
        assert {name: now[name] for name in it.plans[0]} == {name: held[name] for name in it.plans[0]}
    os.truncate(it.path, len(content))
    it.write(content)
    it.engine.restore()
    assert weights(it.model) == it.base


def test_a_weight_that_was_left_half_written_tells_nothing(bench: Callable[..., Bench]) -> None:
    it = bench()
    it.engine.apply(it.plans[0])
    path = next(iter(it.plans[0]))
    it.engine._held[path] = it.engine._held[path]._replace(patches=None)
    it.touch()
    with pytest.raises(PatchError, match="load the checkpoint again"):
        it.engine.restore()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError], ids=lambda error: error.__name__)
def test_an_end_in_the_middle_of_the_comparison_believes_nothing(
    bench: Callable[..., Bench], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench()
    it.engine.apply(it.plans[0])
    held = weights(it.model)
    one_number(it)
    read, calls = CheckpointSource.read, [0]

    def failing(self: CheckpointSource, path: str, out: Tensor) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise error
        read(self, path, out)

    with monkeypatch.context() as broken:
        broken.setattr(CheckpointSource, "read", failing)
        with pytest.raises((error, PatchError)):
            it.engine.apply({})
    assert calls[0] >= 2
    for attempt in (lambda: it.engine.apply({}), it.engine.restore):
        with pytest.raises(PatchError, match="load the checkpoint again"):
            attempt()
    assert weights(it.model) == held


def test_what_somebody_wrote_into_a_weight_stays(bench: Callable[..., Bench]) -> None:
    it = bench()
    it.engine.apply(it.plans[0])
    theirs: dict[str, Any] = {name: torch.ones_like(weight) for name, weight in it.model.state_dict().items()}
    it.model.load_state_dict(theirs)
    it.touch()
    it.engine.apply({})
    assert all(torch.equal(weight, theirs[name]) for name, weight in it.model.state_dict().items())
    assert not it.engine.active
