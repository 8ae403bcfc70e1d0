"""Sets of adapters never mix: with threads, after failures, and when somebody else moves the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lib_locon
from lib_locon import Session, Strengths, Use
from lib_locon.families.build import Hints, build_layers
from lib_locon.patching.engine import Engine
from lib_locon.patching.sidepath import SidePath
from lib_locon.session import Use as SessionUse
from tests.conftest import WriteAdapter, Zoo

MODULES = {"linear": (8, 12), "conv2d": (8, 4, 3, 3)}
ELSEWHERE = torch.device("meta")  # stands for any device but the CPU


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def adapter(write_adapter: WriteAdapter, tmp_path: Path) -> Callable[[str], lib_locon.Adapter]:
    """adapter(name): a LoRA on a linear layer and a convolution, another one for another name."""

    def make(name: str) -> lib_locon.Adapter:
        seed = sum(map(ord, name))
        factors = {
            module: {
                "lora_up.weight": rand(shape[0], 2, *(1 for _ in shape[2:]), seed=seed),
                "lora_down.weight": rand(2, *shape[1:], seed=seed),
            }
            for module, shape in MODULES.items()
        }
        return lib_locon.load(write_adapter(tmp_path / f"{name}.safetensors", factors))

    return make


def weights(model: nn.Module) -> dict[str, bytes]:
    return {
        name: weight.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, weight in model.named_parameters()
    }


def test_a_second_set_waits_until_the_first_is_whole(
    zoo: Zoo, adapter: Callable[[str], lib_locon.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, one, two = zoo(), Use(adapter("one")), Use(adapter("two"))
    session = Session(model)
    session.apply([two])
    wanted = weights(model)
    session.apply([])
    between, go_on = threading.Event(), threading.Event()
    apply = Engine.apply

    def slow(engine: Engine, plan: object, *more: object) -> int:
        if threading.current_thread().name == "first":
            between.set()
            go_on.wait(10)
        return apply(engine, plan, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "apply", slow)
    first = threading.Thread(target=lambda: session.apply([one]), name="first")
    second = threading.Thread(target=lambda: Session(model).apply([two]))  # another session, the same model
    first.start()
    assert between.wait(10)
    second.start()
    second.join(0.3)
    assert second.is_alive(), "the second set did not wait"
    go_on.set()
    first.join(10)
    second.join(10)
    assert weights(model) == wanted
    assert session.apply([two]).written == 0
    assert session.apply([one]).written > 0


def test_what_happened_behind_the_sessions_back_is_noticed(
    zoo: Zoo, adapter: Callable[[str], lib_locon.Adapter]
) -> None:
    model, use = zoo(), Use(adapter("one"))
    session = Session(model)
    session.apply([use])
    patched = weights(model)
    for meddle in (session.engine.restore, lambda: session.engine.apply({})):
        meddle()
        assert session.apply([use]).written == 2
        assert weights(model) == patched


def test_an_error_in_the_report_leaves_the_base(
    zoo: Zoo, adapter: Callable[[str], lib_locon.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo()
    base, session = weights(model), Session(model)

    def broken(*_: object) -> None:
        raise RuntimeError("no words")

    with monkeypatch.context() as spoilt, pytest.raises(RuntimeError, match="no words"):
        spoilt.setattr(SessionUse, "report", broken)
        session.apply([Use(adapter("one"))])
    assert weights(model) == base
    assert not session.active


def test_a_fault_while_hooks_come_off_still_gives_the_base_back(
    zoo: Zoo, adapter: Callable[[str], lib_locon.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo()
    base, session = weights(model), Session(model)
    session.apply([Use(adapter("one"))])

    def interrupted(_: SidePath) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as spoilt, pytest.raises(KeyboardInterrupt):
        spoilt.setattr(SidePath, "clear", interrupted)
        session.restore()
    assert weights(model) == base


def test_a_set_that_failed_leaves_no_factors_on_a_device(
    zoo: Zoo, adapter: Callable[[str], lib_locon.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, use = zoo(), Use(adapter("one"))
    session = Session(model)
    layers = [item.layer for item in session.match(use.adapter).matched]
    apply = Engine.apply

    def no_room(engine: Engine, plan: object, *_: object) -> int:
        for layer in layers:
            layer.low_rank(ELSEWHERE)
        if plan:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return apply(engine, {})

    with monkeypatch.context() as spoilt, pytest.raises(torch.cuda.OutOfMemoryError):
        spoilt.setattr(Engine, "apply", no_room)
        session.apply([use])
    assert [dict(layer._moved) for layer in layers] == [{}, {}]


def test_a_model_that_goes_takes_its_factors_with_it(zoo: Zoo, adapter: Callable[[str], lib_locon.Adapter]) -> None:
    model, use = zoo(), Use(adapter("one"))
    session = Session(model)
    session.apply([use])
    layers = [item.layer for item in session.match(use.adapter).matched]
    for layer in layers:
        layer.low_rank(ELSEWHERE)
    assert all(layer._moved for layer in layers)
    del model
    assert not any(layer._moved for layer in layers)


def test_a_shortened_adapter_is_made_once(zoo: Zoo, adapter: Callable[[str], lib_locon.Adapter]) -> None:
    model, use = zoo(), Use(adapter("one"), dyn=1)
    session = Session(model)
    found = session.match(use.adapter)
    first = [patch.delta for patch in use.patches(found)]
    other = Use(use.adapter, Strengths.both(0.3), dyn=1)
    assert all(patch.delta is delta for patch, delta in zip(other.patches(found), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_last_changes_no_bit(
    zoo: Zoo, adapter: Callable[[str], lib_locon.Adapter], dtype: torch.dtype
) -> None:
    plain, last = zoo(dtype), zoo(dtype)
    last.conv2d.to(memory_format=torch.channels_last)
    assert not last.conv2d.weight.is_contiguous()
    for model in (plain, last):
        Session(model).apply([Use(adapter("one"), Strengths.both(0.7))])
    assert weights(plain) == weights(last)


@pytest.mark.parametrize("family", ["loha", "dora"])
def test_a_change_can_be_trained(family: str) -> None:
    shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 12), "hada_w2_a": (8, 2), "hada_w2_b": (2, 12)}
    if family == "dora":
        shapes = {"lora_up.weight": (8, 2), "lora_down.weight": (2, 12), "dora_scale": (8, 1)}
    tensors = {suffix: rand(*shape, seed=3).requires_grad_() for suffix, shape in shapes.items()}
    (layer,), unread = build_layers(tensors, Hints())
    assert not unread
    layer.delta(rand(8, 12)).square().sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.abs().sum() > 0) for tensor in tensors.values())
