"""The engine's promises, each on CPU, in every dtype, for every kind of weight (what fails half way: test_faults).

Weights and ΔW are small multiples of powers of two, so every sum is exact in fp32: the expected weight is worked out in
float64 and must be met bit for bit. Rounding twice, or in another order, shows.
"""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import lib_locon
from lib_locon.models.targets import View
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import Patch, Plan, make_plan
from tests.conftest import Whole

if TYPE_CHECKING:
    from tests.conftest import MakePatch, WriteAdapter, Zoo

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (
    "linear.weight", "linear.bias", "fused.weight", "conv1d.weight", "conv2d.weight", "conv1x1.weight",
    "conv3d.weight", "embedding.weight", "norm.weight", "norm.bias", "group.weight",
)  # fmt: skip
VIEWS: tuple[dict[str, Any], ...] = (
    {"path": "fused.weight", "axis": 0, "start": 8, "length": 8},
    {"path": "fused.bias", "axis": 0, "start": 16, "length": 8},
    {"path": "linear.weight", "axis": 1, "start": 2, "length": 5},
    {"path": "linear.weight", "transposed": True},
    {"path": "fused.weight", "axis": 0, "start": 16, "length": 8, "transposed": True},
    {"path": "conv2d.weight", "axis": 1, "start": 1, "length": 2},
    {"path": "conv2d.weight", "axis": 3, "start": 0, "length": 1},
    {"path": "conv1d.weight", "transposed": True},
    {"path": "embedding.weight", "axis": 0, "start": 3, "length": 4},
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def grid(shape: tuple[int, ...], seed: int) -> Tensor:
    """Multiples of 2⁻¹⁶ below 2 in size: with strengths in quarters, sums with the zoo's weights are exact in fp32."""
    return torch.randint(-(2**17), 2**17, shape, generator=torch.Generator().manual_seed(seed)) / 2**16


def coarse(shape: tuple[int, ...], seed: int) -> Tensor:
    """Multiples of 2⁻⁶ below 1 in size: their products are exact too."""
    return torch.randint(-64, 64, shape, generator=torch.Generator().manual_seed(seed)) / 64


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def versions(model: nn.Module) -> dict[str, int]:
    return {name: parameter._version for name, parameter in model.named_parameters()}


def part(weight: Tensor, view: dict[str, Any]) -> Tensor:
    """What the view names, by indexing."""
    index = [slice(None)] * weight.ndim
    if "length" in view:
        index[view["axis"]] = slice(view["start"], view["start"] + view["length"])
    found = weight[tuple(index)]
    return found.transpose(-1, -2) if view.get("transposed") else found


def exact(base: Tensor, *terms: tuple[float, Tensor]) -> Tensor:
    """Promise 1 in float64: cast(base + Σ strength · ΔW)."""
    return (base.double() + sum(strength * delta.double() for strength, delta in terms)).to(base.dtype)


# ---- 1: the sum, in fp32, rounded once


@each_dtype
@pytest.mark.parametrize("path", PATHS)
def test_a_weight_becomes_the_sum_rounded_once(zoo: Zoo, patch: MakePatch, dtype: torch.dtype, path: str) -> None:
    model = zoo(dtype)
    base = model.get_parameter(path).detach().clone()
    terms = [(strength, grid(tuple(base.shape), seed)) for seed, strength in enumerate((0.75, -1.25, 0.5, 1.0))]
    plan = make_plan(patch(path, delta, strength=s, source=str(i)) for i, (s, delta) in enumerate(terms))
    before = weights(model)
    assert Engine(model).apply(plan) == 1
    assert bits(model.get_parameter(path)) == bits(exact(base, *terms))
    after = weights(model)
    assert [name for name in before if before[name] != after[name]] == [path]


@each_dtype
@pytest.mark.parametrize("path", ["linear.weight", "conv2d.weight", "conv3d.weight", "embedding.weight"])
def test_the_low_rank_form_gives_the_same_sum(zoo: Zoo, patch: MakePatch, dtype: torch.dtype, path: str) -> None:
    model = zoo(dtype)
    base = model.get_parameter(path).detach().clone()
    up, down = coarse((base.shape[0], 3), 1), coarse((3, base[0].numel()), 2)
    whole = grid(tuple(base.shape), 3)
    product = (up.double() @ down.double()).reshape(base.shape)
    Engine(model).apply(make_plan([patch(path, up=up, down=down, strength=0.75), patch(path, whole, source="b")]))
    assert bits(model.get_parameter(path)) == bits(exact(base, (0.75, product), (1.0, whole)))


@each_dtype
@pytest.mark.parametrize("low_rank", [False, True], ids=["whole", "low rank"])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: "-".join(map(str, view.values())))
def test_a_view_changes_its_part_and_nothing_else(
    zoo: Zoo, patch: MakePatch, dtype: torch.dtype, view: dict[str, Any], low_rank: bool
) -> None:
    model = zoo(dtype)
    weight = model.get_parameter(view["path"])
    base = weight.detach().clone()
    shape = part(base, view).shape
    if low_rank and len(shape) > 1:
        up, down = coarse((shape[0], 2), 1), coarse((2, shape[1:].numel()), 2)
        delta, item = (up.double() @ down.double()).reshape(shape), patch(**view, up=up, down=down, strength=0.5)
    else:
        delta = grid(tuple(shape), 1)
        item = patch(**view, whole=delta, strength=0.5)
    Engine(model).apply(make_plan([item]))
    expected = base.clone()
    part(expected, view).copy_(exact(part(base, view), (0.5, delta)))
    assert bits(weight) == bits(expected)


