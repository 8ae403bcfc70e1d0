"""The side path: the same output as the merged weight's, on weights that cannot hold the sum; and nothing stays behind.

The truth is torch's own operation with base + ΔW in fp64, ΔW by the scalar formulas of `tests.oracles.naive`.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import mmap
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import lib_locon
from extensions_builtin_shim.tiny_sd import TinySD, sample
from lib_locon.errors import PatchError
from lib_locon.families import branches, combine
from lib_locon.families.build import Hints, build_layers
from lib_locon.families.layer import Layer
from lib_locon.families.rows import RowsLayer
from lib_locon.models.targets import View
from lib_locon.patching import storage
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import Patch, Plan, make_plan
from lib_locon.patching.sidepath import Judge, SidePath
from lib_locon.patching.storage import decode, encode, logical_shapes, which_path
from tests import random_adapters
from tests.oracles import naive

if TYPE_CHECKING:
    from tests.conftest import WriteAdapter

FP8 = torch.float8_e4m3fn
NOISE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 12), (5, 8)),
    "linear, more axes": (lambda: nn.Linear(8, 12, bias=False), (2, 3, 4, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1), (2, 8, 9)),
    "conv2d 1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 4)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=(2, 1), padding=1), (2, 8, 7, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(8, 12, (3, 2), padding="same", dilation=2), (2, 8, 7, 6)),
    "conv2d circular": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 7, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="reflect", stride=2), (2, 8, 7, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(16, 12, 3, padding=1, groups=2), (2, 16, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12), (2, 12, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(8, 12, (3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1)), (2, 8, 4, 3, 3)),
    "conv2d, no batch": (lambda: nn.Conv2d(8, 12, 3, padding=1), (8, 5, 5)),
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors_of(family: str, shape: tuple[int, ...], rank: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """As a trainer writes them, for a weight of this shape (out, in, *k)."""
    out, channels, *k = shape
    n = channels * int(torch.tensor([1, *k]).prod())
    split = 2 if channels % 2 == 0 else 1
    shapes: dict[str, tuple[int, ...]] = {
        "lora": {"lora_up.weight": (out, rank), "lora_down.weight": (rank, channels, *k)},
        "tucker": {
            "lora_up.weight": (out, rank), "lora_down.weight": (rank, channels), "lora_mid.weight": (rank, rank, *k)
        },
        "loha": {
            "hada_w1_a": (out, rank), "hada_w1_b": (rank, n), "hada_w2_a": (out, rank), "hada_w2_b": (rank, n)
        },
        "loha_tucker": {
            **{f"hada_t{i}": (rank, rank, *k) for i in (1, 2)},
            **{f"hada_w{i}_a": (rank, out) for i in (1, 2)},
            **{f"hada_w{i}_b": (rank, channels) for i in (1, 2)},
        },
        "lokr": {"lokr_w1": (3, split), "lokr_w2": (out // 3, channels // split, *k)},
        "lokr wide": {"lokr_w1": (1, split), "lokr_w2": (out, channels // split, *k)},
        "lokr split": {
            "lokr_w1_a": (4, 2), "lokr_w1_b": (2, split),
            "lokr_w2_a": (out // 4, rank), "lokr_w2_b": (rank, n // split),
        },
        "lokr_tucker": {
            "lokr_w1": (4, split), "lokr_t2": (rank, rank, *k),
            "lokr_w2_a": (rank, out // 4), "lokr_w2_b": (rank, channels // split),
        },
        "full": {"diff": shape},
    }[family]  # type: ignore[assignment]  # fmt: skip
    return {suffix: numbers(*size, seed=seed + i) * 0.6 for i, (suffix, size) in enumerate(shapes.items())}


FAMILIES = ("lora", "tucker", "loha", "loha_tucker", "lokr", "lokr wide", "lokr split", "lokr_tucker", "full")


def layer_of(tensors: Mapping[str, Tensor], alpha: float | None = 2.0) -> Layer:
    layers, unread = build_layers(tensors, Hints(alpha=alpha))
    assert not unread and len(layers) == 1
    return layers[0]


def truth(family: str, tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """ΔW in fp64, alpha 2 included."""
    name = family.split()[0].replace("lokr_tucker", "lokr")
    return naive.FAMILIES[name]({**tensors, "alpha": torch.tensor(2.0)}, base.detach().double(), naive.NOTHING)


def patch(path: str, delta: object, strength: float = 0.7, source: str = "a", **view: Any) -> Patch:
    return Patch(source, View(path, **view), strength, delta)  # type: ignore[arg-type]


def output(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer in fp64 with another weight (and bias)."""
    wide = copy.deepcopy(layer).double()
    wide._forward_hooks.clear()
    with torch.no_grad():
        wide.weight = nn.Parameter(weight.double())
        if bias is not None:
            wide.bias = nn.Parameter(bias.double())
        return wide(x.double())


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def hooked(model: nn.Module) -> list[str]:
    return [
        name for name, module in model.named_modules() if module._forward_hooks or module._forward_hooks_with_kwargs
    ]


