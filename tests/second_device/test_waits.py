"""What a change asks of a GPU: how often it is waited for, and what it is sent, does not grow with the layers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lib_locon
from benchmarks import switch
from lib_locon.patching.half_products import _sums_in_fp32
from lib_locon.patching.memory import Pinned
from lib_locon.patching.store import Policy
from lib_locon.uploads import ALIGNED, BUFFERS, PART, Uploader
from tests.conftest import WriteAdapter
from tests.second_device.device import DEVICES, counted
from tests.second_device.ways import WAYS, keep

RANK = 4
KINDS = ("lora", "dora", "loha", "lokr")
Make = Callable[[int, str, int], lib_locon.Adapter]


def layers(number: int) -> nn.Module:
    made = {f"layer{i}": nn.Linear(64, 64) if i % 2 else nn.Conv2d(32, 32, 3) for i in range(number)}
    return nn.ModuleDict(made).half().requires_grad_(False)


@pytest.fixture(autouse=True)
def asked_before() -> None:
    """How it adds halves a device is asked once in a process."""
    for device in DEVICES:
        _sums_in_fp32(device, torch.float16)


@pytest.fixture
def adapter(write_adapter: WriteAdapter, tmp_path: Path) -> Make:
    """adapter(layers, kind, seed) -> an adapter for all of them."""

    def make(number: int, kind: str, seed: int) -> lib_locon.Adapter:
        generator = torch.Generator().manual_seed(seed)
        modules = {name: factors(kind, layer.weight, generator) for name, layer in layers(number).items()}
        return lib_locon.load(write_adapter(tmp_path / f"{kind}{seed}.safetensors", modules))

    return make


def factors(kind: str, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    (out, channels), kernel, ones = weight.shape[:2], weight.shape[2:], (1,) * (weight.ndim - 2)

    def some(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 20).half()

    if kind == "loha":
        shapes = {"w1_a": (out, RANK), "w1_b": (RANK, weight[0].numel())}
        shapes |= {"w2_a": (out, RANK), "w2_b": (RANK, weight[0].numel())}
        return {f"hada_{name}": some(*shape) for name, shape in shapes.items()}
    if kind == "lokr":
        return {"lokr_w1": some(4, 4), "lokr_w2": some(out // 4, channels // 4, *kernel)}
    found = {"lora_up.weight": some(out, RANK, *ones), "lora_down.weight": some(RANK, channels, *kernel)}
    return found | ({"dora_scale": some(out, 1, *ones) + 1} if kind == "dora" else {})


def costs(
    number: int, kind: str, way: str, adapter: Make, folder: Path, *, last: bool = False
) -> dict[str, dict[str, int]]:
    model = layers(number).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    session = lib_locon.Session(model)
    keep(session, way, folder, model.state_dict())
    model.to(DEVICES[0])
    first, second = adapter(number, kind, 1), adapter(number, kind, 2)
    sets = {"first": (first, 1.0), "strength": (first, 0.5), "another": (second, 1.0), "same": (second, 1.0)}
    sets |= {"none": (second, 0.0), "from base": (second, 1.0)}
    found = {}
    for name, (what, strength) in sets.items():
        counted()
        session.apply([lib_locon.Use(what, lib_locon.Strengths.both(strength))])
        found[name] = counted()
    counted()
    session.restore()
    found["restored"] = counted()
    return found


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_waits_for_the_gpu_as_often_for_few_layers_as_for_many(
    kind: str, way: str, last: bool, adapter: Make, tmp_path: Path
) -> None:
    few, many = (costs(number, kind, way, adapter, tmp_path, last=last) for number in (4, 20))
    waits = {name: cost.get("waits", 0) for name, cost in many.items()}
    assert waits == {name: cost.get("waits", 0) for name, cost in few.items()}
    # for what is on its way from or to RAM; for the extremes of DoRA's sums; for all proofs of the base
    assert waits["first"] == 1 + (kind == "dora") + way.startswith("checkpoint")
    assert waits["strength"] == (way != "device") + (kind == "dora")
    assert waits["restored"] == (way != "device")
    assert many["same"] == {}
    assert max(cost.get("waits for an event", 0) for cost in many.values()) == 0  # all that goes there fits


def test_a_device_that_was_never_asked_how_it_adds_is_waited_for_twice_more(adapter: Make, tmp_path: Path) -> None:
    asked = costs(4, "lora", "device", adapter, tmp_path)
    _sums_in_fp32.cache_clear()
    not_asked = costs(4, "lora", "device", adapter, tmp_path)
    assert not_asked["first"]["waits"] == asked["first"]["waits"] + 2
    assert not_asked["another"] == asked["another"]


@pytest.mark.parametrize(("kind", "kernels"), [("lora", 1), ("lokr", 5), ("loha", 9), ("dora", 14)])
def test_a_weight_asks_a_gpu_for_few_things(kind: str, kernels: int, adapter: Make, tmp_path: Path) -> None:
    """To ask for one takes the processor longer than it takes the GPU to do it."""
    found = costs(20, kind, "device", adapter, tmp_path)
    looks = 4 if kind == "dora" else 0  # at all extremes together
    assert found["strength"]["kernels"] == 20 * kernels + looks
    assert found["restored"]["kernels"] == 20


def test_the_norms_of_columns_are_asked_for_once(write_adapter: WriteAdapter, tmp_path: Path) -> None:
    kernels = []
    for rows in (100, 1000):
        model = nn.ModuleDict({"linear": nn.Linear(64, rows)}).half().requires_grad_(False).to(DEVICES[0])
        modules = {
            "linear": factors("lora", model["linear"].weight, torch.Generator()) | {"dora_scale": torch.ones(1, 64)}
        }
        session = lib_locon.Session(model)
        use = lib_locon.Use(lib_locon.load(write_adapter(tmp_path / f"{rows}.safetensors", modules)))
        counted()
        session.apply([use])
        kernels.append(counted()["kernels"])
    assert kernels[0] == kernels[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_base_that_is_kept_for_the_first_time_is_not_sent_back(way: str, adapter: Make, tmp_path: Path) -> None:
    first = costs(20, "lora", way, adapter, tmp_path)["first"]
    parts = factors("lora", layers(1)["layer0"].weight, torch.Generator()).values()
    adapters = 20 * (sum(tensor.nbytes for tensor in parts) + len(parts) * ALIGNED)
    weights = sum(layer.weight.nbytes for layer in layers(20).values())
    # to be proved, those of a file are sent once
    assert first["uploaded bytes"] <= adapters + (weights if way.startswith("checkpoint") else 0)


def test_weights_that_were_patched_on_the_cpu_are_waited_for_once(adapter: Make, tmp_path: Path) -> None:
    """Hosts that save a GPU's memory move models to it and away."""
    waits = []
    for number in (4, 20):
        model = layers(number)
        session = lib_locon.Session(model)
        session.engine.store.policy = "ram"
        found = adapter(number, "lora", 1)
        session.apply([lib_locon.Use(found)])
        model.to(DEVICES[0])
        for strength in (0.5, 0.0):
            counted()
            session.apply([lib_locon.Use(found, lib_locon.Strengths.both(strength))])
            waits.append(counted().get("waits", 0))
    assert waits == [1, 1, 1, 1]


