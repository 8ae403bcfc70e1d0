"""Hostile and broken files: each gives a report or one clear error; none hangs, or takes memory out of proportion.

Random ones come from `tests.fuzz`, whose targets hold the promises; the named ones below say what is answered.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.errors import FileError
from lib_locon.files.adapter import Unmatched
from lib_locon.files.reader import SafetensorsFile
from tests.conftest import ZooModel
from tests.fuzz import adapter_files, limits

if TYPE_CHECKING:
    from random import Random

    from tests.conftest import WriteAdapter, WriteRaw

UP, DOWN, ALPHA = "lora_up.weight", "lora_down.weight", "alpha"


@pytest.fixture
def model(zoo: Any) -> nn.Module:
    made: nn.Module = zoo()
    return made


def apply(model: nn.Module, path: Path) -> Any:
    return lib_locon.Session(model).apply([lib_locon.Use(lib_locon.load(path))]).adapters[0]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model: nn.Module, base: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())


# ---- any file


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(random=st.randoms(use_true_random=False), broken=st.booleans())
def test_any_adapter_with_anything_done_to_it(tmp_path: Path, random: Random, broken: bool) -> None:
    tensors = adapter_files.mutated(random, adapter_files.sound(random, ZooModel()))
    path = tmp_path / "a.safetensors"
    path.write_bytes(adapter_files.serialized(random, tensors, broken))
    adapter_files.check(path)


# ---- small files with large claims

HUGE: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "LoRA": ("linear", {UP: (1_000_000, 1), DOWN: (1, 10_000)}, "its ΔW is 1000000 × 10000, the weight is 8 × 12"),
    "LoHa": (
        "linear",
        {"hada_w1_a": (99_999, 1), "hada_w1_b": (1, 99_999), "hada_w2_a": (99_999, 1), "hada_w2_b": (1, 99_999)},
        "its ΔW is 99999 × 99999",
    ),
    "LoKr": ("linear", {"lokr_w1": (500, 500), "lokr_w2": (500, 500)}, "its ΔW is 250000 × 250000"),
    "LoKr of factors": (
        "linear",
        {"lokr_w1_a": (9_999, 1), "lokr_w1_b": (1, 9_999), "lokr_w2_a": (9_999, 1), "lokr_w2_b": (1, 9_999)},
        "its ΔW is 99980001 × 99980001",
    ),
    "Tucker": ("conv2d", {UP: (8, 1), DOWN: (1, 4), "lora_mid.weight": (1, 1, 1000, 1000)}, "its ΔW is 8 × 4000000"),
    "Tucker LoHa": (
        "conv2d",
        {"hada_t1": (1, 1, 999, 999), "hada_w1_a": (1, 8), "hada_w1_b": (1, 4)}
        | {"hada_t2": (1, 1, 999, 999), "hada_w2_a": (1, 8), "hada_w2_b": (1, 4)},
        "its ΔW is 8 × 3992004",
    ),
    "Diag-OFT": ("linear", {"oft_blocks": (100_000, 1, 1)}, "its ΔW is 100000 × any"),
    "PEFT's OFT": ("linear", {"oft_R.weight": (1, 1999 * 1000)}, "blocks of 2000 do not divide the 12 inputs"),
    "BOFT": ("linear", {"oft_blocks": (1, 100_000, 2, 2)}, "its ΔW is 200000 × any"),
    "BOFT of many stages": ("linear", {"oft_blocks": (10_000, 4, 2, 2)}, "cannot be mixed in 10000 stages"),
    "IA3": ("linear", {"weight": (1_000_000,), "on_input": ()}, "its 1000000 factors fit no side"),
    "GLoRA": (
        "linear",
        {"a1.weight": (99_999, 1), "a2.weight": (1, 99_999), "b1.weight": (8, 1), "b2.weight": (1, 12)},
        "99999 input channels",
    ),
    "T-LoRA": (
        "linear",
        {"q_layer.weight": (1, 99_999), "p_layer.weight": (99_999, 1), "lambda_layer": (1, 1)},
        "its ΔW is 99999 × 99999",
    ),
    "DoRA": ("linear", {UP: (8, 1), DOWN: (1, 12), "dora_scale": (1_000_000,)}, "its DoRA magnitude has 1000000"),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_claim_that_does_not_fit_is_said_before_it_is_built(
    name: str, model: nn.Module, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    module, shapes, says = HUGE[name]
    path = write_adapter(
        tmp_path / "a.safetensors",
        {module: {suffix: torch.ones(shape) for suffix, shape in shapes.items()}, "norm": {"w_norm": torch.ones(8)}},
    )
    base = weights(model)
    with limits.limited(path.stat().st_size):
        report = apply(model, path)
    assert says in "; ".join(item.reason for item in report.unmatched)
    assert report.unmatched
    assert torch.equal(model.norm.weight, base["norm.weight"] + 1), "what is sound in the file is used"
    assert torch.equal(model.linear.weight, base["linear.weight"])
    header = lib_locon.load(path, header_only=True)  # the same without reading any factor
    assert says in str(lib_locon.Session(ZooModel()).match(header).unmatched)


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize(
    ("row", "column", "sound"),
    [
        (7, 11, True),
        (8, 0, False),
        (0, 12, False),
        (-1, 0, False),
    ],
)
def test_a_sparse_residual(
    row: int, column: int, sound: bool, count: int, model: nn.Module, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    """`bias_size` may claim anything: it is not needed."""
    factors = {
        UP: torch.zeros(8, 1),
        DOWN: torch.zeros(1, 12),
        "bias_indices": torch.tensor([[0, row], [0, column]], dtype=torch.int16),
        "bias_values": torch.tensor([0.5, 2.0]),
        "bias_size": torch.tensor([100_000, 100_000]),
    }
    base = weights(model)
    report = apply(model, write_adapter(tmp_path / "a.safetensors", {"linear": factors}))
    if sound:
        base["linear.weight"][0, 0] += 0.5
        base["linear.weight"][row, column] += 2
    else:
        assert "outside of the weight" in report.unmatched[0].reason
    assert same(model, base)


# ---- numbers


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2]
)
def test_an_alpha_of_any_kind(
    dtype: torch.dtype, shape: tuple[int, ...], model: nn.Module, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    base = weights(model)
    factors = {UP: torch.ones(8, 4), DOWN: torch.ones(4, 12), ALPHA: torch.full(shape, 2).to(dtype)}
    apply(model, write_adapter(tmp_path / "a.safetensors", {"linear": factors}))
    assert torch.equal(model.linear.weight, base["linear.weight"] + 2)


@pytest.mark.parametrize(
    ("alpha", "says"),
    [
        (torch.tensor([1.0, 2.0]), "it must be one number"),
        (torch.zeros(0), "it must be one number"),
        (torch.zeros(3, 3), "it must be one number"),
        (torch.tensor(math.nan), "not finite"),
        (torch.tensor(math.inf), "not finite"),
        (torch.tensor(-math.inf, dtype=torch.float16), "not finite"),
        (torch.tensor(1e300, dtype=torch.float64), "not finite"),
    ],
    ids=str,
)
def test_an_alpha_that_is_none(
    alpha: Tensor, says: str, model: nn.Module, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    factors = {UP: torch.ones(8, 4), DOWN: torch.ones(4, 12), ALPHA: alpha}
    path = write_adapter(tmp_path / "a.safetensors", {"linear": factors, "norm": {"w_norm": torch.ones(8)}})
    report = apply(model, path)
    assert [says in item.reason for item in report.unmatched] == [True]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("suffix", [UP, DOWN, "dora_scale"])
def test_what_is_not_finite_is_left_out_alone(
    number: float, suffix: str, model: nn.Module, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    base = weights(model)
    factors = {UP: torch.ones(8, 4), DOWN: torch.ones(4, 12), "dora_scale": torch.ones(8, 1)}
    factors[suffix].view(-1)[-1] = number
    sound = {"conv2d": {UP: torch.ones(8, 1, 1, 1), DOWN: torch.ones(1, 4, 3, 3)}}
    report = apply(model, write_adapter(tmp_path / "a.safetensors", {"linear": factors, **sound}))
    assert (report.used, report.total) == (1, 2)
    assert "not finite" in report.unmatched[0].reason
    base["conv2d.weight"] += 1
    assert same(model, base)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn]
)
def test_factors_of_any_dtype_count_by_their_value(
    dtype: torch.dtype, model: nn.Module, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    base = weights(model)
    factors = {UP: torch.ones(8, 4).to(dtype), DOWN: torch.ones(4, 12).to(dtype)}
    apply(model, write_adapter(tmp_path / "a.safetensors", {"linear": factors}))
    assert torch.equal(model.linear.weight, base["linear.weight"] + 4)


@pytest.mark.parametrize(
    "sizes",
    [
        torch.tensor([8.0, math.inf]),
        torch.tensor([8.0, -math.inf]),
        torch.tensor([math.nan, 12.0]),
        torch.tensor([8.5, 12.0]),
        torch.tensor([8.0, 1e300], dtype=torch.float64),
        torch.tensor([8, 2**63 - 1]),
        torch.tensor([2**40, 2**40]),
        torch.tensor([8, -12]),
        torch.tensor([0, 12]),
        torch.tensor([8.0, math.nan], dtype=torch.float16).to(torch.float8_e5m2),
        torch.zeros(0),
        torch.ones(2, 2),
        torch.ones(9),
    ],
    ids=str,
)
@pytest.mark.parametrize("header_only", [False, True])
def test_a_stored_shape_that_is_none(
    sizes: Tensor, header_only: bool, model: nn.Module, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    factors = {UP: torch.ones(8, 4), DOWN: torch.ones(4, 12), "reshape_weight": sizes}
    adapter = lib_locon.load(write_adapter(tmp_path / "a.safetensors", {"linear": factors}), header_only=header_only)
    (unread,) = adapter.modules[0].unread
    assert (unread.key, unread.reason) == ("lora_unet_linear.reshape_weight", "it must be the sizes of a weight")
    assert adapter.modules[0].layers[0].reshape == ()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_stored_shape_of_any_kind(dtype: torch.dtype, tmp_path: Path, write_adapter: WriteAdapter) -> None:
    factors = {UP: torch.ones(8, 4), DOWN: torch.ones(4, 12), "reshape_weight": torch.tensor([8, 12]).to(dtype)}
    adapter = lib_locon.load(write_adapter(tmp_path / "a.safetensors", {"linear": factors}))
    assert (adapter.modules[0].layers[0].reshape, adapter.modules[0].unread) == ((8, 12), ())


def test_a_stored_shape_of_nothing(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    modules = {
        "linear": {UP: torch.ones(8, 4), DOWN: torch.ones(4, 12)},
        "b": {"reshape_weight": torch.tensor([8, 12])},
    }
    adapter = lib_locon.load(write_adapter(tmp_path / "a.safetensors", modules))
    said = [str(unread) for module in adapter.modules for unread in module.unread]
    assert said == ["lora_unet_b.reshape_weight: a shape without factors"]


@pytest.mark.parametrize("on_input", [torch.zeros(2), torch.zeros(0), torch.zeros(2, 2)], ids=str)
def test_a_flag_that_is_no_single_number(on_input: Tensor, tmp_path: Path, write_adapter: WriteAdapter) -> None:
    path = write_adapter(tmp_path / "a.safetensors", {"linear": {"weight": torch.ones(8), "on_input": on_input}})
    with pytest.raises(FileError, match="one number"):
        lib_locon.load(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 10**400, "lora_alpha": 1},
        {"r": 8, "lora_alpha": 10**400},
        {"r": -4, "lora_alpha": 1, "use_rslora": True},
        {"r": math.nan, "lora_alpha": 1, "use_rslora": True},
        {"r": math.inf, "lora_alpha": math.inf},
        {"r": 8, "lora_alpha": 8, "alpha_pattern": {"linear": [10**400]}},
        {"r": "8", "lora_alpha": None, "rank_pattern": 3},
    ],
    ids=str,
)
def test_a_configuration_with_impossible_numbers(
    settings: dict[str, Any], model: nn.Module, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    factors = {UP: torch.ones(8, 4), DOWN: torch.ones(4, 12)}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    apply(model, write_adapter(tmp_path / "a.safetensors", {"linear": factors}, metadata))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("spelled", ["linear.{}", "^linear.{}$"])
def test_a_configuration_with_a_pattern_for_each_of_many_modules(
    spelled: str, tmp_path: Path, write_adapter: WriteAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 3000
    factors = {UP: torch.ones(1, 1), DOWN: torch.ones(1, 1)}
    settings = {"r": 1, "lora_alpha": 1, "alpha_pattern": {spelled.format(i): i for i in range(count)}}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    modules = {f"linear.{i}": factors for i in range(count)}
    path = write_adapter(tmp_path / "a.safetensors", modules, metadata, "base_model.model.")
    monkeypatch.setattr(limits, "CPU_SECONDS", 15)
    with limits.limited(path.stat().st_size):
        adapter = lib_locon.load(path)
    scales = {module.name.body: module.layers[0].scale for module in adapter.modules}
    assert scales == {f"linear.{i}": i for i in range(count)}


# ---- headers


def test_a_header_of_nothing_but_brackets(tmp_path: Path, write_raw: WriteRaw) -> None:
    path = write_raw(tmp_path / "a.safetensors", b'{"a":[' + b"[]," * 700_000 + b"[]]}")
    with pytest.raises(FileError), limits.limited(path.stat().st_size):
        lib_locon.load(path)


def test_the_last_of_many_names_is_there_twice(tmp_path: Path, write_raw: WriteRaw) -> None:
    names = ",".join(f'"{i}":0' for i in range(200_000))
    path = write_raw(tmp_path / "a.safetensors", f'{{{names},"199999":1}}'.encode())
    with pytest.raises(FileError, match="'199999' twice"), limits.limited(path.stat().st_size):
        lib_locon.load(path)


@pytest.mark.parametrize("shape", [b"[%s]" % b",".join([b"9" * 4000] * 2000), b"[%s]" % b",".join([b"1"] * 10**6)])
def test_sizes_whose_product_would_never_end(shape: bytes, tmp_path: Path, write_raw: WriteRaw) -> None:
    header = b'{"x":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}' % shape
    path = write_raw(tmp_path / "a.safetensors", header, bytes(4))
    with pytest.raises(FileError, match="broken shape"), limits.limited(path.stat().st_size):
        lib_locon.load(path)


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**40, 0, 2**40], [0, 2**63]], ids=str)
def test_an_empty_tensor_that_torch_cannot_count(shape: list[int], tmp_path: Path, write_raw: WriteRaw) -> None:
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    with pytest.raises(FileError, match="broken shape"):
        SafetensorsFile(write_raw(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_size(value: bool, tmp_path: Path, write_raw: WriteRaw) -> None:
    header = {"x": {"dtype": "U8", "shape": [value], "data_offsets": [0, int(value)]}}
    with pytest.raises(FileError, match="broken shape"):
        SafetensorsFile(write_raw(tmp_path / "a.safetensors", header, bytes(int(value))))


def test_bytes_that_belong_to_no_tensor(tmp_path: Path, write_raw: WriteRaw) -> None:
    header = {"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    with pytest.raises(FileError, match="7 bytes after its last tensor"):
        SafetensorsFile(write_raw(tmp_path / "a.safetensors", header, bytes(8)))


@pytest.mark.parametrize(
    "header",
    [
        b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"\\udfff":"x"}}',
        b'{"__metadata__":{"x":"\\udfff"}}',
    ],
)
def test_half_a_character(header: bytes, tmp_path: Path, write_raw: WriteRaw) -> None:
    with pytest.raises(FileError, match="no Unicode text") as caught:
        SafetensorsFile(write_raw(tmp_path / "a.safetensors", header))
    str(caught.value).encode()


def test_sentences_stay_short_and_plain(tmp_path: Path, write_raw: WriteRaw) -> None:
    for key in ("x" * 1_000_000, "\x1b[2J\u202e\n" * 1000):
        path = write_raw(tmp_path / "a.safetensors", {key: {"dtype": key, "shape": [0], "data_offsets": [0, 0]}})
        with pytest.raises(FileError) as caught:
            lib_locon.load(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000 + len(str(path))


def test_names_are_kept_as_they_are_and_shown_in_one_line(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    strange = "\u202eevil\n\x1b[31m名前"
    save_file(
        {f"lora_unet_linear.{UP}": torch.ones(8, 1), f"lora_unet_linear.{DOWN}": torch.ones(1, 12)}
        | {strange: torch.ones(1)},
        path,
    )
    unmatched = apply(model, path).unmatched
    assert [item.key for item in unmatched] == [strange]
    assert str(unmatched[0]) == "\\u202eevil\\n\\x1b[31m名前: no module's name with a known suffix"
    assert str(Unmatched("plain.name", "why")) == "plain.name: why"


# ---- what is no ordinary file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such thing here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    os.mkfifo(path)
    with pytest.raises(FileError, match="a pipe or a device"), limits.limited(0):
        lib_locon.load(path)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(FileError, match="cannot be read"):
        lib_locon.load("a\0b.safetensors")


# ---- size

MEASURE = """
import sys, time
from pathlib import Path
import lib_locon
from lib_locon.inspection import inspect
from tests.fuzz.limits import peak
before, start = peak(reset=True), time.process_time()
found = {call}
print(time.process_time() - start, (peak() - before) / 1e6, found)
"""


def measured(call: str, path: Path) -> tuple[float, float, str]:
    """(seconds of the processor, MB more than before, result) in a process of its own."""
    code = MEASURE.format(call=call)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, path], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    seconds, megabytes, found = done.stdout.split(maxsplit=2)
    return float(seconds), float(megabytes), found.strip()


ONE_MODULE = {UP: (2, 1), DOWN: (1, 2), ALPHA: ()}


def holes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file of zeros that takes no room on the disk (but as much time to read as any other)."""
    header, at = {}, 0
    for key, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


def test_inspect_reads_the_header_of_a_large_file_only(tmp_path: Path) -> None:
    side = 2**14
    shapes = {f"lora_unet_x.{UP}": (side, side), f"lora_unet_x.{DOWN}": (side, side), "lora_unet_x.alpha": ()}
    path = holes(tmp_path / "a.safetensors", shapes)
    assert path.stat().st_size > 2e9
    seconds, megabytes, found = measured("inspect(Path(sys.argv[1])).ranks", path)
    assert found == "{'16384': 1}"
    assert seconds < 1
    assert megabytes < 30


def test_a_hundred_thousand_names(tmp_path: Path) -> None:
    shapes = {f"lora_unet_{i}_to_q.{suffix}": s for i in range(33_334) for suffix, s in ONE_MODULE.items()}
    path = holes(tmp_path / "a.safetensors", shapes)
    seconds, megabytes, found = measured("len(lib_locon.load(sys.argv[1]).modules)", path)
    assert found == "33334"
    assert seconds < 30  # 4 on a quiet core
    assert megabytes < 40 * path.stat().st_size / 1e6