@pytest.mark.parametrize("dtype", NOISE, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_output_is_that_of_the_merged_weight(family: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make()).to(dtype)
    layer, x = model[0], numbers(*shape, seed=5).to(dtype)
    tensors = tensors_of(family, tuple(layer.weight.shape))
    expected = output(layer, x, layer.weight.double() + 0.7 * truth(family, tensors, layer.weight))
    side = SidePath(model, combine)
    assert side.set(make_plan([patch("0.weight", layer_of(tensors))])) == 1
    changed = model(x)
    assert changed.dtype == dtype
    assert error(changed, expected) < NOISE[dtype]
    assert error(output(layer, x, layer.weight), expected) > 0.05, "the adapter would not show"
    side.clear()


def resized(family: str, weight: Tensor, sizes: Sequence[float]) -> dict[str, Tensor]:
    """Its factors, each times one of `sizes`, the last one for all that are left."""
    factors = tensors_of(family, tuple(weight.shape))
    return {key: value * sizes[min(i, len(sizes) - 1)] for i, (key, value) in enumerate(factors.items())}


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d grouped"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(1e-4, 3e3), (3e3, 1e-4), (1e5, 1e-5), (1e-7, 1e6), (3e4, 1, 3e-5)], ids=str)
@torch.no_grad()
def test_factors_of_unlike_size_run_where_their_product_is_ordinary(
    sizes: Sequence[float], family: str, kind: str
) -> None:
    """In fp16, where 65504 is the end, also on the way from one factor to the next."""
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make()).half()
    layer, x = model[0], numbers(*shape, seed=5).half() * 10
    tensors = resized(family, layer.weight, sizes)
    whole = truth(family, tensors, layer.weight)
    strength = 0.7 / float(whole.abs().max())  # whatever the product is, the change is one of about 1
    for several in (False, True):
        plan = [patch("0.weight", layer_of(tensors), strength)]
        other = tensors_of("lora", tuple(layer.weight.shape), seed=9)
        weight = layer.weight.double() + strength * whole
        if several:
            plan.append(patch("0.weight", layer_of(other), 0.3, "b"))
            weight += 0.3 * truth("lora", other, layer.weight)
        side = SidePath(model, combine)
        side.set(make_plan(plan))
        assert error(model(x), output(layer, x, weight)) < NOISE[torch.float16]
        side.clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scale_is_not_rounded_with_the_strength(family: str) -> None:
    """What multiplies the change at the end is rounded to the layer's dtype on the CPU: to 8 bits in bf16."""
    branch = combine.combine([layer_of(tensors_of(family, (12, 8)), alpha=2.7)], [0.5])
    ((_, number),) = branch.run(numbers(3, 8).bfloat16(), nn.Linear(8, 12))
    assert torch.frexp(torch.tensor(number)).mantissa == 0.5


def test_factors_are_made_of_ordinary_size_without_a_rounding() -> None:
    layer = layer_of(resized("lora", torch.zeros(12, 8), (1e36, 1e-30)), alpha=None)
    sized = branches.LowRank(up=layer.family.up, down=layer.family.down, scale=0.25).sized()
    assert sized.up is layer.family.up, "merging reads the file's own factors"
    ready = sized.to(torch.device("cpu"), torch.float32)
    for factor, stored in ((ready.up, sized.up), (ready.down, sized.down)):
        quotients = set((factor.double() / stored.double()).flatten().tolist())
        assert len(quotients) == 1 and torch.frexp(torch.tensor(quotients.pop())).mantissa == 0.5
        assert 0.1 < factor.abs().max() < 1
    wanted = 0.25 * sized.up.double() @ sized.down.double()
    assert torch.allclose(ready.scale * (ready.up.double() @ ready.down.double()), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", NOISE, ids=str)
@pytest.mark.parametrize("family", ["lora", "tucker", "loha", "lokr", "full", "lora+loha"])
@pytest.mark.parametrize("strength", [70000.0, -1e7, 1e30, 3e38, 1e-5, 1e-8, 1e-30])
@torch.no_grad()
def test_a_strength_is_no_number_of_the_layers_dtype(strength: float, family: str, dtype: torch.dtype) -> None:
    """It acts wherever the result fits, whether ΔW makes up for it or the input does; and it never ends an image."""
    model = nn.Sequential(nn.Conv2d(8, 12, 1)).to(dtype)
    layer = model[0]
    names = family.split("+")
    for change, inputs in ((1.0, 1.0), (3e5, 0.01)):  # the second: in a weight of fp16 it would be infinite
        x = (numbers(2, 8, 5, 4, seed=5) * inputs).to(dtype)
        held = [resized(name, layer.weight, (change / strength, 1.0)) for name in names]
        weight, patches = layer.weight.double(), []
        for name, tensors in zip(names, held, strict=True):
            weight = weight + strength * truth(name, tensors, layer.weight)
            patches.append(patch("0.weight", layer_of(tensors), strength, name))
        side = SidePath(model, combine)
        side.set(make_plan(patches))
        assert error(model(x), output(layer, x, weight)) < NOISE[dtype]
        side.clear()


@torch.no_grad()
def test_a_result_that_does_not_fit_is_infinite_and_no_error() -> None:
    model, x = nn.Sequential(nn.Linear(8, 12)).half(), numbers(3, 8).half()
    side = SidePath(model, combine)
    for strength in (1.0, 3e38):
        side.set(make_plan([patch("0.weight", layer_of(tensors_of("full", (12, 8)), alpha=3e38), strength)]))
        assert model(x).dtype == torch.float16
    side.set(make_plan([patch("0.weight", layer_of(tensors_of("lora", (12, 8)), alpha=3e38), 3e38)]))
    assert not model(x).isfinite().all()


def test_residual_embedding_and_multiplying_families() -> None:
    sparse = {
        **tensors_of("lora", (12, 8)), "bias_indices": torch.tensor([[0, 5], [3, 7]], dtype=torch.int16),
        "bias_values": torch.tensor([2.0, -1.0]), "bias_size": torch.tensor([12, 8]),
    }  # fmt: skip
    model = nn.Sequential(nn.Linear(8, 12))
    x = numbers(3, 8)
    with torch.no_grad():
        layer = layer_of(sparse)
        expected = output(model[0], x, model[0].weight.double() + layer.delta(model[0].weight.double()))
        side = SidePath(model, combine)
        side.set(make_plan([patch("0.weight", layer, 1.0)]))
        assert error(model(x), expected) < 1e-5
    for tensors in (
        {**tensors_of("lora", (12, 8)), "dora_scale": torch.ones(12, 1)},
        {"oft_blocks": numbers(3, 4, 4)},
        {"weight": numbers(12), "on_input": torch.tensor(0)},
    ):
        assert not combine.has_branch(layer_of(tensors, None))
        with pytest.raises(PatchError, match="needs the weight itself"):
            side.set(make_plan([patch("0.weight", layer_of(tensors, None))]))
        assert not hooked(model)
    with pytest.raises(ValueError, match="needs the base weight"):
        combine.combine([layer_of({"w_norm": numbers(8)}, None)], [1.0])


@torch.no_grad()
def test_tiles_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(2, 8, 6, 6)
    results = []
    for tile in (1, 200, 2**20):
        monkeypatch.setattr(branches, "TILE", tile)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 12, 3))
        SidePath(model, combine).set(make_plan([patch("0.weight", layer_of(tensors_of("loha", (12, 8, 3, 3))))]))
        results.append(model(x))
    assert torch.allclose(results[0], results[2], rtol=1e-5, atol=1e-5)
    assert torch.allclose(results[1], results[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_part_of_a_fused_projection(family: str) -> None:
    model = nn.Sequential(nn.Linear(8, 36))
    layer, x = model[0], numbers(2, 5, 8)
    k, v = (tensors_of(family, (12, 8), seed=seed) for seed in (1, 2))
    weight = layer.weight.double().clone()
    weight[12:24] += 0.7 * truth(family, k, layer.weight[12:24])
    weight[24:] -= 1.5 * truth(family, v, layer.weight[24:])
    rows = {"axis": 0, "length": 12}
    plan = make_plan(
        [
            patch("0.weight", layer_of(k), start=12, **rows),
            patch("0.weight", layer_of(v), -1.5, "b", start=24, **rows),
        ]
    )
    SidePath(model, combine).set(plan)
    assert error(model(x), output(layer, x, weight)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fused_adapter_on_split_projections(family: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(8, 12))
    tensors, x = tensors_of(family, (24, 8)), numbers(3, 8)
    whole = truth(family, tensors, torch.zeros(24, 8))
    layers = [RowsLayer.of(layer_of(tensors), (24, 8), start, 12) for start in (0, 12)]
    SidePath(model, combine).set(make_plan(patch(f"{i}.weight", layer) for i, layer in enumerate(layers)))
    for i, layer in enumerate(model):
        expected = output(layer, x, layer.weight.double() + 0.7 * whole[12 * i : 12 * i + 12])
        assert error(layer(x), expected) < 1e-5


@torch.no_grad()
def test_inpainting_gives_the_branch_the_channels_that_it_knows() -> None:
    model = nn.Sequential(nn.Conv2d(9, 12, 3, padding=1))
    tensors, x = tensors_of("lora", (12, 4, 3, 3)), numbers(2, 9, 5, 5)
    weight = model[0].weight.double().clone()
    weight[:, :4] += 0.7 * truth("lora", tensors, weight[:, :4])
    SidePath(model, combine).set(make_plan([patch("0.weight", layer_of(tensors), axis=1, start=0, length=4)]))
    assert error(model(x), output(model[0], x, weight)) < 1e-5


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 12), lambda: nn.Conv2d(8, 12, 1)], ids=["linear", "conv"])
@torch.no_grad()
def test_bias_and_weight_together(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make())
    layer = model[0]
    x = numbers(2, 8) if layer.weight.ndim == 2 else numbers(2, 8, 3, 3)
    tensors, shift = tensors_of("lora", tuple(layer.weight.shape)), numbers(12)
    plan = make_plan([patch("0.weight", layer_of(tensors)), patch("0.bias", layer_of({"diff_b": shift}, None), 0.5)])
    SidePath(model, combine).set(plan)
    weight = layer.weight.double() + 0.7 * truth("lora", tensors, layer.weight)
    expected = output(layer, x, weight, layer.bias + 0.5 * shift)
    assert error(model(x), expected) < 1e-5
    assert error(model[0](input=x), expected) < 1e-5, "called by keyword"


