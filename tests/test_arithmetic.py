"""Products and sums: exact to fp32 whatever makes them, and buffers that are used again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lib_locon
from lib_locon import Session, Strengths, Use, arithmetic, products
from lib_locon.arithmetic import exact_arithmetic
from lib_locon.errors import PatchError
from lib_locon.families.build import Hints, build_layers
from lib_locon.families.dora import DoRALayer
from lib_locon.families.lora import LoRA
from lib_locon.patching.compute import patched
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import make_plan
from lib_locon.patching.workspace import TILE, Workspace
from lib_locon.products import add_product, multiplier, product_adder
from tests.conftest import TORCH, MakePatch, WriteAdapter, Zoo
from tests.test_faults import FaultAt, operations

CPU = torch.device("cpu")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[True, False], ids=["oneDNN", "without it"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Both ways to multiply: what torch brings differs from build to build."""
    if not request.param:
        monkeypatch.setattr(products, "_onednn", lambda: None)
    yield request.param


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 7), (320, 8, 2880), (77, 96, 1283)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("onednn")
def test_a_product_is_that_of_float64(size: tuple[int, int, int], transposed: bool) -> None:
    m, k, n = size
    left, right = rand(m, k), rand(k, n, seed=1)
    if transposed:
        left, right = left.T.contiguous().T, right.T.contiguous().T
    exact = left.double() @ right.double()
    assert torch.allclose(multiplier(right)(left).double(), exact, rtol=1e-5, atol=1e-5 * k**0.5)
    base, out, add = rand(m, n, seed=2), torch.empty(m, n), product_adder(right)
    for factor in (left, -left):
        assert add(base, factor, out) is out
        wanted = base.double() + factor.double() @ right.double()
        assert torch.allclose(out.double(), wanted, rtol=1e-5, atol=1e-5 * k**0.5)
    assert add(out, left, out) is out
    assert torch.allclose(out.double(), base.double(), rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("rows", [1, 32, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("onednn")
def test_a_product_added_by_tiles(dtype: torch.dtype, rows: int) -> None:
    left, right = rand(77, 96), rand(96, 1283, seed=1)
    base, out = rand(77, 1283, seed=2).to(dtype), torch.full((77, 1283), torch.nan, dtype=dtype)
    if products._onednn() is None:
        assert not add_product(out, base, left, right, rows)
        assert bool(out.isnan().all())
        return
    for factor, other in ((left, right), (left.T.contiguous().T, right.T.contiguous().T)):
        assert add_product(out.fill_(torch.nan), base, factor, other, rows * 1283)
        total = base.float() + torch.cat([multiplier(other)(part) for part in factor.split(rows)])
        assert torch.equal(out, total.to(dtype))  # in fp32, and rounded once


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (320, 8, 2880), (208, 96, 6160), (64, 192, 11520), (64, 193, 3104), (77, 32, 1280), (48, 4, 36), (4, 8, 2880),
        (16, 32, 16), (1, 96, 320), (5, 3, 7), (1280, 31, 16), (48, 171, 25), (48, 38, 8),
    ],
)  # fmt: skip
def test_the_same_bits_by_mkl_and_by_onednn(
    m: int, k: int, n: int, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing depends on the shape of a tile, the threads that are free, or what else is added to a weight."""
    if products._by_tiles() is None:
        pytest.skip("this torch compiles no loop")
    if TORCH < (2, 9) and not products._mkl_is_as_good():
        pytest.skip("an older oneDNN sums in an order that depends on the shape of a tile")
    left, right, base = rand(m, k), rand(k, n, seed=1), rand(m, n, seed=2).to(dtype)
    found, other = torch.full((2, m, n), torch.nan, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert add_product(found, base, left, right, TILE)
        product = multiplier(right)(left)
        added = product_adder(right)(base.float(), left, None)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(products, "_mkl_is_as_good", lambda: False)
    assert add_product(other, base, left, right, 20 * n)
    assert torch.equal(found, other)
    assert torch.equal((base.float() + product).to(dtype), other)
    assert torch.equal(added.to(dtype), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mkl_makes_every_tile_of_a_usual_weight(
    dtype: torch.dtype, patch: MakePatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products._by_tiles() is None:
        pytest.skip("this torch compiles no loop")
    monkeypatch.setattr(products, "_mkl_is_as_good", lambda: True)  # its bits may be others here: near is enough
    base, up, down = rand(640, 6160).to(dtype), rand(640, 4, seed=1), rand(4, 6160, seed=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        found, _ = patched(base, [patch("w", up=up, down=down)])
    names = {event.key for event in seen.key_averages()}
    assert any(name.startswith("aten::addmm") for name in names)
    assert not any("mkldnn" in name for name in names)
    wanted = base.double() + up.double() @ down.double()
    assert torch.allclose(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_mkl_is_done_without_where_its_bits_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def steady(left: Tensor, right: Tensor, *_: object) -> Tensor:
        return (left.double() @ right.double().T).float()  # to the same bits whatever the shape

    def by_shape(left: Tensor, right: Tensor, *_: object) -> Tensor:
        return steady(left, right) * (1 if len(left) > 1 else 1.001)

    def other(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return base + 1.001 * steady(left, right.T)

    is_as_good = products._mkl_is_as_good.__wrapped__
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(products, "_onednn", lambda: steady)
    monkeypatch.setattr(torch, "addmm", lambda base, left, right: base + steady(left, right.T))
    assert is_as_good() == torch.backends.mkl.is_available()
    monkeypatch.setattr(products, "_onednn", lambda: by_shape)
    assert not is_as_good()
    monkeypatch.setattr(products, "_onednn", lambda: steady)
    monkeypatch.setattr(torch, "addmm", other)
    assert not is_as_good()
    monkeypatch.setattr(torch, "addmm", lambda base, left, right: base + steady(left, right.T))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not is_as_good()


def test_what_fails_in_a_compiled_loop_is_told_in_one_line() -> None:
    if products._by_tiles() is None:
        pytest.skip("this torch compiles no loop")
    whole = torch.zeros(4, 8)
    with pytest.raises(RuntimeError) as told:  # it is another tensor's memory that is to be written: torch refuses
        add_product(torch.zeros(1, 1).expand(4, 8), whole, rand(4, 2), rand(2, 8), 2)
    assert "TorchScript" not in str(told.value)
    assert str(told.value).startswith("unsupported operation")


@pytest.mark.parametrize(
    ("out", "left", "right"), [((4, 8), (3, 2), (2, 8)), ((4, 8), (4, 2), (2, 7)), ((4, 8), (4, 3), (2, 8))]
)
def test_factors_that_do_not_fit_write_nothing(
    out: tuple[int, int], left: tuple[int, int], right: tuple[int, int]
) -> None:
    target = torch.full(out, 7.0)
    assert not add_product(target, torch.zeros(out), rand(*left), rand(*right), 2)
    assert bool((target == 7).all())


def test_an_interrupt_at_any_operation_is_one() -> None:
    out, base, left, right = torch.zeros(4, 8), torch.zeros(4, 8), rand(4, 2), rand(2, 8)

    def run() -> None:
        with torch.no_grad():
            if not add_product(out, base, left, right, 2):
                product_adder(right)(base, left, out)

    for number in range(operations(run)):
        with FaultAt((number,), KeyboardInterrupt, after=False), pytest.raises(KeyboardInterrupt):
            run()


def test_factors_of_too_few_rows_are_no_success(patch: MakePatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_locon.patching.compute.TILE", 2 * 8)
    model = nn.ModuleDict({"a": nn.Linear(8, 6, bias=False)})
    base = model["a"].weight.detach().clone()
    with pytest.raises(PatchError, match="could not be patched"):
        Engine(model).apply(make_plan([patch("a.weight", up=rand(4, 2), down=rand(2, 8))]))
    assert torch.equal(model["a"].weight, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_where_torch_compiles_no_loop(
    dtype: torch.dtype, patch: MakePatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = rand(3 * TILE // 640, 640).to(dtype)
    factors = {"up": 0.1 * rand(len(base), 4, seed=1), "down": 0.1 * rand(4, 640, seed=2)}
    patches = [patch("w", **factors, source=name, strength=strength) for name, strength in (("a", 0.7), ("b", -2))]
    found, _ = patched(base, patches)
    refused: list[object] = []

    def refuse(function: object) -> None:
        refused.append(function)
        raise RuntimeError("there is no TorchScript any more")

    monkeypatch.setattr(torch.jit, "script", refuse)
    products._by_tiles.cache_clear()
    try:
        assert torch.equal(patched(base, patches)[0], found)
    finally:
        products._by_tiles.cache_clear()
    assert bool(refused) == (products._onednn() is not None)
    assert not torch.equal(found, base)


@pytest.mark.usefixtures("onednn")
def test_the_host_cannot_lower_the_precision_of_a_product() -> None:
    left, right = rand(64, 64), rand(64, 64, seed=1)
    exact = left.double() @ right.double()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic("cpu"):
            found = multiplier(right)(left)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_precision_is_full_until_the_last_thread_is_done() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        first, second = exact_arithmetic("cpu"), exact_arithmetic("cpu")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("chosen", [True, False, (False, False)], ids=str)
@pytest.mark.parametrize("name", arithmetic._SUMS_IN_HALF)
def test_the_host_cannot_let_a_gpu_add_in_half(name: str, chosen: bool | tuple[bool, bool]) -> None:
    products = torch.backends.cuda.matmul
    names = [known for known in (name, f"{name}_split_k") if arithmetic._has(products, known)]
    if len(names) < (1 if isinstance(chosen, bool) else 2):
        pytest.skip("this torch has no such switch")

    def now() -> list[bool]:
        return [getattr(products, known) for known in names]

    before = now()
    try:
        setattr(products, name, chosen)
        asked = now()
        with exact_arithmetic("cuda"):
            assert not getattr(products, name)
        assert now() == asked
        assert asked[0] == (chosen if isinstance(chosen, bool) else chosen[0])
    finally:
        setattr(products, name, before[0] if len(before) < 2 else tuple(before))


@pytest.mark.skipif(TORCH < (2, 9), reason="torch before 2.9 has no such switches")
def test_a_host_that_uses_the_newer_precision_switches(write_adapter: WriteAdapter, tmp_path: Path) -> None:
    factors = {"lora_up.weight": rand(8, 2), "lora_down.weight": rand(2, 12)}
    path = write_adapter(tmp_path / "a.safetensors", {"linear": factors})
    script = (
        "import sys, torch, lib_locon\n"
        "from torch import nn\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "model = nn.ModuleDict({'linear': nn.Linear(12, 8)})\n"
        "use = lib_locon.Use(lib_locon.load(sys.argv[1]))\n"
        "assert lib_locon.Session(model).apply([use]).written == 1\n"
        "assert torch.backends.cuda.matmul.fp32_precision == 'tf32'\n"
    )  # in a process of its own: the two kinds of switches never mix again in one
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_buffer_is_taken_again_and_never_for_another_name() -> None:
    space = Workspace()
    first = space.take("up", (10, 10), torch.float32, CPU)
    assert space.take("up", (5, 20), torch.float32, CPU).data_ptr() == first.data_ptr()
    assert space.take("down", (10, 10), torch.float32, CPU).data_ptr() != first.data_ptr()
    larger = space.take("up", (20, 20), torch.float32, CPU)
    assert larger.shape == (20, 20)
    assert space.take("up", (10, 10), torch.float32, CPU).data_ptr() == larger.data_ptr()  # the outgrown one is gone
    tile = space.take("tile", (TILE - 5,), torch.float32, CPU)
    assert space.take("tile", (TILE,), torch.float32, CPU).data_ptr() == tile.data_ptr()
    assert space.take("up", (3, 3), torch.float64, CPU).dtype == torch.float64


def test_a_sum_over_several_tiles_is_that_of_one(patch: MakePatch, monkeypatch: pytest.MonkeyPatch) -> None:
    base, up, down = rand(48, 64), rand(48, 4, seed=1), rand(4, 64, seed=2)
    patches = [patch("w", up=up, down=down, strength=0.7), patch("w", rand(48, 64, seed=3), source="b", strength=-2.0)]
    assert base.numel() < TILE
    whole, _ = patched(base, patches)
    monkeypatch.setattr("lib_locon.patching.compute.TILE", 7 * 64)
    tiled, _ = patched(base, patches)
    assert torch.allclose(whole, tiled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_cannot_overflow_is_not_looked_at_and_what_can_is(patch: MakePatch, dtype: torch.dtype) -> None:
    small = [patch("w", up=torch.full((4, 2), 0.5), down=torch.full((2, 4), 0.5))]
    largest = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
    total, extremes = patched(largest, small)
    assert extremes is None
    assert bool(torch.isfinite(total).all())
    large = [patch("w", up=torch.full((4, 2), 3e4), down=torch.full((2, 4), 3e30))]
    _, extremes = patched(largest, large)
    assert extremes is not None
    beyond = torch.full((4, 4), torch.finfo(torch.float32).max)
    _, extremes = patched(beyond, small, torch.float16)  # narrower than its base
    assert extremes is not None


def test_factors_are_moved_to_a_device_once_and_let_go_with_their_set(
    zoo: Zoo, write_adapter: WriteAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = torch.device("meta")  # stands for any device but the CPU
    moves: list[torch.device] = []
    move = LoRA.to

    def counted(self: LoRA, device: torch.device, dtype: torch.dtype | None = None) -> LoRA:
        moves.append(device)
        return move(self, device, dtype)

    factors = {"lora_up.weight": rand(8, 2), "lora_down.weight": rand(2, 12)}
    adapter = lib_locon.load(write_adapter(tmp_path / "a.safetensors", {"linear": factors}))
    model: nn.Module = zoo()
    session = Session(model)
    session.apply([Use(adapter)])
    layer = session.match(adapter).matched[0].layer
    monkeypatch.setattr(LoRA, "to", counted)
    for strength in (0.5, 0.7, 0.9):
        layer.low_rank(elsewhere)
        session.apply([Use(adapter, Strengths.both(strength))])
    assert moves == [elsewhere]
    session.apply([])
    layer.low_rank(elsewhere)
    assert moves == [elsewhere, elsewhere]


def test_the_magnitude_of_a_dora_is_moved_once_too() -> None:
    elsewhere = torch.device("meta")
    factors = {"lora_up.weight": rand(8, 2), "lora_down.weight": rand(2, 12), "dora_scale": 1 + rand(8, 1)}
    ((layer,), _) = build_layers(factors, Hints())
    assert isinstance(layer, DoRALayer)
    rows = torch.empty(8, 12, device=elsewhere)
    layer.adder(rows)(rows, rows, rows, 0, 1.0)
    moved = layer._moved_once(layer.magnitude, elsewhere)
    layer.adder(rows)(rows, rows, rows, 0, 0.5)
    assert layer._moved_once(layer.magnitude, elsewhere) is moved
    layer.release()
    assert layer._moved_once(layer.magnitude, elsewhere) is not moved