@each_dtype
def test_q_k_and_v_of_a_fused_projection_are_three_adapters_side_by_side(
    zoo: Zoo, patch: MakePatch, dtype: torch.dtype
) -> None:
    model = zoo(dtype)
    base = model.get_parameter("fused.weight").detach().clone()
    deltas = [grid((8, 12), seed) for seed in range(3)]
    slices = [{"axis": 0, "start": 8 * i, "length": 8} for i in range(3)]
    rows = [patch("fused.weight", delta, **place) for delta, place in zip(deltas, slices, strict=True)]
    whole = grid((24, 12), 9)
    Engine(model).apply(make_plan([*rows, patch("fused.weight", whole, strength=0.25, source="b")]))
    expected = exact(base, (1.0, torch.cat(deltas)), (0.25, whole))
    assert bits(model.get_parameter("fused.weight")) == bits(expected)


def random_patches(patch: MakePatch, path: str, shape: tuple[int, ...]) -> list[Patch]:
    """Four ΔW of very different sizes, whose sum in fp32 depends on the order in which it is made."""
    generator = torch.Generator().manual_seed(5)
    deltas = [torch.randn(shape, generator=generator) * scale for scale in (1e-3, 1.0, 30.0, 1e-2)]
    return [patch(path, delta, strength=0.1 * i + 0.1, source=f"s{i}") for i, delta in enumerate(deltas)]


@each_dtype
def test_several_threads_make_the_same_sum_and_take_it_off(patch: MakePatch, dtype: torch.dtype) -> None:
    """Several tiles, each large enough for torch to share it out."""
    model = nn.Sequential(nn.Conv2d(512, 512, 3, bias=False))
    base = grid((512, 512, 3, 3), 0).to(dtype)
    model[0].weight = nn.Parameter(base.clone(), requires_grad=False)
    up, down, whole = coarse((512, 3), 1), coarse((3, 512 * 9), 2), grid(tuple(base.shape), 3)
    plan = make_plan([patch("0.weight", up=up, down=down, strength=0.75), patch("0.weight", whole, source="b")])
    product = (up.double() @ down.double()).reshape(base.shape)
    engine = Engine(model)
    try:
        torch.set_num_threads(3)
        engine.apply(plan)
        assert bits(model[0].weight) == bits(exact(base, (0.75, product), (1.0, whole)))
        engine.restore()
    finally:
        torch.set_num_threads(1)
    assert bits(model[0].weight) == bits(base)