def three(shape: tuple[int, ...]) -> list[tuple[str, dict[str, Tensor], float]]:
    return [
        ("a", tensors_of("lora", shape, rank=2, seed=1), 0.7),
        ("b", tensors_of("lora", shape, rank=5, seed=20), -0.4),
        ("c", tensors_of("loha", shape, seed=40), 1.3),
    ]


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d grouped"])
@torch.no_grad()
def test_several_adapters_in_any_order(kind: str) -> None:
    make, shape = LAYERS[kind]
    model = nn.Sequential(make())
    layer, x = model[0], numbers(*shape)
    adapters = three(tuple(layer.weight.shape))
    families = {"a": "lora", "b": "lora", "c": "loha"}
    weight = layer.weight.double() + sum(s * truth(families[n], t, layer.weight) for n, t, s in adapters)
    side = SidePath(model, combine)
    results = []
    for order in (adapters, adapters[::-1], adapters[1:] + adapters[:1]):
        side.clear()
        side.set(make_plan([patch("0.weight", layer_of(t), s, n) for n, t, s in order]))
        results.append(model(x))
    assert error(results[0], output(layer, x, weight)) < 1e-5
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(layer._forward_hooks) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_a_strength_is_changed_without_reading_a_factor(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    layer, x = model[0], numbers(3, 8)
    layers = [(n, layer_of(t), s) for n, t, s in three((12, 8))[:count]]
    side = SidePath(model, combine)
    side.set(make_plan([patch("0.weight", d, s, n) for n, d, s in layers]))
    model(x)

    def never(*_: Any) -> Any:
        raise AssertionError("a factor was read again")

    monkeypatch.setattr(branches.Branch, "to", never)
    monkeypatch.setattr(branches.Dense, "to", never)
    monkeypatch.setattr(combine, "branch_of", never)
    plan = make_plan([patch("0.weight", d, 2 * s, n) for n, d, s in layers])
    assert side.set(plan) == 1
    weight = layer.weight.double() + sum(2 * s * d.delta(layer.weight.double()) for _, d, s in layers)
    assert error(layer(x), output(layer, x, weight)) < 1e-5
    assert side.set(plan) == 0, "the same set again"


@torch.no_grad()
def test_a_changed_set_touches_what_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    x = numbers(3, 8)
    first, second = layer_of(tensors_of("lora", (12, 8))), layer_of(tensors_of("lora", (8, 12)))
    side, plain = SidePath(model, combine), model(x)
    assert side.set(make_plan([patch("0.weight", first), patch("1.weight", second)])) == 2
    both = model(x)
    assert side.set(make_plan([patch("0.weight", first)])) == 1
    assert hooked(model) == ["0"]
    assert side.set(make_plan([patch("0.weight", first), patch("1.weight", second)])) == 1
    assert torch.equal(model(x), both)
    assert side.set({}) == 2
    assert not side.active and not hooked(model)
    assert torch.equal(model(x), plain)


def test_nothing_stays_behind() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Conv1d(3, 12, 1))
    before = [set(vars(module)) for module in model.modules()]
    classes = {kind: dict(vars(kind)) for kind in (nn.Module, nn.Linear, nn.Conv1d)}
    side = SidePath(model, combine)
    side.set(make_plan([patch("0.weight", layer_of(tensors_of("lora", (12, 8))))]))
    with torch.no_grad():
        model[0](numbers(2, 8))
    held = [weakref.ref(hook.terms[0].sum) for hook in side._hooks.values()]
    side.clear()
    gc.collect()
    assert [ref() for ref in held] == [None], "the converted factors are freed"
    assert [set(vars(module)) for module in model.modules()] == before
    assert not hooked(model)
    assert all(dict(vars(kind)) == held for kind, held in classes.items())
    assert not torch.nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("error_kind", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("where", ["combine", "install", "remove"])
@torch.no_grad()
def test_a_failure_in_the_middle_leaves_no_hook(
    where: str, at: int, error_kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    x = numbers(2, 8)
    plain = model(x)
    layer = layer_of(tensors_of("lora", (8, 8)))
    old = make_plan(patch(f"{i}.weight", layer) for i in (0, 1, 2))
    new = make_plan(patch(f"{i}.weight", layer, source="b") for i in (3, 4, 5))
    side = SidePath(model, combine)
    side.set(old)
    calls = iter(range(100))

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == at:
                raise error_kind("stop")
            return real(*args, **kwargs)

        return call

    if where == "combine":
        monkeypatch.setattr(combine, "combine", failing(combine.combine))
    elif where == "install":
        monkeypatch.setattr(nn.Module, "register_forward_hook", failing(nn.Module.register_forward_hook))
    else:
        kind = torch.utils.hooks.RemovableHandle
        monkeypatch.setattr(kind, "remove", failing(kind.remove))
    with pytest.raises(KeyboardInterrupt if error_kind is KeyboardInterrupt else PatchError):
        side.set(new)
    assert not hooked(model) and not side.active
    assert torch.equal(model(x), plain)
    assert side.set(new) == 3, "and it can be set again"


def test_the_autocast_of_the_host() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Conv1d(3, 12, 1))
    layer, x = model[0], numbers(3, 8)
    SidePath(model, combine).set(make_plan([patch("0.weight", layer_of(tensors_of("lora", (12, 8))))]))
    weight = layer.weight + 0.7 * layer_of(tensors_of("lora", (12, 8))).delta(layer.weight.detach())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        changed = layer(x)
    assert changed.dtype == torch.bfloat16
    assert error(changed, output(layer, x, weight.detach())) < NOISE[torch.bfloat16]


@torch.no_grad()
def test_a_layer_that_computes_in_full_under_autocast_is_added_to_in_full() -> None:
    class Full(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.to(self.weight.dtype))

    model, x = nn.Sequential(Full(8, 12)), numbers(3, 8)
    layer = layer_of(tensors_of("lora", (12, 8)))
    SidePath(model, combine).set(make_plan([patch("0.weight", layer)]))
    expected = output(model[0], x, model[0].weight.double() + 0.7 * layer.delta(model[0].weight.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(model(x), expected) < 1e-5


def test_gradients_pass_through_to_the_input() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3))
    x = numbers(1, 8, 4, 4).requires_grad_()
    SidePath(model, combine).set(make_plan([patch("0.weight", layer_of(tensors_of("lora", (12, 8, 3, 3))))]))
    model(x).sum().backward()
    weight = model[0].weight + 0.7 * layer_of(tensors_of("lora", (12, 8, 3, 3))).delta(model[0].weight.detach())
    other = x.detach().requires_grad_()
    functional.conv2d(other, weight).sum().backward()
    assert x.grad is not None and other.grad is not None
    assert error(x.grad, other.grad.double()) < 1e-5


@torch.no_grad()
def test_tiling_switched_on_after_the_set() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1))
    layer, x = model[0], numbers(1, 8, 4, 4)
    SidePath(model, combine).set(make_plan([patch("0.weight", layer_of(tensors_of("tucker", (12, 8, 3, 3))))]))
    layer.padding_mode = "circular"  # as the host does it
    weight = layer.weight + 0.7 * layer_of(tensors_of("tucker", (12, 8, 3, 3))).delta(layer.weight)
    assert error(layer(x), output(layer, x, weight)) < 1e-5


