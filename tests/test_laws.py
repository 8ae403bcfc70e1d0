"""Laws that hold for every adapter, from file to weight: equivalences between families, linearity, and the way back.

No expected value comes from lib_locon: each law sets two ways of saying the same against each other, or a formula of
one line in float64 against the weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lib_locon
from lib_locon import Session, Strengths, Use
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import make_plan

if TYPE_CHECKING:
    from tests.conftest import MakePatch, WriteAdapter, Zoo

Group = dict[str, Tensor]
quick = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
EPS = torch.finfo(torch.float32).eps


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape)))


def lora(out: int, n: int, *, rank: int = 3, seed: int = 0, alpha: float | None = None) -> Group:
    group = {"lora_up.weight": rand(out, rank, seed=seed), "lora_down.weight": rand(rank, n, seed=seed + 1)}
    return group if alpha is None else {**group, "alpha": torch.tensor(alpha)}


ADAPTERS: dict[str, tuple[str, Group]] = {
    "LoRA": ("linear", lora(8, 12, alpha=2.0)),
    "LoRA on an embedding": ("embedding", lora(10, 8, alpha=6.0)),
    "LoCon": ("conv2d", {"lora_up.weight": rand(8, 3, 1, 1), "lora_down.weight": rand(3, 4, 3, 3)}),
    "LoCon 3-D": ("conv3d", {"lora_up.weight": rand(6, 2, 1, 1, 1), "lora_down.weight": rand(2, 4, 2, 2, 2)}),
    "Tucker": (
        "conv2d",
        {
            "lora_up.weight": rand(8, 3, 1, 1),
            "lora_down.weight": rand(3, 4, 1, 1),
            "lora_mid.weight": rand(3, 3, 3, 3),
            "alpha": torch.tensor(1.5),
        },
    ),
    "LoHa": (
        "linear",
        {
            "hada_w1_a": rand(8, 2),
            "hada_w1_b": rand(2, 12),
            "hada_w2_a": rand(8, 2, seed=1),
            "hada_w2_b": rand(2, 12, seed=1),
            "alpha": torch.tensor(1.0),
        },
    ),
    "LoHa Tucker": (
        "conv2d",
        {
            "hada_t1": rand(2, 2, 3, 3),
            "hada_w1_a": rand(2, 8),
            "hada_w1_b": rand(2, 4),
            "hada_t2": rand(2, 2, 3, 3, seed=1),
            "hada_w2_a": rand(2, 8, seed=1),
            "hada_w2_b": rand(2, 4, seed=1),
        },
    ),
    "LoKr": ("linear", {"lokr_w1": rand(2, 3), "lokr_w2": rand(4, 4)}),
    "LoKr, both factored": (
        "conv2d",
        {
            "lokr_w1_a": rand(2, 2),
            "lokr_w1_b": rand(2, 2, seed=1),
            "lokr_w2_a": rand(4, 2),
            "lokr_w2_b": rand(2, 2 * 9),
            "alpha": torch.tensor(3.0),
        },
    ),
    "LoKr Tucker": (
        "conv2d",
        {"lokr_w1": rand(2, 2), "lokr_t2": rand(2, 2, 3, 3), "lokr_w2_a": rand(2, 4), "lokr_w2_b": rand(2, 2)},
    ),
}
each_adapter = pytest.mark.parametrize(("module", "group"), ADAPTERS.values(), ids=ADAPTERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


class Bench:
    """A model, a session, and a folder to write adapters into."""

    def __init__(self, model: nn.Module, write: WriteAdapter, folder: Path) -> None:
        self.model, self.write, self.folder = model, write, folder
        self.session = Session(model)
        self.numbers = itertools.count()

    def adapter(self, modules: dict[str, Group], prefix: str = "lora_unet_") -> lib_locon.Adapter:
        path = self.folder / f"{next(self.numbers)}.safetensors"
        return lib_locon.load(self.write(path, modules, None, prefix))

    def weight(self, module: str) -> Tensor:
        return self.model.get_parameter(f"{module}.weight").detach().clone()

    @contextmanager
    def holding(self, *uses: Use) -> Iterator[None]:
        report = self.session.apply(uses)
        assert all(adapter.used == adapter.total and not adapter.unmatched for adapter in report.adapters), report
        yield
        self.session.restore()

    def patched(self, module: str, group: Group, strength: float = 1.0, dyn: int | None = None) -> Tensor:
        """The weight of `module` with this adapter."""
        use = Use(self.adapter({module: group}), Strengths.both(strength), dyn)
        with self.holding(use):
            return self.weight(module)

    def delta(self, module: str, group: Group, strength: float = 1.0, dyn: int | None = None) -> Tensor:
        """W′ − W, in float64; W is 0, so that nothing is rounded away."""
        with torch.no_grad():
            self.model.get_parameter(f"{module}.weight").zero_()
        return self.patched(module, group, strength, dyn).double()


@pytest.fixture
def bench(zoo: Zoo, write_adapter: WriteAdapter, tmp_path: Path) -> Bench:
    return Bench(zoo(), write_adapter, tmp_path)


def close(a: Tensor, b: Tensor, scale: Tensor | None = None) -> bool:
    """Equal up to a few roundings of fp32 of the numbers that were added up."""
    size = max(float(b.abs().max()), 1.0 if scale is None else float(scale.abs().max()))
    return a.shape == b.shape and float((a.double() - b.double()).abs().max()) <= 16 * EPS * size


# ---- strength


@each_adapter
@quick
@given(strength=st.floats(-4, 4))
def test_strength_is_linear(bench: Bench, module: str, group: Group, strength: float) -> None:
    base, full = bench.weight(module).double(), bench.patched(module, group).double()
    assert not torch.equal(base, full)
    weight = bench.patched(module, group, strength).double()
    tolerance = 8 * EPS * (base.abs() + (1 + abs(strength)) * (full - base).abs() + float((full - base).abs().max()))
    assert bool(((weight - (base + strength * (full - base))).abs() <= tolerance).all())


@each_adapter
def test_opposite_strengths_are_opposite(bench: Bench, module: str, group: Group) -> None:
    assert torch.equal(bench.delta(module, group, -0.75), -bench.delta(module, group, 0.75))


# ---- the way back, and the order


@each_dtype
@each_adapter
def test_with_a_second_adapter_and_without_it_again(
    zoo: Zoo, write_adapter: WriteAdapter, tmp_path: Path, dtype: torch.dtype, module: str, group: Group
) -> None:
    bench = Bench(zoo(dtype), write_adapter, tmp_path)
    shape = bench.weight(module).shape
    other = Use(bench.adapter({module: lora(shape[0], shape[1:].numel(), seed=7)}), Strengths.both(0.3))
    mine = Use(bench.adapter({module: group}), Strengths.both(0.7))
    base = bench.weight(module)
    states = []
    for uses in ([mine], [mine, other], [other], [other, mine], [mine]):
        bench.session.apply(uses)
        states.append(bench.weight(module))
    bench.session.apply([])
    assert torch.equal(states[0], states[4])
    assert torch.equal(states[1], states[3])
    assert not torch.equal(states[0], states[1])
    assert torch.equal(bench.weight(module), base)


@quick
@given(order=st.permutations(range(4)), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_order_of_files_changes_no_bit(
    zoo: Zoo, write_adapter: WriteAdapter, tmp_path: Path, order: list[int], dtype: torch.dtype
) -> None:
    bench = Bench(zoo(dtype), write_adapter, tmp_path)
    uses = [
        Use(bench.adapter({"linear": lora(8, 12, seed=i)}), Strengths.both(s)) for i, s in enumerate((1, 0.1, -2, 3))
    ]
    bench.session.apply(uses)
    straight = bench.weight("linear")
    bench.session.restore()
    bench.session.apply([uses[i] for i in order])
    assert torch.equal(bench.weight("linear"), straight)


@each_adapter
def test_the_same_file_twice_is_the_file_at_the_sum_of_strengths(bench: Bench, module: str, group: Group) -> None:
    once = bench.patched(module, group, 0.75)
    adapter = bench.adapter({module: group})
    with bench.holding(Use(adapter, Strengths.both(0.5)), Use(adapter, Strengths.both(0.25))):
        assert torch.equal(bench.weight(module), once)


# ---- zeros and ones


@each_adapter
def test_an_adapter_of_zeros_changes_nothing(bench: Bench, module: str, group: Group) -> None:
    zeros = {suffix: tensor if suffix == "alpha" else torch.zeros_like(tensor) for suffix, tensor in group.items()}
    base = bench.weight(module)
    assert torch.equal(bench.patched(module, zeros), base)


@each_adapter
def test_a_factor_of_zeros_is_enough(bench: Bench, module: str, group: Group) -> None:
    for suffix in group.keys() - {"alpha"}:
        base = bench.weight(module)
        assert torch.equal(bench.patched(module, {**group, suffix: torch.zeros_like(group[suffix])}), base), suffix


def test_loha_of_ones_is_its_ranks_multiplied(bench: Bench) -> None:
    ones = {
        "hada_w1_a": torch.ones(8, 2),
        "hada_w1_b": torch.ones(2, 12),
        "hada_w2_a": torch.ones(8, 2),
        "hada_w2_b": torch.ones(2, 12),
    }
    assert torch.equal(bench.delta("linear", ones), torch.full((8, 12), 4.0).double())
    assert torch.equal(bench.delta("linear", {**ones, "alpha": torch.tensor(1.0)}), torch.full((8, 12), 2.0).double())


def test_loha_with_a_half_of_ones_is_the_lora_of_the_other_half(bench: Bench) -> None:
    plain = lora(8, 12, rank=1)
    half = {"hada_w1_a": plain["lora_up.weight"], "hada_w1_b": plain["lora_down.weight"]}
    ones = {"hada_w2_a": torch.ones(8, 1), "hada_w2_b": torch.ones(1, 12)}
    assert close(bench.delta("linear", {**half, **ones}), bench.delta("linear", plain))


# ---- one family as another


def test_tucker_with_an_identity_core_is_plain_lora(bench: Bench) -> None:
    up, down = rand(8, 3, 1, 1), rand(3, 4, 1, 1)
    core = torch.eye(3).reshape(3, 3, 1, 1)
    plain = bench.delta("conv1x1", {"lora_up.weight": up, "lora_down.weight": down})
    assert close(plain, torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())[..., None, None])
    tucker = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": core}
    assert close(bench.delta("conv1x1", tucker), plain)
    # on a wider kernel the identity at one tap puts the 1×1 change at that tap, and nothing elsewhere
    wide = torch.zeros(3, 3, 3, 3)
    wide[:, :, 0, 2] = torch.eye(3)
    placed = bench.delta("conv2d", {**tucker, "lora_mid.weight": wide})
    assert close(placed[:, :, 0, 2], plain[:, :, 0, 0])
    assert int((placed != 0).sum()) == int((plain != 0).sum())


def test_tucker_is_the_locon_whose_down_is_core_times_down(bench: Bench) -> None:
    group = ADAPTERS["Tucker"][1]
    down = torch.einsum(
        "pqxy,qi->pixy", group["lora_mid.weight"].double(), group["lora_down.weight"][..., 0, 0].double()
    )
    plain = {"lora_up.weight": group["lora_up.weight"], "lora_down.weight": down.float(), "alpha": group["alpha"]}
    assert close(bench.delta("conv2d", group), bench.delta("conv2d", plain))


@pytest.mark.parametrize("half", ["w1", "w2"])
def test_lokr_with_a_factored_half_is_lokr_with_the_product(bench: Bench, half: str) -> None:
    whole = {"lokr_w1": rand(2, 3), "lokr_w2": rand(4, 4)}
    first, second = rand(whole[f"lokr_{half}"].shape[0], 2, seed=3), rand(2, whole[f"lokr_{half}"].shape[1], seed=4)
    whole[f"lokr_{half}"] = first @ second
    parts = {f"lokr_{half}_a": first, f"lokr_{half}_b": second}
    factored = {key: value for key, value in {**whole, **parts}.items() if key != f"lokr_{half}"}
    expected = torch.kron(whole["lokr_w1"].double(), whole["lokr_w2"].double())
    assert close(bench.delta("linear", factored), expected)
    assert close(bench.delta("linear", whole), expected)


def test_lokr_with_a_one_by_one_w1_is_its_w2(bench: Bench) -> None:
    w2 = rand(8, 12)
    assert torch.equal(bench.delta("linear", {"lokr_w1": torch.ones(1, 1), "lokr_w2": w2}), w2.double())


def test_lokr_with_an_identity_w1_repeats_w2_on_the_diagonal(bench: Bench) -> None:
    w2 = rand(4, 6)
    expected = torch.block_diag(w2, w2).double()
    assert torch.equal(bench.delta("linear", {"lokr_w1": torch.eye(2), "lokr_w2": w2}), expected)


# ---- rank and alpha


@pytest.mark.parametrize("name", ["LoRA", "Tucker", "LoHa", "LoKr, both factored"])
def test_alpha_is_divided_by_the_rank_and_0_or_none_means_the_rank(bench: Bench, name: str) -> None:
    module, group = ADAPTERS[name]
    rank = {"LoRA": 3, "Tucker": 3, "LoHa": 2, "LoKr, both factored": 2}[name]
    bare = {key: value for key, value in group.items() if key != "alpha"}
    full = bench.delta(module, bare)
    for alpha, factor in ((float(rank), 1), (4.0 * rank, 4), (rank / 2, 0.5), (0.0, 1)):
        scaled = bench.delta(module, {**bare, "alpha": torch.tensor(alpha)})
        assert close(scaled, factor * full), alpha
    assert torch.equal(bench.delta(module, {**bare, "alpha": torch.tensor([2.0 * rank])}), 2 * full)


def test_lokr_with_both_halves_whole_ignores_alpha(bench: Bench) -> None:
    module, group = ADAPTERS["LoKr"]
    for alpha in (1.0, 1e9, float("inf")):
        with_alpha = bench.delta(module, {**group, "alpha": torch.tensor(alpha)})
        assert torch.equal(with_alpha, bench.delta(module, group)), alpha


@quick
@given(first=st.integers(1, 4), second=st.integers(1, 4), seed=st.integers(0, 99))
def test_ranks_side_by_side_add(bench: Bench, first: int, second: int, seed: int) -> None:
    one, two = lora(8, 12, rank=first, seed=seed), lora(8, 12, rank=second, seed=seed + 7)
    both = {
        "lora_up.weight": torch.cat([one["lora_up.weight"], two["lora_up.weight"]], 1),
        "lora_down.weight": torch.cat([one["lora_down.weight"], two["lora_down.weight"]], 0),
    }
    parts = bench.delta("linear", one) + bench.delta("linear", two)
    size = both["lora_up.weight"].abs() @ both["lora_down.weight"].abs()
    assert close(bench.delta("linear", both), parts, size)


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_dyn_keeps_the_first_ranks_at_the_scale_of_the_whole(bench: Bench, rank: int) -> None:
    group = lora(8, 12, alpha=1.5)
    up, down = group["lora_up.weight"].double(), group["lora_down.weight"].double()
    expected = 0.5 * up[:, :rank] @ down[:rank]
    assert close(bench.delta("linear", group, dyn=rank), expected)


@quick
@given(power=st.integers(-8, 8))
def test_a_factor_may_move_from_up_to_down(bench: Bench, power: int) -> None:
    group = lora(8, 12)
    moved = {
        "lora_up.weight": group["lora_up.weight"] * 2.0**power,
        "lora_down.weight": group["lora_down.weight"] * 2.0**-power,
    }
    assert torch.equal(bench.patched("linear", moved), bench.patched("linear", group))


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 1), (8, 3, 1, 1)], ids=str)
def test_ones_at_the_end_of_a_shape_change_nothing(bench: Bench, shape: tuple[int, ...]) -> None:
    group = lora(8, 36)
    asked = {"lora_up.weight": group["lora_up.weight"].reshape(shape), "lora_down.weight": rand(3, 36, seed=1)}
    kernel = {**asked, "lora_down.weight": rand(3, 36, seed=1).reshape(3, 4, 3, 3)}
    expected = group["lora_up.weight"].double() @ rand(3, 36, seed=1).double()
    for variant in (asked, kernel):
        assert close(bench.delta("conv2d", variant), expected.reshape(8, 4, 3, 3))


@each_dtype
def test_a_file_of_half_precision_is_summed_in_fp32(bench: Bench, dtype: torch.dtype) -> None:
    group = {suffix: tensor.to(dtype) for suffix, tensor in lora(8, 12).items()}
    expected = group["lora_up.weight"].double() @ group["lora_down.weight"].double()
    assert close(bench.delta("linear", group), expected)


# ---- parts of a weight, parts of a file


def test_rows_of_a_fused_projection_are_one_adapter_with_stacked_rows(zoo: Zoo, patch: MakePatch) -> None:
    ups, down = [rand(8, 3, seed=i) for i in range(3)], rand(3, 12)
    in_parts, whole = zoo(), zoo()
    rows = [patch("fused.weight", up=up, down=down, axis=0, start=8 * i, length=8) for i, up in enumerate(ups)]
    Engine(in_parts).apply(make_plan(rows))
    Engine(whole).apply(make_plan([patch("fused.weight", up=torch.cat(ups), down=down)]))
    assert close(in_parts.fused.weight.detach(), whole.fused.weight.detach())
    assert not close(in_parts.fused.weight.detach(), zoo().fused.weight.detach())


def test_a_transposed_view_takes_the_adapter_the_other_way_round(zoo: Zoo, patch: MakePatch) -> None:
    up, down = rand(8, 3), rand(3, 12)
    straight, turned = zoo(), zoo()
    Engine(straight).apply(make_plan([patch("linear.weight", up=up, down=down)]))
    Engine(turned).apply(make_plan([patch("linear.weight", up=down.T, down=up.T, transposed=True)]))
    assert close(turned.linear.weight.detach(), straight.linear.weight.detach())


def test_one_file_for_two_modules_is_two_files_for_one_each(bench: Bench) -> None:
    groups = {"linear": lora(8, 12), "embedding": lora(10, 8)}
    with bench.holding(Use(bench.adapter(groups))):
        together = [bench.weight(module) for module in groups]
    with bench.holding(*(Use(bench.adapter({module: group})) for module, group in groups.items())):
        apart = [bench.weight(module) for module in groups]
    assert all(map(torch.equal, together, apart))


def test_two_families_on_one_module_add(bench: Bench) -> None:
    parts = ADAPTERS["LoRA"][1], ADAPTERS["LoKr"][1]
    expected = bench.delta("linear", parts[0]) + bench.delta("linear", parts[1])
    assert close(bench.delta("linear", {**parts[0], **parts[1]}), expected)


def test_one_module_under_two_names_adds(bench: Bench) -> None:
    parts = lora(8, 12), lora(8, 12, seed=5)
    expected = bench.delta("linear", parts[0]) + bench.delta("linear", parts[1])
    flat = {"lora_unet_linear": parts[0], "unet.linear": parts[1]}
    with bench.holding(Use(bench.adapter(flat, prefix=""))):
        assert close(bench.weight("linear").double(), expected)