@each_dtype
def test_the_order_of_tags_changes_no_bit(zoo: Zoo, patch: MakePatch, dtype: torch.dtype) -> None:
    patches = random_patches(patch, "conv2d.weight", (8, 4, 3, 3))
    results = set()
    for order in itertools.permutations(patches):
        model = zoo(dtype)
        Engine(model).apply(make_plan(order))
        results.add(bits(model.get_parameter("conv2d.weight")))
    assert len(results) == 1


@each_dtype
def test_a_sum_of_random_numbers_is_the_nearest_that_fp32_gives(zoo: Zoo, patch: MakePatch, dtype: torch.dtype) -> None:
    model = zoo(dtype)
    base = model.get_parameter("conv2d.weight").detach().clone()
    patches = random_patches(patch, "conv2d.weight", (8, 4, 3, 3))
    Engine(model).apply(make_plan(patches))
    expected = base.double() + sum(p.strength * p.delta.delta(base.float()).double() for p in patches)
    error = (model.get_parameter("conv2d.weight").detach().double() - expected).abs()
    one_rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    sums_in_fp32 = 4 * torch.finfo(torch.float32).eps * 32
    assert bool((error <= one_rounding + sums_in_fp32).all())


@each_dtype
def test_the_same_adapter_twice_adds(zoo: Zoo, patch: MakePatch, dtype: torch.dtype) -> None:
    delta = grid((8, 12), 1)
    model = zoo(dtype)
    base = model.get_parameter("linear.weight").detach().clone()
    engine = Engine(model)
    engine.apply(make_plan([patch("linear.weight", delta, strength=s) for s in (0.5, 0.25, 0.5)]))
    assert bits(model.get_parameter("linear.weight")) == bits(exact(base, (1.25, delta)))
    assert engine.apply(make_plan([patch("linear.weight", delta, strength=1.25)])) == 0


def test_equal_strengths_in_any_order_are_the_same_plan(zoo: Zoo, patch: MakePatch) -> None:
    delta = grid((8, 12), 1)
    model = zoo()
    engine = Engine(model)
    written = [
        engine.apply(make_plan([patch("linear.weight", delta, strength=s) for s in order]))
        for order in itertools.permutations((0.1, 0.2, 0.3))
    ]
    assert written == [1, 0, 0, 0, 0, 0]


def test_every_delta_is_asked_with_the_pristine_weight_in_fp32(zoo: Zoo) -> None:
    seen: list[Tensor] = []

    class Doubling(Whole):
        """ΔW = W, as a multiplicative family would have it."""

        def delta(self, base: Tensor) -> Tensor:
            seen.append(base.clone())
            return base.clone()

    model = zoo(torch.float16)
    base = model.get_parameter("linear.weight").detach().clone()
    engine = Engine(model)
    for count in (1, 3, 2):
        engine.apply(make_plan(Patch(str(i), View("linear.weight"), 1.0, Doubling()) for i in range(count)))
        assert bits(model.get_parameter("linear.weight")) == bits(base * (count + 1))
    assert all(bits(tensor) == bits(base.float()) for tensor in seen)


# ---- 2: the base comes back bit for bit


def strange(model: nn.Module) -> None:
    """Values that subtraction, or a comparison of numbers, would not bring back."""
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.tensor([-0.0, float("nan"), float("inf"), float("-inf"), torch.finfo(parameter.dtype).tiny])
            parameter.flatten()[: len(values)].copy_(values)


@each_dtype
def test_removal_gives_every_bit_back(zoo: Zoo, patch: MakePatch, dtype: torch.dtype) -> None:
    model = zoo(dtype)
    strange(model)
    before = weights(model)
    engine = Engine(model)
    sets: list[Plan] = []
    for seed in range(4):
        patches = [patch(path, grid(tuple(model.get_parameter(path).shape), seed), source=str(seed)) for path in PATHS]
        sets.append(make_plan(patches[seed:]))
    for wanted in (*sets, *reversed(sets)):
        engine.apply(wanted)
    assert engine.active
    assert engine.base_bytes > 0
    engine.restore()
    assert weights(model) == before
    engine.apply(sets[0])
    engine.apply({})
    assert weights(model) == before
    assert not engine.active
    assert engine.base_bytes > 0  # for the next adapter
    engine.restore()
    assert engine.base_bytes == 0