def test_the_processor_is_at_most_a_few_buffers_ahead() -> None:
    """Else all of a model's weights would lie in pinned memory when they are read faster than a GPU takes them."""
    uploader = Uploader(DEVICES[0])
    counted()
    uploader.send([torch.full((1000,), 1.0)] * 10)
    assert "waits for an event" not in counted()
    uploader.send([torch.full((PART // 8,), 1.0)] * 20)  # half a buffer each
    assert counted()["waits for an event"] == 10 - BUFFERS + 1


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_sent_once_for_an_adapter_and_all_together(kind: str, adapter: Make, tmp_path: Path) -> None:
    found = costs(20, kind, "device", adapter, tmp_path)
    # at strength 0 its adapter is still in use
    assert {name: cost.get("uploads", 0) for name, cost in found.items()} == {
        "first": 1, "strength": 0, "another": 1, "same": 0, "none": 0, "from base": 0, "restored": 0,
    }  # fmt: skip
    sent = factors(kind, layers(2)["layer0"].weight, torch.Generator()).values()
    sent = [*sent, *factors(kind, layers(2)["layer1"].weight, torch.Generator()).values()]
    exact = 10 * sum(tensor.nbytes for tensor in sent)
    assert exact <= found["first"]["uploaded bytes"] < exact + 10 * len(sent) * ALIGNED


@pytest.mark.parametrize("side", [False, True])
def test_nothing_of_an_adapter_stays_on_a_gpu_when_it_is_gone(side: bool, adapter: Make) -> None:
    model = layers(20).to(DEVICES[0])
    session = lib_locon.Session(model, side_path=side)
    session.engine.store.policy = "ram"
    first, second = adapter(20, "lora", 1), adapter(20, "lora", 2)
    x = torch.rand(2, 64, device=DEVICES[0]).half()
    before = torch.ops.second_device.taken_bytes(), torch.ops.second_device.pinned_bytes()
    taken = []
    for what in (first, second, first):
        for step in range(3):
            session.apply([lib_locon.Use(what, lib_locon.Strengths.both(1 + step / 10))])
            for number in range(1, 20, 2):
                model[f"layer{number}"](x)
            taken.append(torch.ops.second_device.taken_bytes())
    assert len(set(taken)) == 1
    assert taken[0] > before[0]
    session.restore()
    assert (torch.ops.second_device.taken_bytes(), torch.ops.second_device.pinned_bytes()) == before


def test_beside_the_layers_it_is_waited_for_once(adapter: Make) -> None:
    model = layers(20).to(DEVICES[0])
    session = lib_locon.Session(model, side_path=True)
    x, found = torch.rand(2, 64, device=DEVICES[0]).half(), adapter(20, "lora", 1)
    costs = []
    for strength in (1.0, 0.5):
        counted()
        session.apply([lib_locon.Use(found, lib_locon.Strengths.both(strength))])
        for _ in range(2):
            for number in range(1, 20, 2):
                model[f"layer{number}"](x)
        costs.append(counted())
    assert [(cost.get("waits", 0), cost.get("uploads", 0)) for cost in costs] == [(1, 1), (0, 0)]


def test_what_is_sent_arrives_however_large_it_is() -> None:
    sizes = [(3, 5), (0, 7), (PART // 2 + 1,), (2, PART), (64,), (PART // 4 - 1,), (7, 1, 3)]
    dtypes = [torch.float16, torch.float32, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    there = [torch.randint(0, 255, size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    there.append(torch.rand(40, 30).t())  # its numbers in another order
    for _ in range(2):
        sent = Uploader(DEVICES[1]).send(there)
        assert all(tensor.device == DEVICES[1] and tensor.is_contiguous() for tensor in sent)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(sent, there, strict=True))
        assert [(one.dtype, one.shape) for one in sent] == [(other.dtype, other.shape) for other in there]


def test_sending_takes_a_few_buffers_of_pinned_memory() -> None:
    before = torch.ops.second_device.pinned_bytes()
    uploader = Uploader(DEVICES[0])
    sent = uploader.send([torch.full((PART,), number) for number in range(10)])
    assert torch.ops.second_device.pinned_bytes() - before <= BUFFERS * PART
    assert [int(tensor[-1]) for tensor in sent] == list(range(10))


def test_pinned_copies_take_hardly_more_than_their_weights() -> None:
    before = torch.ops.second_device.pinned_bytes()
    pinned = Pinned()
    shapes = [(320, 320, 3, 3), (1280, 640, 3, 3), (1280, 1280), (320,), (1280, 768)] * 12
    copies = [lend(pinned, shape) for shape in shapes]
    exact = sum(copy.nbytes for copy in copies)
    taken = torch.ops.second_device.pinned_bytes() - before
    assert exact <= taken < 1.1 * exact
    assert pinned.nbytes == taken
    for number, copy in enumerate(copies):
        copy.fill_(number)
    assert all(bool((copy == number).all()) for number, copy in enumerate(copies))
    del copies, copy
    assert pinned.nbytes == taken  # a GPU may be reading it
    pinned.settle()
    assert pinned.nbytes == torch.ops.second_device.pinned_bytes() - before == 0


def test_pinned_memory_does_not_grow_while_some_of_it_is_held() -> None:
    """One adapter is always on, others come and go."""
    rng, pinned = random.Random(0), Pinned()
    shapes = [(320, 320), (640, 320), (320,), (1280, 640)]
    kept = [lend(pinned, shape).fill_(7) for shape in shapes]
    most = 0
    for _ in range(200):
        some = [lend(pinned, shape).fill_(3) for shape in shapes * 4 if rng.random() < 0.5]
        if rng.random() < 0.2:
            kept[rng.randrange(4)] = lend(pinned, shapes[rng.randrange(4)]).fill_(7)
        assert all(bool((copy == 7).all()) for copy in kept)
        assert all(bool((copy == 3).all()) for copy in some)
        del some
        pinned.settle()
        most = max(most, pinned.nbytes)
    assert most <= 24 << 20


def lend(pinned: Pinned, shape: tuple[int, ...]) -> Tensor:
    strides = torch.empty(shape, device="meta").stride()
    found = pinned.take(shape, strides, torch.float16)
    assert found is not None
    return found


@pytest.mark.parametrize("policy", ["ram", "device", "checkpoint"])
def test_the_benchmark_runs_on_a_gpu(policy: Policy) -> None:
    """And is right there: it looks at the weights itself. Its seconds are this device's, which are nobody's."""
    rows = ["locon-r8", "strength", "remove", "same"]
    found = switch.measure("tiny", ["fp16"], rows, 1, "other", policy, "cuda")
    assert found["device"] == "second device"
    assert "second device" in switch.table(found)
    assert [row["name"] for row in found["rows"]] == rows
    taken = {row["name"]: row["gpu_mib"] for row in found["rows"]}
    assert taken["same"] == 0
    assert taken["locon-r8"] > taken["remove"] >= 0
