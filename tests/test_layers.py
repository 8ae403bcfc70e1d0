"""The layers with a branch of their own: forward, merging to the byte, state dicts, training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lib_locon.errors import LoconError
from lib_locon.families.build import Hints, build_layers
from lib_locon.layers import LoConConv1d, LoConConv2d, LoConConv3d, LoRAEmbedding, LoRALinear

MAKE: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "linear": (lambda **o: LoRALinear(8, 12, 3, 1.5, **o), (2, 5, 8)),
    "linear, no bias": (lambda **o: LoRALinear(8, 12, 3, bias=False, **o), (5, 8)),
    "conv1d": (lambda **o: LoConConv1d(8, 12, 3, 4, 2, stride=2, padding=1, **o), (2, 8, 9)),
    "conv2d": (lambda **o: LoConConv2d(8, 12, 3, 4, 2, padding=1, stride=2, **o), (2, 8, 6, 7)),
    "conv2d reflect": (lambda **o: LoConConv2d(8, 12, 3, 4, padding=1, padding_mode="reflect", **o), (2, 8, 6, 7)),
    "conv2d grouped": (lambda **o: LoConConv2d(8, 12, 3, 4, 2, groups=4, dilation=2, bias=False, **o), (2, 8, 6, 7)),
    "conv3d": (lambda **o: LoConConv3d(8, 12, 2, 4, 2, padding=(1, 0, 1), **o), (2, 8, 3, 4, 3)),
    "embedding": (lambda **o: LoRAEmbedding(10, 8, 3, 6, padding_idx=0, **o), (2, 5)),
}
NOISE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
every_kind = pytest.mark.parametrize("kind", MAKE)


def made(kind: str, **options: Any) -> tuple[Any, Tensor]:
    """A layer whose factors are not zero, and an input."""
    torch.manual_seed(3)
    make, shape = MAKE[kind]
    layer = make(**options)
    for factor in factors(layer).values():
        nn.init.normal_(factor, std=0.3)
    dtype = options.get("dtype", torch.float32)
    return layer, torch.randint(10, shape) if kind == "embedding" else torch.randn(shape).to(dtype)


def factors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: factor for name, factor in layer.named_parameters() if "lora" in name}


def plain(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """torch's layer in fp64 with this weight."""
    other = copy.deepcopy(layer).double()
    other.__class__ = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch."))
    with torch.no_grad():
        other.weight.copy_(weight)
        return other(x if x.dtype == torch.int64 else x.double())


def delta_of(layer: Any) -> Tensor:
    """ΔW at strength 1 in fp64, read by the package as an adapter's file would be."""
    tensors = {name: value for name, value in layer.state_dict().items() if "lora" in name}
    layers, unread = build_layers(tensors, Hints(alpha=layer.alpha))
    assert not unread
    return layers[0].delta(layer.weight.detach().double())


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8))


@pytest.mark.parametrize("dtype", NOISE, ids=str)
@every_kind
@torch.no_grad()
def test_forward_merge_and_unmerge(kind: str, dtype: torch.dtype) -> None:
    layer, x = made(kind, dtype=dtype, strength=0.7)
    base = layer.weight.clone()
    expected = plain(layer, x, base.double() + 0.7 * delta_of(layer))
    beside = layer(x)
    assert beside.dtype == dtype
    assert error(beside, expected) < NOISE[dtype]
    layer.merge()
    assert layer.merged
    exact = base.double() + 0.7 * delta_of(layer)
    unit = torch.finfo(dtype).eps / 2  # summed in fp32, rounded once
    assert bool(((layer.weight - exact).abs() <= unit * exact.abs() + 1e-6).all())
    assert error(layer(x), expected) < NOISE[dtype]
    layer.unmerge()
    assert not layer.merged
    assert same_bytes(layer.weight, base)
    assert torch.equal(layer(x), beside)
    layer.unmerge()
    assert same_bytes(layer.weight, base)


@every_kind
@torch.no_grad()
def test_a_new_layer_is_its_base(kind: str) -> None:
    make, _ = MAKE[kind]
    _, x = made(kind)
    layer = make()
    assert error(layer(x), plain(layer, x, layer.weight.double())) < 1e-6
    base = layer.weight.clone()
    layer.merge()
    assert same_bytes(layer.weight, base)


@every_kind
@torch.no_grad()
def test_to_merge_again_starts_from_the_base(kind: str) -> None:
    layer, x = made(kind)
    base = layer.weight.clone()
    layer.merge()
    once = layer.weight.clone()
    layer.merge()
    assert same_bytes(layer.weight, once)
    layer.strength = -2.0
    layer.merge()
    assert error(layer(x), plain(layer, x, base.double() - 2 * delta_of(layer))) < 1e-5
    layer.unmerge()
    assert same_bytes(layer.weight, base)


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@every_kind
@torch.no_grad()
def test_the_state_dict_holds_the_base_and_the_adapter(kind: str, merged: bool) -> None:
    layer, x = made(kind)
    model = nn.Sequential(nn.Identity(), layer)
    out, base = model(x), layer.weight.clone()
    if merged:
        layer.merge()
    state = model.state_dict()
    assert same_bytes(state["1.weight"], base)
    assert float(state["1.alpha"]) == layer.alpha
    assert all(torch.equal(state[f"1.{name}"], factor) for name, factor in factors(layer).items())
    make, _ = MAKE[kind]
    other = nn.Sequential(nn.Identity(), make())
    other[1].alpha = 99.0
    if merged:
        other[1].merge()
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert not other[1].merged
    assert torch.equal(other(x), out)