@each_dtype
def test_a_set_less_one_adapter_is_as_if_it_had_never_been_there(
    zoo: Zoo, patch: MakePatch, dtype: torch.dtype
) -> None:
    model = zoo(dtype)
    engine = Engine(model)
    patches = random_patches(patch, "conv2d.weight", (8, 4, 3, 3))
    engine.apply(make_plan(patches[:2]))
    alone = weights(model)
    engine.apply(make_plan(patches))
    assert weights(model) != alone
    engine.apply(make_plan(patches[:2]))
    assert weights(model) == alone


def test_strength_0_is_the_base_and_writes_nothing(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    before, counted = weights(model), versions(model)
    engine = Engine(model)
    nothing = torch.full((8, 12), float("nan"))
    assert engine.apply(make_plan([patch("linear.weight", nothing, strength=0.0)])) == 0
    cancelled = [patch("linear.weight", nothing, strength=s) for s in (0.1, 0.2, -0.2, -0.1)]
    assert engine.apply(make_plan(cancelled)) == 0
    assert (weights(model), versions(model)) == (before, counted)
    engine.apply(make_plan([patch("linear.weight", grid((8, 12), 1))]))
    assert engine.apply(make_plan([patch("linear.weight", grid((8, 12), 1), strength=0.0)])) == 1
    assert weights(model) == before


# ---- 4: nothing twice, nothing else, no hooks


def test_the_same_set_again_writes_nothing(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    engine = Engine(model)

    def wanted() -> Plan:
        return make_plan(patch(path, grid(tuple(model.get_parameter(path).shape), 1)) for path in PATHS)

    assert engine.apply(wanted()) == len(PATHS)
    counted = versions(model)
    assert engine.apply(wanted()) == 0
    assert versions(model) == counted
    engine.restore()
    counted = versions(model)
    engine.restore()
    assert engine.apply({}) == 0
    assert versions(model) == counted


def test_a_changed_set_writes_the_weights_that_change_and_no_other(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    engine = Engine(model)

    def plan(**strengths: float) -> Plan:
        paths = {f"{name}.weight": strength for name, strength in strengths.items()}
        return make_plan(
            patch(path, grid(tuple(model.get_parameter(path).shape), 1), strength=s) for path, s in paths.items()
        )

    engine.apply(plan(linear=1, conv1d=1, conv2d=1))
    before = versions(model)
    assert engine.apply(plan(linear=1, conv2d=0.5, fused=1)) == 3
    after = versions(model)
    touched = {name for name, count in before.items() if after[name] != count}
    assert touched == {"conv1d.weight", "conv2d.weight", "fused.weight"}


def test_a_change_of_one_of_two_adapters_on_a_weight_is_seen(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    base = model.get_parameter("linear.weight").detach().clone()
    first, second = grid((8, 12), 1), grid((8, 12), 2)
    engine = Engine(model)
    engine.apply(make_plan([patch("linear.weight", first, source="1"), patch("linear.weight", second, source="2")]))
    for strength in (0.5, 0.25):
        changed = patch("linear.weight", second, source="2", strength=strength)
        mixed = [patch("linear.weight", first, source="1"), changed]
        assert engine.apply(make_plan(mixed)) == 1
        expected = exact(base, (1.0, first), (strength, second))
        assert bits(model.get_parameter("linear.weight")) == bits(expected)


def traces(model: nn.Module) -> dict[str, object]:
    """All that a hook, a wrapped forward or a new attribute would change."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__} | {Tensor, nn.Parameter}
    found: dict[str, object] = {f"{cls}": {name: id(value) for name, value in vars(cls).items()} for cls in classes}
    for name, module in model.named_modules():
        found[name] = {
            key: dict(value) if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
            if key not in ("_parameters", "_modules")
        }
        found[f"{name}: parameters"] = {key: id(value) for key, value in module._parameters.items()}
    for name, parameter in model.named_parameters():
        found[f"{name}: own"] = (dict(vars(parameter)), parameter._backward_hooks, parameter.requires_grad)
    hooks = vars(torch.nn.modules.module)
    found["global"] = {key: dict(value) for key, value in hooks.items() if key.startswith("_global_") and value}
    return found


def test_no_hook_and_no_attribute_is_left_on_a_module_or_class(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    before = traces(model)
    engine = Engine(model)
    engine.apply(make_plan(patch(path, grid(tuple(model.get_parameter(path).shape), 1)) for path in PATHS))
    assert traces(model) == before
    engine.restore()
    assert traces(model) == before


# ---- 5: in place, and the host's own changes of the model stay its own


@each_dtype
def test_weights_keep_their_place_in_memory(zoo: Zoo, patch: MakePatch, dtype: torch.dtype) -> None:
    model = zoo(dtype)
    objects = dict(model.named_parameters())
    places = {name: parameter.data_ptr() for name, parameter in objects.items()}
    engine = Engine(model)
    engine.apply(make_plan(patch(path, grid(tuple(model.get_parameter(path).shape), 1)) for path in PATHS))
    for _ in range(2):
        assert all(parameter is objects[name] for name, parameter in model.named_parameters())
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
        engine.restore()


def test_a_layer_computes_with_the_new_weight_at_once(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    x = torch.ones(1, 12)
    before = model.linear(x)
    delta = grid((8, 12), 1)
    engine = Engine(model)
    engine.apply(make_plan([patch("linear.weight", delta)]))
    assert torch.allclose(model.linear(x), before + delta.sum(1), atol=1e-5)
    engine.restore()
    assert torch.equal(model.linear(x), before)


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_change_of_dtype_between_two_sets(zoo: Zoo, patch: MakePatch, other: torch.dtype) -> None:
    model = zoo()
    base = model.get_parameter("linear.weight").detach().clone()
    first, second = grid((8, 12), 1), grid((8, 12), 2)
    engine = Engine(model)
    engine.apply(make_plan([patch("linear.weight", first)]))
    model.to(other)
    assert bits(model.get_parameter("linear.weight")) == bits(exact(base, (1.0, first)).to(other))
    assert engine.apply(make_plan([patch("linear.weight", first)])) == 0
    engine.apply(make_plan([patch("linear.weight", first), patch("linear.weight", second, source="b")]))
    # exact for fp64 too: the numbers are chosen so
    assert bits(model.get_parameter("linear.weight")) == bits(exact(base, (1.0, first), (1.0, second)).to(other))
    engine.restore()
    assert bits(model.get_parameter("linear.weight")) == bits(base.to(other))


def test_a_change_of_memory_format_between_two_sets(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    base = model.get_parameter("conv2d.weight").detach().clone()
    delta = grid((8, 4, 3, 3), 1)
    engine = Engine(model)
    engine.apply(make_plan([patch("conv2d.weight", delta)]))
    model.conv2d.to(memory_format=torch.channels_last)
    assert not model.get_parameter("conv2d.weight").is_contiguous()
    up, down = coarse((8, 2), 1), coarse((2, 36), 2)
    engine.apply(make_plan([patch("conv2d.weight", up=up, down=down, source="b")]))
    product = (up @ down).reshape(8, 4, 3, 3)
    assert bits(model.get_parameter("conv2d.weight")) == bits(exact(base, (1.0, product)))
    assert not model.get_parameter("conv2d.weight").is_contiguous()
    engine.restore()
    assert bits(model.get_parameter("conv2d.weight")) == bits(base)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("then", ["restore", "same set", "other set"])
def test_a_checkpoint_loaded_into_a_patched_model_is_the_new_base(
    zoo: Zoo, patch: MakePatch, assign: bool, then: str
) -> None:
    model, new = zoo(seed=0), zoo(seed=1)
    engine = Engine(model)
    first = {path: grid(tuple(model.get_parameter(path).shape), 1) for path in PATHS}
    engine.apply(make_plan(patch(path, delta) for path, delta in first.items()))
    model.load_state_dict({name: value.clone() for name, value in new.state_dict().items()}, assign=assign)
    if then == "restore":
        engine.restore()
        assert weights(model) == weights(new)
    wanted = first if then == "same set" else {"linear.weight": grid((8, 12), 2)}
    engine.apply(make_plan(patch(path, delta, source=then) for path, delta in wanted.items()))
    for path, parameter in model.named_parameters():
        base = new.get_parameter(path).detach()
        assert bits(parameter) == bits(exact(base, (1.0, wanted[path])) if path in wanted else base), path
    engine.restore()
    assert weights(model) == weights(new)


def test_another_tensor_in_a_weight_s_place_is_a_new_base(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    engine = Engine(model)
    engine.apply(make_plan([patch("linear.weight", grid((8, 12), 1))]))
    other = nn.Parameter(torch.full((8, 12), 7.0))
    with torch.no_grad():
        while other._version < model.linear.weight._version:
            other.add_(0)  # written as often as the old one: the count alone does not tell them apart
    model.linear.weight = other
    engine.restore()
    assert bits(other) == bits(torch.full((8, 12), 7.0))


def test_a_checkpoint_with_some_of_the_weights_replaces_those_only(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    before = weights(model)
    engine = Engine(model)
    engine.apply(make_plan(patch(path, grid(tuple(model.get_parameter(path).shape), 1)) for path in PATHS))
    loaded = {"linear.weight": torch.full((8, 12), 7.0)}
    model.load_state_dict(loaded, strict=False)
    engine.restore()
    assert weights(model) == {**before, "linear.weight": bits(loaded["linear.weight"])}


def test_weights_made_in_inference_mode(patch: MakePatch) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(12, 8))
        model[0].weight.copy_(coarse((8, 12), 4))
    assert model[0].weight.is_inference()
    before, base = weights(model), model[0].weight.clone()
    delta = grid((8, 12), 1)
    engine = Engine(model)
    engine.apply(make_plan([patch("0.weight", delta)]))
    assert bits(model[0].weight) == bits(exact(base, (1.0, delta)))
    assert engine.apply(make_plan([patch("0.weight", delta)])) == 0
    engine.restore()
    assert weights(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_made_in_inference_mode_beside_others(dtype: torch.dtype, patch: MakePatch, hands: None) -> None:
    with torch.inference_mode():
        early = nn.Linear(12, 8, dtype=dtype)
    model = nn.Sequential(early, nn.Linear(12, 8, dtype=dtype), nn.Linear(12, 8, dtype=dtype))
    with torch.inference_mode():
        model.append(nn.Linear(12, 8, dtype=dtype))
    before = weights(model)
    up, down = coarse((8, 2), 1), coarse((2, 12), 2)
    engine = Engine(model)
    for strength in (1.0, 0.5):
        plan = make_plan([patch(f"{n}.weight", up=up, down=down, strength=strength) for n in range(4)])
        assert engine.apply(plan) == 4
    engine.restore()
    assert weights(model) == before


def test_a_checkpoint_loaded_into_weights_made_in_inference_mode(patch: MakePatch) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(12, 8))
    engine = Engine(model)
    engine.apply(make_plan([patch("0.weight", grid((8, 12), 1))]))
    with torch.inference_mode():
        model[0].weight.copy_(torch.full((8, 12), 7.0))
    engine.restore()
    assert bits(model[0].weight) == bits(torch.full((8, 12), 7.0))


@pytest.mark.skipif(
    not hasattr(torch.__future__, "set_swap_module_params_on_conversion"), reason="this torch never does"
)
def test_a_move_that_swaps_tensors(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    base = model.get_parameter("linear.weight").detach().clone()
    engine = Engine(model)
    engine.apply(make_plan([patch("linear.weight", grid((8, 12), 1))]))
    torch.__future__.set_swap_module_params_on_conversion(True)  # what tensor subclasses (torchao) always do
    try:
        model.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    engine.restore()
    assert bits(model.get_parameter("linear.weight")) == bits(base.half())


def test_a_weight_that_two_modules_share(patch: MakePatch) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 12), "head": nn.Linear(12, 8)})
    model["head"].weight = model["embedding"].weight
    before = weights(model)
    base = model["head"].weight.detach().clone()
    deltas = grid((8, 12), 1), grid((8, 12), 2)
    engine = Engine(model)
    engine.apply(make_plan([patch("embedding.weight", deltas[0]), patch("head.weight", deltas[1])]))
    assert torch.allclose(model["head"].weight, base + deltas[0] + deltas[1], atol=1e-5)
    engine.restore()
    assert weights(model) == before


def test_sets_applied_inside_and_outside_inference_mode(zoo: Zoo, patch: MakePatch) -> None:
    model = zoo()
    before = weights(model)
    engine = Engine(model)
    with torch.inference_mode():
        engine.apply(make_plan([patch("linear.weight", grid((8, 12), 1))]))
    engine.apply(make_plan([patch("linear.weight", grid((8, 12), 2), source="b")]))
    with torch.inference_mode():
        assert engine.apply(make_plan([patch("linear.weight", grid((8, 12), 2), source="b")])) == 0
        engine.restore()
    assert weights(model) == before
    model.linear(torch.ones(1, 12)).sum().backward()  # still a weight like any other


# ---- several models, several threads


def test_two_models_alive_know_nothing_of_each_other(zoo: Zoo, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    one, two = zoo(seed=1), zoo(seed=2)
    before = weights(one), weights(two)
    lora = {"lora_up.weight": coarse((8, 2), 1), "lora_down.weight": coarse((2, 12), 2)}
    adapter = lib_locon.load(write_adapter(tmp_path / "a.safetensors", {"linear": lora}))
    sessions = lib_locon.Session(one), lib_locon.Session(two)
    bases = [model.linear.weight.detach().clone() for model in (one, two)]
    for session, strength in zip(sessions, (1.0, 0.5), strict=True):
        session.apply([lib_locon.Use(adapter, lib_locon.Strengths.both(strength))])
    product = lora["lora_up.weight"] @ lora["lora_down.weight"]
    assert bits(one.linear.weight) == bits(exact(bases[0], (1.0, product)))
    assert bits(two.linear.weight) == bits(exact(bases[1], (0.5, product)))
    sessions[0].restore()
    assert weights(one) == before[0]
    assert bits(two.linear.weight) == bits(exact(bases[1], (0.5, product)))
    sessions[1].restore()
    assert weights(two) == before[1]


def test_concurrent_applies_never_interleave(zoo: Zoo) -> None:
    log: list[int] = []

    class Slow(Whole):
        def __init__(self, who: int) -> None:
            self.who = who

        def delta(self, base: Tensor) -> Tensor:
            log.append(self.who)
            time.sleep(0.001)
            return torch.full_like(base, float(self.who))

    model = zoo()
    before = weights(model)
    bases = {path: model.get_parameter(path).detach().clone() for path in PATHS}
    engine = Engine(model)

    def plan(who: int) -> Plan:
        return make_plan(Patch(str(who), View(path), 1.0, Slow(who)) for path in PATHS)

    threads = [threading.Thread(target=engine.apply, args=(plan(who),)) for who in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    runs = [who for who, _ in itertools.groupby(log)]
    assert sorted(runs) == [1, 2, 3, 4, 5, 6]
    last = log[-1]
    for path, base in bases.items():
        assert bits(model.get_parameter(path)) == bits(exact(base, (1.0, torch.full_like(base, last)))), path
    engine.restore()
    assert weights(model) == before
