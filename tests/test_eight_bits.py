"""Weights of 8 bits through a session: from which base each way starts, and that the stored bytes come back.

What runs beside a layer is added to what its stored numbers give. DoRA needs the weight itself: it starts from the one
that the host has kept in fp16, where there is one, else from what the numbers and their scale stand for; and is rounded
to 8 bits once. The truth is `tests.oracles.naive` in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lib_locon
from tests.oracles import naive
from tests.test_faults import weights
from tests.test_side_path import FP8, CastingConv2d, CastingLinear, error, hooked, numbers, output, tensors_of

if TYPE_CHECKING:
    from tests.conftest import WriteAdapter

Group = dict[str, Tensor]


def fp8(layer: nn.Module) -> nn.Module:
    """As the webui's option with its cache makes it: weight and bias in fp8, and both beside them in fp16."""
    for name, value in list(layer.named_parameters()):
        setattr(layer, f"fp16_{name}", value.detach().half())
        setattr(layer, name, nn.Parameter(value.detach().to(FP8), requires_grad=False))
    return layer


class Int8Linear(nn.Linear):
    """Whole numbers, with a scale for each output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight_scale = self.weight.detach().abs().amax(1) / 100
        whole = (self.weight.detach() / self.weight_scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.value().to(x.dtype), self.bias)

    def value(self) -> Tensor:
        return self.weight.float() * self.weight_scale[:, None]


@pytest.fixture
def use(write_adapter: WriteAdapter, tmp_path: Path) -> Callable[..., lib_locon.Use]:
    """use(name, {module: tensors}, strength)"""

    def make(name: str, groups: dict[str, Group], strength: float) -> lib_locon.Use:
        adapter = lib_locon.load(write_adapter(tmp_path / f"{name}.safetensors", groups))
        return lib_locon.Use(adapter, lib_locon.Strengths.both(strength))

    return make


def around(tensors: Group, base: Tensor, factor: float = 1.4) -> Group:
    """A DoRA whose outputs are to be so much larger than those of `base`."""
    norms = base.float().flatten(1).norm(dim=1)
    return {**tensors, "dora_scale": factor * norms.reshape(-1, *(1 for _ in base.shape[1:]))}


def change(tensors: Group, base: Tensor) -> Tensor:
    return naive.delta(naive.family_of(tensors), tensors, base.double())


def rounded_once(stored: Tensor, value: Tensor) -> bool:
    """Whether `stored`, fp8, is the nearest there is to `value`, but for the noise of an fp32 sum."""
    info = torch.finfo(stored.dtype)
    half = torch.maximum(info.eps / 2 * value.abs(), torch.tensor(info.smallest_normal * info.eps / 2))
    return bool(((stored.double() - value).abs() <= half + 1e-5 * value.abs().max()).all())


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: CastingLinear(8, 12), (5, 8)),
    "conv2d": (lambda: CastingConv2d(8, 12, 3), (2, 8, 5, 5)),
}


@pytest.mark.parametrize("cached", [True, False], ids=["with the fp16 weight", "without"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_dora_on_fp8_starts_from_the_best_base_and_lora_runs_beside(
    name: str, cached: bool, use: Callable[..., lib_locon.Use]
) -> None:
    torch.manual_seed(3)
    make, shape = LAYERS[name]
    model, x = nn.ModuleDict({name: fp8(make())}), numbers(*shape)
    layer = model[name]
    stored, kept = layer.weight.detach().clone(), layer.fp16_weight.clone()
    if not cached:
        del layer.fp16_weight, layer.fp16_bias
    best, other = (kept, stored) if cached else (stored, kept)
    plain, dora = tensors_of("lora", tuple(stored.shape)), around(tensors_of("lora", tuple(stored.shape), seed=9), kept)
    beside, inside = use("plain", {name: plain}, 0.3), use("dora", {name: dora}, 0.7)
    pristine, session = weights(model), lib_locon.Session(model)
    bias = layer.bias

    session.apply([beside])
    assert weights(model) == pristine
    assert hooked(model) == [name]
    assert error(layer(x), output(layer, x, stored.double() + 0.3 * change(plain, stored), bias)) < 1e-5

    session.apply([inside])
    assert hooked(model) == []
    assert rounded_once(layer.weight, best.double() + 0.7 * change(dora, best))
    assert not rounded_once(layer.weight, other.double() + 0.7 * change(dora, other)), "the two bases differ too little"
    assert error(layer(x), output(layer, x, best.double() + 0.7 * change(dora, best), bias)) < 0.06

    rounded = layer.weight.detach().clone()
    session.apply([beside, inside])
    assert torch.equal(layer.weight.view(torch.uint8), rounded.view(torch.uint8))
    assert error(layer(x), output(layer, x, rounded.double() + 0.3 * change(plain, stored), bias)) < 1e-5

    session.apply([])
    assert (weights(model), hooked(model), session.active) == (pristine, [], False)
    if cached:
        assert torch.equal(layer.fp16_weight, kept), "the host's"


@torch.no_grad()
def test_dora_on_int8_with_a_scale_for_each_output(use: Callable[..., lib_locon.Use]) -> None:
    torch.manual_seed(3)
    model, x = nn.ModuleDict({"linear": Int8Linear(8, 12)}), numbers(5, 8)
    layer = model["linear"]
    base, plain = layer.value().clone(), tensors_of("lora", (12, 8))
    dora = around({key: 0.1 * value for key, value in tensors_of("lora", (12, 8), seed=9).items()}, base, 1.2)
    beside, inside = use("plain", {"linear": plain}, -0.4), use("dora", {"linear": dora}, 0.7)
    pristine, session = weights(model), lib_locon.Session(model)
    expected = base.double() + 0.7 * change(dora, base)

    session.apply([inside])
    steps = (layer.value().double() - expected).abs() / layer.weight_scale[:, None]
    inside_range = (expected.abs() / layer.weight_scale[:, None]) <= 127
    assert float(steps[inside_range].max()) <= 0.5 + 1e-3
    assert bool((layer.weight.abs()[~inside_range] == 127).all())
    assert weights(model) != pristine

    session.apply([beside])
    assert weights(model) == pristine
    assert hooked(model) == ["linear"]
    wanted = functional.linear(x.double(), base.double() - 0.4 * change(plain, base), layer.bias.double())
    assert error(layer(x), wanted) < 1e-5

    session.apply([inside, beside])
    session.restore()
    assert (weights(model), hooked(model)) == (pristine, [])
    assert torch.equal(layer.value(), base)


def test_what_is_said_of_an_adapter_is_true_after_the_host_changed_the_dtype(use: Callable[..., lib_locon.Use]) -> None:
    """The webui's option for fp8 turns the weights of the model that is loaded."""
    model = nn.ModuleDict({"linear": nn.Linear(8, 6)}).half().requires_grad_(False)
    layer = model["linear"]
    plain = layer.weight.detach().clone()
    session = lib_locon.Session(model)
    dora = use("dora", {"linear": around(tensors_of("lora", (6, 8)), plain)}, 1.0)

    def said() -> tuple[int, bool]:
        (adapter,) = session.apply([dora]).adapters
        session.apply([])
        return adapter.used, any("rounded to 8 bits" in note for note in adapter.notes)

    assert said() == (1, False)
    layer.weight = nn.Parameter(plain.to(FP8), requires_grad=False)
    assert said() == (1, True)
    layer.weight = nn.Parameter(plain.float().mul(100).to(torch.int8), requires_grad=False)  # and no scale
    assert said() == (0, False)
    layer.weight = nn.Parameter(plain, requires_grad=False)
    assert said() == (1, False)