@torch.no_grad()
def test_a_module_under_two_names_and_a_weight_in_two_modules() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8, bias=False)})
    model["c"].weight = shared.weight
    layer, x = layer_of(tensors_of("lora", (8, 8))), numbers(2, 8)
    side = SidePath(model, combine)
    assert side.set(make_plan([patch("b.weight", layer)])) == 2
    weight = shared.weight.double() + 0.7 * layer.delta(shared.weight.double())
    for name in "abc":
        assert error(model[name](x), output(model[name], x, weight)) < 1e-5
    for names in (("words", "head"), ("head", "words")):
        kinds = {"words": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)}
        tied = nn.ModuleDict({name: kinds[name] for name in names})
        tied["head"].weight = tied["words"].weight
        assert SidePath(tied, combine).route(View("head.weight"), layer, side=True).path == "merge"
        rounded = nn.Parameter(shared.weight.to(FP8), requires_grad=False)
        tied["head"].weight = tied["words"].weight = rounded
        side = SidePath(tied, combine)
        assert side.route(View("head.weight"), layer).path == "requantise"
        with pytest.raises(PatchError, match="Embedding"):
            side.set(make_plan([patch("head.weight", layer)]))
        assert not hooked(tied)
        tied["head"].weight = tied["words"].weight = nn.Parameter(rounded.to("meta"), requires_grad=False)
        assert "Embedding" in str(SidePath(tied, combine).judge()(View("head.weight"), layer))