@every_kind
def test_only_the_factors_learn(kind: str) -> None:
    layer, x = made(kind)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(factors(layer))
    layer(x).square().sum().backward()
    assert all(factor.grad is not None and factor.grad.abs().sum() > 0 for factor in factors(layer).values())
    assert layer.weight.grad is None
    before = layer(x).square().sum()
    optimizer = torch.optim.SGD(factors(layer).values(), lr=1e-4)
    optimizer.step()
    assert layer(x).square().sum() < before


def test_the_gradient_is_that_of_the_merged_weight() -> None:
    layer, x = made("conv2d grouped")
    layer(x).square().sum().backward()
    up, down = (factors(layer)[name] for name in ("lora_up.weight", "lora_down.weight"))
    up2, down2 = (t.detach().double().requires_grad_() for t in (up, down))
    delta = torch.einsum("or,rihw->oihw", up2.flatten(1), down2) * (2 / 4)
    weight = layer.weight.double() + delta
    functional.conv2d(x.double(), weight, dilation=2, groups=4).square().sum().backward()
    assert up.grad is not None and up2.grad is not None and down.grad is not None and down2.grad is not None
    assert error(up.grad, up2.grad) < 1e-5
    assert error(down.grad, down2.grad) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_autocast_and_mixed_dtypes(kind: str) -> None:
    layer, x = made(kind)
    expected = plain(layer, x, layer.weight.double() + delta_of(layer))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        layer.merge()
    assert out.dtype == (torch.float32 if kind == "embedding" else torch.bfloat16)
    assert error(out, expected) < 3e-2
    assert error(layer(x), expected) < 1e-5, "merging is exact, whatever autocast says"
    layer.unmerge()
    for factor in factors(layer).values():
        factor.requires_grad_(True)
    half = copy.deepcopy(layer)
    for name in ("weight", "bias"):
        if getattr(half, name, None) is not None:
            setattr(half, name, nn.Parameter(getattr(half, name).half(), requires_grad=False))
    out = half(x if x.dtype == torch.int64 else x.half())  # a half base, factors in fp32, as one trains them
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert all(f.grad is not None and f.grad.dtype == torch.float32 for f in factors(half).values())


@every_kind
def test_merging_is_in_full_precision_whatever_the_host_chose(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with TF32, and on processors with products in bf16, a factor would lose bits."""
    layer, _ = made(kind)
    seen, real = [], type(layer).delta

    def delta(self: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return real(self)

    monkeypatch.setattr(type(layer), "delta", delta)
    torch.set_float32_matmul_precision("medium")
    try:
        layer.merge()
        assert torch.get_float32_matmul_precision() == "medium", "the host's choice is its own"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


@torch.no_grad()
def test_moved_and_copied_while_merged() -> None:
    layer, x = made("conv2d")
    base = layer.weight.clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    layer.half()
    layer.unmerge()
    assert same_bytes(layer.weight, base.half())
    assert twin.merged
    twin.unmerge()
    assert same_bytes(twin.weight, base)
    assert torch.equal(twin(x), twin(x))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Linear(8, 12), LoRALinear),
        (nn.Conv1d(8, 12, 3, bias=False), LoConConv1d),
        (nn.Conv2d(8, 12, (3, 2), padding="same", dilation=2, groups=2, padding_mode="circular"), LoConConv2d),
        (nn.Conv3d(8, 12, 1), LoConConv3d),
        (nn.Embedding(10, 8, padding_idx=2), LoRAEmbedding),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@torch.no_grad()
def test_around_a_layer_that_is_there(layer: Any, kind: Any) -> None:
    pixels = (5 for _ in layer.weight.shape[2:])
    x = torch.randint(10, (4,)) if isinstance(layer, nn.Embedding) else torch.randn(2, 8, *pixels)
    around = kind.of(layer.eval(), rank=2, alpha=4)
    assert around.weight is layer.weight and getattr(around, "bias", None) is getattr(layer, "bias", None)
    assert not around.training
    assert torch.equal(around(x), layer(x))
    for factor in factors(around).values():
        nn.init.normal_(factor)
    base, out = layer.weight.clone(), around(x)
    assert not torch.equal(out, layer(x))
    around.merge()
    assert error(layer(x), out.double()) < 1e-5, "the weight is shared"
    around.unmerge()
    assert same_bytes(layer.weight, base)


def test_what_cannot_be() -> None:
    with pytest.raises(LoconError, match="at least 1"):
        LoRALinear(4, 4, 0)
    with pytest.raises(LoconError, match="max_norm"):
        LoRAEmbedding(4, 4, 1, max_norm=1.0)
    with pytest.raises(LoconError, match="max_norm"):
        LoRAEmbedding.of(nn.Embedding(4, 4, max_norm=1.0), 1)


@torch.no_grad()
def test_a_merge_that_fails_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = made("linear")
    base = layer.weight.clone()
    real = Tensor.copy_

    def half_way(self: Tensor, *args: Any) -> Tensor:
        real(self[:3], args[0][:3])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "copy_", half_way)
        with pytest.raises(KeyboardInterrupt):
            layer.merge()
    assert not torch.equal(layer.weight, base)
    layer.unmerge()
    assert same_bytes(layer.weight, base)
