"""The laws of `tests/test_stacks.py` where the weights are on GPUs, on several, and moved between two sets."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lib_locon
from lib_locon.errors import PatchError
from lib_locon.patching.bits import same_bits
from tests.oracles.lycoris_oracle import inputs
from tests.second_device.device import DEVICES
from tests.second_device.ways import WAYS, keep
from tests.test_side_path import NOISE, error, hooked, output
from tests.test_stacks import ADDITIVE, Stack, rounded, slots, stacks, sums, uses_of, wrong

CPU = torch.device("cpu")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """As they are now, on the processor."""
    return {name: parameter.detach().to(CPU, copy=True) for name, parameter in model.named_parameters()}


def same(model: nn.Module, numbers: dict[str, Tensor]) -> bool:
    now = parameters(model)
    return now.keys() == numbers.keys() and all(same_bits(now[name], numbers[name]) for name in now)


def session_of(model: nn.Module, way: str, folder: str) -> lib_locon.Session:
    """With a file of the model for the first half of its weights."""
    session, state = lib_locon.Session(model), model.state_dict()
    keep(session, way, Path(folder), {name: state[name] for name in sorted(state)[: len(state) // 2 + 1]})
    return session


def channels_last(model: nn.Module) -> None:
    for layer in model.children():
        order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(layer.weight.ndim)
        if order is not None:
            layer.to(memory_format=order)


def spread(model: nn.Module, rng: random.Random, among: list[torch.device]) -> None:
    for layer in model.children():
        layer.to(rng.choice(among))


@settings(max_examples=200)
@given(
    stack=stacks(list(slots())),
    rng=st.randoms(use_true_random=False),
    policy=st.sampled_from(WAYS),
    among=st.sampled_from([[DEVICES[0]], [*DEVICES, CPU]]),
    last=st.booleans(),
    pins=st.booleans(),
)
def test_after_every_set_the_model_holds_its_sum_wherever_its_weights_are(
    stack: Stack, rng: random.Random, policy: str, among: list[torch.device], last: bool, pins: bool
) -> None:
    model = stack.model()
    base = parameters(model)
    if last:
        channels_last(model)
    torch.ops.second_device.pin(pins)
    with tempfile.TemporaryDirectory() as folder:
        adapters = stack.load(Path(folder))
        session = session_of(model, policy, folder)
        spread(model, rng, among)
        for chosen, expected in zip(stack.sets, sums(stack, base), strict=True):
            places = {name: parameter.device for name, parameter in model.named_parameters()}
            with torch.inference_mode(rng.random() < 0.3):
                session.apply(uses_of(adapters, chosen))
            assert places == {name: parameter.device for name, parameter in model.named_parameters()}
            assert wrong(copy.deepcopy(model).to(CPU), expected, base) == []
            assert session.apply(uses_of(adapters, chosen)).written == 0
            if rng.random() < 0.5:
                spread(model, rng, among)
                assert session.apply(uses_of(adapters, chosen)).written == 0
        if rng.random() < 0.5:
            session.apply([])
        else:
            session.restore()
        assert same(model, base)
        assert not session.active


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.ops.second_device.pin(True)
    torch.ops.second_device.fail_after(-1)


@settings(max_examples=100)
@given(stack=stacks([slot for slot in slots() if slot.startswith(("linear", "conv"))]))
def test_beside_its_layers_a_set_gives_the_output_of_its_sum(stack: Stack) -> None:
    model = stack.model()
    base, plain = parameters(model), copy.deepcopy(model)
    session = lib_locon.Session(model.to(DEVICES[0]), side_path=True)
    with tempfile.TemporaryDirectory() as folder:
        adapters = stack.load(Path(folder))
    for chosen, expected in zip(stack.sets, sums(stack, base), strict=True):
        session.apply(uses_of(adapters, chosen))
        for slot in stack.slots:
            layer, case = model[slot], rounded(slots()[slot][0], torch.float32)
            x = inputs(case.kind, case.base.shape[1], torch.Generator().manual_seed(0)).to(stack.dtype)
            weight, bias = (expected.get(f"{slot}.{name}", (base[f"{slot}.{name}"],))[0] for name in ("weight", "bias"))
            found = layer(x.to(DEVICES[0]))
            assert found.device == DEVICES[0]
            assert error(found.to(CPU), output(plain[slot], x, weight, bias)) < NOISE.get(stack.dtype, 1e-5), slot
            families = {file.cases[slot].family for file in stack.files if slot in file.names}
            if families <= ADDITIVE:
                assert (slot in hooked(model)) == (f"{slot}.weight" in expected)
    session.apply([])
    assert hooked(model) == []
    assert same(model, base)


@settings(max_examples=40)
@given(stack=stacks(list(slots())), policy=st.sampled_from(WAYS), data=st.data())
def test_wherever_its_memory_runs_out_the_base_is_there(stack: Stack, policy: str, data: st.DataObject) -> None:
    model = stack.model()
    channels_last(model)
    base = parameters(model)
    with tempfile.TemporaryDirectory() as folder:
        adapters = stack.load(Path(folder))
        session = session_of(model, policy, folder)
        model.to(DEVICES[0])
        for chosen in stack.sets:
            torch.ops.second_device.fail_after(data.draw(st.integers(0, 40)))
            try:
                session.apply(uses_of(adapters, chosen))
            except PatchError as failure:
                assert "out of memory" in str(failure)
                assert same(model, base)  # to give it back takes no memory there
                assert not session.active
            finally:
                torch.ops.second_device.fail_after(-1)
        session.apply([])
        assert same(model, base)