@torch.no_grad()
def test_a_compiled_model_sees_the_hooks_come_change_and_go() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    layer, x = layer_of(tensors_of("lora", (8, 8))), numbers(2, 8)
    plain = compiled(x)
    side = SidePath(compiled, combine)
    for strength in (0.7, -2.0):
        assert side.set(make_plan([patch("_orig_mod.0.weight", layer, strength)])) == 1
        weight = model[0].weight.double() + strength * layer.delta(model[0].weight.double())
        assert error(compiled(x), output(model[0], x, weight).relu()) < 1e-5
    side.clear()
    assert torch.equal(compiled(x), plain)


# ---- storage


class Packed(nn.Module):
    """As 4-bit quantisers hold it: two numbers in a byte, the shape gone."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features = features, 12
        self.weight = nn.Parameter(torch.zeros(features * 12 // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.real = numbers(12, features)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.real.to(x.dtype))


def fp8_linear(scale: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(8, 12)
    layer.weight = nn.Parameter(layer.weight.detach().to(FP8), requires_grad=False)
    if scale is not None:
        layer.scale_weight = scale
    return layer


def mapped_read_only(tmp_path: Path) -> nn.Linear:
    numpy = pytest.importorskip("numpy")
    layer = nn.Linear(8, 12)
    numpy.save(tmp_path / "w.npy", layer.weight.detach().numpy())
    with pytest.warns(UserWarning, match="not writable"):
        layer.weight = nn.Parameter(torch.from_numpy(numpy.load(tmp_path / "w.npy", mmap_mode="r")))
    return layer


@pytest.mark.parametrize(
    ("make", "branch", "expected", "reason"),
    [
        (lambda: nn.Linear(8, 12), True, "merge", ""),
        (lambda: nn.Linear(8, 12).half(), False, "merge", ""),
        (fp8_linear, True, "side", "float8_e4m3fn"),
        (fp8_linear, False, "requantise", "float8_e4m3fn"),
        (lambda: fp8_linear(torch.tensor(2.0)), False, "requantise", "float8_e4m3fn"),
        (lambda: nn.Linear(8, 12, device="meta"), True, "side", "meta"),
        (lambda: nn.Linear(8, 12, device="meta"), False, None, "needs the weight itself"),
        (Packed, True, "side", "uint8"),
        (Packed, False, None, "needs the weight itself"),
        (lambda: nn.Embedding(12, 8).to(FP8), True, "requantise", "float8"),
        (lambda: nn.Embedding(12, 8, device="meta"), True, None, "Embedding"),
        (lambda: nn.MultiheadAttention(8, 2).to(FP8).out_proj, True, "requantise", "float8"),
        (lambda: nn.MultiheadAttention(8, 2, device="meta").out_proj, True, None, "without running the layer"),
    ],
)
def test_the_path_is_chosen_by_storage(
    make: Callable[[], nn.Module], branch: bool, expected: str | None, reason: str
) -> None:
    route = which_path(make(), "weight", View("weight"), branch=branch)
    assert route.path == expected
    assert reason in route.reason and bool(route.reason) == bool(reason)


def test_the_user_may_ask_for_it_and_gets_it_where_it_can_be() -> None:
    model = nn.ModuleDict(
        {"linear": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm(8)}
    )
    side, layer = SidePath(model, combine), layer_of(tensors_of("lora", (8, 8)))
    dora = layer_of({**tensors_of("lora", (8, 8)), "dora_scale": torch.ones(8, 1)})
    rows = View("attention.in_proj_weight", 0, 8, 8)
    wanted = {
        (View("linear.weight"), layer): "side",
        (View("linear.weight"), dora): "merge",
        (View("attention.out_proj.weight"), layer): "merge",
        (rows, layer): "merge",
        (View("norm.weight"), layer_of({"w_norm": numbers(8)}, None)): "merge",
        (View("linear.weight", transposed=True), layer): "merge",
    }
    for (view, delta), path in wanted.items():
        assert side.route(view, delta, side=True).path == path
        assert side.route(view, delta).path == "merge"
    plan = make_plan(Patch("a", view, 1.0, delta) for view, delta in wanted)
    merged, beside = side.split(plan, side=True)
    assert set(beside) == {"linear.weight"}
    assert sum(map(len, merged.values())) + sum(map(len, beside.values())) == sum(map(len, plan.values()))
    fused = nn.ModuleDict({"block": nn.TransformerEncoderLayer(8, 2, 16)}).to(FP8)
    fused_route = SidePath(fused, combine).route(View("block.linear1.weight"), layer_of(tensors_of("lora", (16, 8))))
    assert fused_route.path == "requantise", "in evaluation its fast path reads the weights of its layers"
    with pytest.raises(PatchError, match="without running the layer"):
        side.set({"attention.out_proj.weight": plan["attention.out_proj.weight"]})
    assert not hooked(model)


@pytest.mark.skipif(not hasattr(torch.UntypedStorage, "resizable"), reason="this torch tells of no memory whose it is")
def test_read_only_memory_is_noticed(tmp_path: Path) -> None:
    layer = mapped_read_only(tmp_path)
    assert which_path(layer, "weight", View("weight"), branch=True).path == "side"
    assert which_path(layer, "weight", View("weight"), branch=False).path is None
    layer.weight = nn.Parameter(torch.zeros(1, 1).expand(12, 8))
    assert which_path(layer, "weight", View("weight"), branch=True).reason == "the model's weight is read-only"


@pytest.mark.skipif(not hasattr(torch.UntypedStorage, "resizable"), reason="this torch tells of no memory whose it is")
def test_a_model_of_mapped_weights_costs_a_few_looks_at_memory(
    tmp_path: Path, write_adapter: WriteAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one for each weight: in a webui's process each takes a millisecond."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(40)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert not model[0].weight.untyped_storage().resizable()
    looks = []
    real = storage._protected_spans
    monkeypatch.setattr(storage, "_protected_spans", lambda: looks.append(1) or real())
    factors = {"lora_up.weight": numbers(8, 2), "lora_down.weight": numbers(2, 8)}
    adapter = lib_locon.load(write_adapter(tmp_path / "a.safetensors", {str(i): factors for i in range(40)}))
    session = lib_locon.Session(model)
    assert session.apply([lib_locon.Use(adapter)]).written == 40
    assert 0 < len(looks) < 5
    session.restore()
    assert 0 < len(looks) < 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing tells")
def test_where_memory_begins_and_ends_to_be_protected() -> None:
    size = mmap.PAGESIZE
    with mmap.mmap(-1, 3 * size) as spans:
        start = ctypes.addressof(ctypes.c_char.from_buffer(spans))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(size), 1) == 0  # the middle: only read
        findings = storage.Findings()
        places = [start, start + size - 1, start + size, start + 2 * size - 1, start + 2 * size, start + 3 * size - 1]
        assert [findings.protects(place) for place in places] == [False, False, True, True, False, False]


@torch.no_grad()
def test_packed_weights_have_the_shape_of_their_matrix() -> None:
    model = nn.Sequential(Packed(), nn.Linear(12, 4), fp8_linear())
    assert dict(logical_shapes(model)) == {
        "0.weight": (12, 8), "1.weight": (4, 12), "1.bias": (4,), "2.weight": (12, 8), "2.bias": (12,)
    }  # fmt: skip
    tensors, x = tensors_of("lora", (12, 8)), numbers(3, 8)
    SidePath(model, combine).set(make_plan([patch("0.weight", layer_of(tensors))]))
    real = model[0].real
    expected = functional.linear(x.double(), real.double() + 0.7 * truth("lora", tensors, real))
    assert error(model[0](x), expected) < 1e-5


def test_requantising_starts_from_the_best_base_and_stays_finite() -> None:
    layer = nn.Linear(8, 12)
    unrounded = layer.weight.detach().half()
    layer = fp8_linear()
    assert decode(layer, "weight", layer.weight) is layer.weight
    layer.fp16_weight = unrounded
    assert decode(layer, "weight", layer.weight) is unrounded
    assert encode(layer, "weight", torch.tensor([1e6, -1e6]), FP8).float().tolist() == [448.0, -448.0]
    scaled = fp8_linear(torch.full((12,), 0.5))
    assert torch.equal(decode(scaled, "weight", scaled.weight), scaled.weight.float() * 0.5)
    assert torch.equal(
        encode(scaled, "weight", decode(scaled, "weight", scaled.weight), FP8).view(torch.uint8),
        scaled.weight.view(torch.uint8),
    )
    whole = nn.Linear(8, 12)
    value = numbers(12, 8)
    whole.weight = nn.Parameter((value * 30).round().clamp(-127, 127).to(torch.int8), requires_grad=False)
    whole.weight_scale = torch.tensor(1 / 30)
    assert which_path(whole, "weight", View("weight"), branch=False).path == "requantise"
    assert encode(whole, "weight", decode(whole, "weight", whole.weight) + 1 / 30, torch.int8)[0, 0] == (
        whole.weight[0, 0] + 1
    )


def _as_attribute(layer: nn.Linear, scale: Tensor) -> None:
    layer.scale_weight = scale


def _as_parameter(layer: nn.Linear, scale: Tensor) -> None:
    layer.weight_scale = nn.Parameter(scale)


def _as_buffer(layer: nn.Linear, scale: Tensor) -> None:
    layer.register_buffer("weight_scale", scale)


def _by_its_class(layer: nn.Linear, scale: Tensor) -> None:
    type(layer).scale_weight = property(lambda self: scale)


def _by_getattr(layer: nn.Linear, scale: Tensor) -> None:
    ask = nn.Module.__getattr__
    type(layer).__getattr__ = lambda self, name: scale if name == "weight_scale" else ask(self, name)


def _by_getattribute(layer: nn.Linear, scale: Tensor) -> None:
    ask = nn.Module.__getattribute__
    type(layer).__getattribute__ = lambda self, name: scale if name == "weight_scale" else ask(self, name)


def _by_parametrization(layer: nn.Linear, scale: Tensor) -> None:
    layer.weight_scale = nn.Parameter(scale)
    parametrize.register_parametrization(layer, "weight_scale", nn.Identity())


@pytest.mark.parametrize(
    "give",
    [_as_attribute, _as_parameter, _as_buffer, _by_its_class, _by_getattr, _by_getattribute, _by_parametrization],
)
@pytest.mark.parametrize("dtype", [FP8, torch.float32], ids=str)
def test_a_scale_is_found_wherever_a_module_has_it(
    give: Callable[[nn.Linear, Tensor], None], dtype: torch.dtype
) -> None:
    """Also where it came after somebody had asked a module of that class."""

    class Scaled(nn.Linear):
        pass

    layer = in_8_bits(dtype)
    del layer.weight_scale
    layer.__class__ = Scaled
    parametrize.register_parametrization(layer, "bias", nn.Identity())  # gives it a class of its own
    stored = layer.weight.detach().float()
    assert ("scale" in which_path(layer, "weight", View("weight"), branch=False).reason) is False
    assert torch.equal(decode(layer, "weight", layer.weight.detach()).float(), stored)
    give(layer, torch.tensor(0.5))
    assert torch.equal(decode(layer, "weight", layer.weight.detach()).float(), stored * 0.5)
    route = which_path(layer, "weight", View("weight"), branch=False)
    assert route.path == "requantise"
    assert ("scale" in route.reason) is (dtype == torch.float32)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_compiled_layer_is_told_from_others() -> None:
    layer = torch.jit.script(nn.Linear(8, 12))
    assert which_path(layer, "weight", View("weight"), branch=True).path == "merge"
    beside = which_path(layer, "weight", View("weight"), branch=True, side=True)
    assert beside.reason == "its layer is a compiled script"


def in_8_bits(dtype: torch.dtype, scale: object = None) -> nn.Linear:
    layer = nn.Linear(8, 12)
    stored = layer.weight.detach() * 100
    layer.weight = nn.Parameter((stored.round() if dtype == torch.int8 else stored).to(dtype), requires_grad=False)
    layer.weight_scale = scale
    return layer


def dora(seed: int = 0) -> Layer:
    return layer_of({**tensors_of("lora", (12, 8), seed=seed), "dora_scale": torch.ones(12, 1)})


@pytest.mark.parametrize("dtype", [FP8, torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(), (1,), (1, 1), (1, 1, 1), (12,), (12, 1), (1, 8), (12, 8)], ids=str)
def test_scales_of_a_known_layout(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    scale = numbers(*sizes).abs() / 100 + 0.01
    model = nn.Sequential(in_8_bits(dtype, scale))
    stored = model[0].weight.detach().clone()
    column = scale.reshape(12, 1) if sizes == (12,) else scale.reshape(()) if scale.numel() == 1 else scale
    assert torch.equal(decode(model[0], "weight", stored), stored.float() * column)
    assert SidePath(model, combine).route(View("0.weight"), dora()).path == "requantise"
    Engine(model).apply(make_plan([patch("0.weight", dora())]))
    assert not torch.equal(model[0].weight.float(), stored.float())


@pytest.mark.parametrize("dtype", [FP8, torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize(
    "scale", [*(torch.ones(sizes) for sizes in ((8, 3), (3, 2), (8,), (12, 1, 1), (2, 12, 8), (0,))), "x", 0.5],
    ids=lambda scale: str(tuple(scale.shape)) if isinstance(scale, Tensor) else repr(scale),
)  # fmt: skip
def test_a_scale_whose_layout_is_not_known_leaves_out_its_weight_alone(
    scale: object, dtype: torch.dtype, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    """Block by block, as many quantisers store it: decoded as one of ours it would be noise, or no sum at all."""
    model = nn.ModuleDict({"odd": in_8_bits(dtype, scale), "known": in_8_bits(FP8, torch.tensor(0.01))})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {**tensors_of("lora", (12, 8)), "dora_scale": torch.ones(12, 1)}
    adapter = lib_locon.load(write_adapter(tmp_path / "a.safetensors", {"odd": tensors, "known": tensors}))
    session = lib_locon.Session(model)
    report = session.apply([lib_locon.Use(adapter)])
    (one,) = report.adapters
    assert (one.used, one.total, report.written) == (1, 2, 1)
    assert "1 × the model's weight is stored" in str(one)
    assert "the layout of its scale is not known, and this kind of adapter needs the weight itself" in str(one)
    assert torch.equal(model["odd"].weight.float(), before["odd.weight"].float())
    with pytest.raises(PatchError, match=r"odd\.weight could not be patched \(the layout of its scale is not known"):
        Engine(model).apply(make_plan([patch("odd.weight", dora())]))
    session.restore()
    plain = SidePath(model, combine).route(View("odd.weight"), layer_of(tensors_of("lora", (12, 8))))
    assert plain.path == "side", "which needs no scale"


@pytest.mark.parametrize("side_path", [False, True])
def test_it_is_said_that_a_sum_is_rounded_to_8_bits_again(
    side_path: bool, tmp_path: Path, write_adapter: WriteAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {**tensors_of("lora", (12, 8)), "dora_scale": torch.ones(12, 1)}
    modules = dict.fromkeys(("a", "b", "scaled", "plain"), tensors)
    pure = lib_locon.load(write_adapter(tmp_path / "dora.safetensors", modules))
    beside = lib_locon.load(
        write_adapter(tmp_path / "lora.safetensors", dict.fromkeys("ab", tensors_of("lora", (12, 8))))
    )
    single = lib_locon.load(write_adapter(tmp_path / "one.safetensors", {"b": tensors}))
    parts = {"a": fp8_linear(), "b": in_8_bits(torch.int8, torch.tensor(0.01)), "plain": nn.Linear(8, 12)}
    # the last is decoded and summed too, but rounded to what it was stored as, as everywhere
    model = nn.ModuleDict({**parts, "scaled": in_8_bits(torch.float16, torch.tensor(0.01))})
    session = lib_locon.Session(model, side_path=side_path)
    lines = str(session.apply([lib_locon.Use(pure), lib_locon.Use(beside), lib_locon.Use(single)])).split("\n")
    assert lines[0].endswith(": 4/4 layers; 2 weights are stored in 8 bits: their sums are rounded to 8 bits again")
    assert lines[1].endswith(": 2/2 layers")
    assert lines[2].endswith(": 1/1 layers; 1 weight is stored in 8 bits: its sum is rounded to 8 bits again")
    asked = []
    monkeypatch.setattr(Judge, "__call__", lambda *_: asked.append(1))
    assert "2 weights" in str(session.apply([lib_locon.Use(pure, lib_locon.Strengths.both(0.5))]))
    assert not asked, "once for an adapter, not for each change of a set"
    session.restore()


def test_a_sum_beyond_all_numbers_is_refused_where_it_would_be_rounded_to_8_bits() -> None:
    # clamped, it would be a weight of nothing but the largest number, without a word
    model = nn.Module()
    model.head = nn.Embedding(12, 8).to(FP8)
    before = model.head.weight.detach().clone()
    tensors = tensors_of("lora", (12, 8))
    engine = Engine(model)
    plan = make_plan([patch("head.weight", layer_of(tensors, alpha=1e38), strength=1e10)])
    with pytest.raises(PatchError, match=r"head\.weight could not be patched .*beyond fp32.*every weight is the base"):
        engine.apply(plan)
    assert torch.equal(model.head.weight.view(torch.uint8), before.view(torch.uint8))
    assert not engine.active


# ---- fp8, the whole way


class Casting:
    """What the host's manual cast does: the weight in the input's dtype, for the time of the forward."""

    def cast(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        bias = self.bias  # type: ignore[attr-defined]
        return self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)  # type: ignore[attr-defined]


class CastingLinear(Casting, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, *self.cast(x))


class CastingConv2d(Casting, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.cast(x))


def in_fp8(model: TinySD, *, dequantised: bool = False) -> TinySD:
    """A copy with Linear and Conv2d weights rounded to fp8; `dequantised`: the same numbers, held in fp32."""
    model = copy.deepcopy(model)
    for module in model.modules():
        kind = {nn.Linear: CastingLinear, nn.Conv2d: CastingConv2d}.get(type(module))
        if kind is not None:
            module.__class__ = kind
            for name, value in list(module.named_parameters(recurse=False)):
                rounded = value.detach().to(FP8)
                setattr(module, name, nn.Parameter(rounded.float() if dequantised else rounded, requires_grad=False))

    def apply_model(self: TinySD, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.model(x, t, context)  # the tiny model asks its first weight for a dtype to compute in

    model.apply_model = types.MethodType(apply_model, model)
    return model


@cache
def tiny() -> TinySD:
    return TinySD.random(0)


def plan_for(model: nn.Module, *uses: tuple[str, float]) -> Plan:
    session = lib_locon.Session(model)
    patches = []
    for name, strength in uses:
        adapter = lib_locon.load(random_adapters.folder() / f"{name}.safetensors")
        use = lib_locon.Use(adapter, lib_locon.Strengths.both(strength))
        found = session.match(use.adapter)
        assert found.matched and not found.unmatched
        patches += use.patches(found)
    return make_plan(patches)


def image(model: TinySD) -> Tensor:
    return sample(model, "a cat", seed=1, steps=2)


def merged(model: TinySD, plan: Plan) -> Tensor:
    """The image with the sum in fp32 weights, written by nobody's engine."""
    held = copy.deepcopy(model)
    with torch.no_grad():
        for path, patches in plan.items():
            weight = held.get_parameter(path)
            total = weight.double()
            for item in patches:
                item.view.of(total).add_(item.delta.delta(item.view.of(weight.double())), alpha=item.strength)  # type: ignore[attr-defined]
            weight.copy_(total)
    return image(held)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


@pytest.fixture(scope="module")
def fp8() -> Iterator[tuple[TinySD, TinySD, Tensor]]:
    """The model in fp8, the same numbers in fp32, and their image without adapters."""
    model, wide = in_fp8(tiny()), in_fp8(tiny(), dequantised=True)
    plain = image(model)
    assert torch.equal(plain, image(wide)), "the emulated cast loses nothing"
    yield model, wide, plain
    assert not hooked(model)


STACKS = [
    *([(name, 1.0)] for name in ("tiny_lora", "tiny_locon", "tiny_locon_tucker", "tiny_loha", "tiny_loha_tucker")),
    *([(name, -0.6)] for name in ("tiny_lokr", "tiny_lokr_tucker")),
    [("tiny_locon", 0.5), ("tiny_lora", 0.8), ("tiny_loha", -1.0)],
]


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: "+".join(name for name, _ in stack))
@torch.no_grad()
def test_the_fp8_image(stack: Sequence[tuple[str, float]], fp8: tuple[TinySD, TinySD, Tensor]) -> None:
    model, wide, plain = fp8
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_for(model, *stack)
    side = SidePath(model, combine)
    merge, beside = side.split(plan)
    assert not merge and set(beside) == set(plan)
    expected = merged(wide, plan)
    assert side.set(beside) == len(plan)
    beside_it = image(model)
    # the ordinary way: the sum rounded to fp8
    side.clear()
    requantised = {}
    for path, patches in plan.items():
        weight = model.get_parameter(path)
        base = weight.double()
        total = base + sum(item.strength * item.delta.delta(base) for item in patches)  # type: ignore[attr-defined]
        requantised[path] = weight.clone()
        weight.copy_(encode(model.get_submodule(path.rpartition(".")[0]), "weight", total.float(), FP8))
    rounded = image(model)
    for path, value in requantised.items():
        model.get_parameter(path).copy_(value)
    shows = distance(expected, plain)
    assert shows > 0.002, "the adapter shows"
    assert distance(beside_it, expected) < 1e-4 < shows
    assert distance(rounded, expected) > 20 * distance(beside_it, expected)
    assert torch.equal(image(model), plain), "and the image without it is back"
    after = model.state_dict()
    assert all(torch.equal(after[name].view(torch.uint8), weights[name].view(torch.uint8)) for name in weights)


@torch.no_grad()
def test_the_same_strength_and_image_in_half(fp8: tuple[TinySD, TinySD, Tensor]) -> None:
    """Beside plain weights, asked for: the merged image within the dtype's noise."""
    del fp8
    for dtype, noise in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
        model = copy.deepcopy(tiny()).to(dtype)
        model.first_stage_model.float()
        plan = plan_for(model, ("tiny_locon", 0.8))
        plain, expected = image(model), merged(model, plan)
        side = SidePath(model, combine)
        merge, beside = side.split(plan, side=True)
        assert not merge
        side.set(beside)
        assert distance(image(model), expected) < noise < distance(expected, plain)
        side.clear()
        assert torch.equal(image(model), plain)
