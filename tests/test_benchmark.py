"""The benchmark runs, says what it must, and measures what its rows are named for."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import adapters, compared, compared_worker, report, switch
from benchmarks.compared_check import Factors, agreement, difference
from benchmarks.compared_ways import OursRam
from benchmarks.memory import anonymous
from benchmarks.models import skeleton
from benchmarks.report_page import BARS, met, page
from benchmarks.rows import ROWS, Measured, as_json
from lib_locon.families import SUFFIXES
from lib_locon.models.table import TargetTable

ROOT = Path(__file__).parents[1]
ASKED = ["locon-r8", "remove", "same"]
# kohya's C3Lier: what its trainer prints for these models
MODULES = {"tiny": (278, 72), "sd15": (278, 72), "sdxl": (788, 264), "sdxl-small": (788, 264)}


def said(benchmark: str, *options: str) -> dict[str, Any]:
    """Its JSON, of the small model."""
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", "--model", "tiny", "--json", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A run as a user starts it: stdout holds one JSON object and nothing else."""
    return said("switch", "--dtype", "fp32", "--rows", ",".join(ASKED))


def test_form(result: dict[str, Any]) -> None:
    assert list(result) == [
        "model",
        "torch",
        "threads",
        "device",
        "start",
        "policy",
        "floor_seconds",
        "floor_gbs",
        "rows",
    ]
    assert result["model"] == "tiny"
    assert result["threads"] >= 1
    assert result["floor_seconds"].keys() == {"fp32"}
    assert [row["name"] for row in result["rows"]] == ASKED
    for row in result["rows"]:
        assert row["dtype"] == "fp32"
        assert row.keys() == {"name", "dtype", "seconds", "ratio", "arithmetic", "anon_mib", "gpu_mib", "written"}
        assert (row["arithmetic"] > 0) == (row["name"] == "locon-r8")
        assert row["arithmetic"] < row["ratio"], "no change is faster than its products"


def test_ratios_are_multiples_of_the_floor_just_before() -> None:
    # a slow minute in which the floor and the row took ten times as long is no other ratio
    found = Measured(seconds=[6.0, 66.0, 9.0], floors=[2.0, 20.0, 2.0], written=1)
    row = as_json("locon-r8", "fp32", found, arithmetic=1.0)
    assert (row["seconds"], row["ratio"], row["arithmetic"]) == (9.0, 3.3, 0.5)


def test_only_the_same_set_again_touches_nothing(result: dict[str, Any]) -> None:
    written = {row["name"]: row["written"] for row in result["rows"]}
    assert written == {"locon-r8": 350, "remove": 350, "same": 0}


def test_memory_is_told_where_the_system_tells_it(result: dict[str, Any]) -> None:
    told = [row["anon_mib"] is not None for row in result["rows"]]
    assert told == [anonymous() is not None] * len(ASKED)


@pytest.mark.parametrize("model", MODULES)
def test_modules_are_those_that_kohya_trains(model: str) -> None:
    names = adapters.trained(TargetTable.of_model(skeleton(model)))
    unet = sum(name.startswith("lora_unet_") for name in names)
    assert (unet, len(names) - unet) == MODULES[model]
    assert len(set(names.values())) == len(names)
    # of the names that the table has for a weight, the one that kohya's trainer writes
    assert sum(name.endswith("_self_attn_q_proj") for name in names) == MODULES[model][1] // 6


def test_sdxl_has_its_true_size() -> None:
    sizes = {name: parameter.numel() for name, parameter in skeleton("sdxl").named_parameters()}
    assert sum(n for name, n in sizes.items() if name.startswith("model.diffusion_model.")) == 2_567_463_684
    assert sum(n for name, n in sizes.items() if name.startswith("conditioner.embedders.0.")) == 123_060_480
    assert sum(n for name, n in sizes.items() if name.startswith("conditioner.embedders.1.")) == 694_659_840


def test_the_small_sdxl_has_its_weights_cut_and_nothing_else() -> None:
    whole, small = (dict(skeleton(name).named_parameters()) for name in ("sdxl", "sdxl-small"))
    assert small.keys() == whole.keys()
    assert all(small[name].shape == tuple(min(size, 16) for size in whole[name].shape) for name in whole)


def test_every_other_row_runs(capsys: pytest.CaptureFixture[str]) -> None:
    others = [name for name in ROWS if name not in ASKED]
    options = ["--model", "tiny", "--dtype", "bf16,fp16", "--rounds", "1", "--start", "other"]
    assert switch.main([*options, "--rows", ",".join(others)]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{name} ") == 2 for name in others)


def test_a_row_is_offered_only_when_its_family_is_there() -> None:
    assert ("dora-r32" in ROWS) == ("dora_scale" in SUFFIXES)


@pytest.mark.parametrize("wrong", [["--rows", "locon-r9"], ["--dtype", "fp8"], ["--rounds", "0"], ["--start", "x"]])
def test_an_unknown_choice_is_refused_with_the_known_ones(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        switch.main(wrong)
    assert capsys.readouterr().err.splitlines()[-1].startswith("python -m benchmarks.switch: error: ")


# ---- beside other libraries


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = {"load", "apply", "change", "remove", "again"}


def merged(dtype: torch.dtype, strength: float) -> tuple[dict[str, torch.Tensor], ...]:
    """A weight of a convolution with its LoCon at a strength, its base, and the factors."""
    generator = torch.Generator().manual_seed(0)
    base, up, down = (
        torch.empty(shape).uniform_(-0.1, 0.1, generator=generator)
        for shape in ((64, 48, 3, 3), (64, 8, 1, 1), (8, 48, 3, 3))
    )
    base = base.to(dtype)
    delta = (up.double().flatten(1) @ down.double().flatten(1)).view(base.shape) * 0.5
    return {"a": (base.double() + strength * delta).to(dtype)}, {"a": base}, {"a": Factors(up, down, 0.5)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_merge_agrees(dtype: torch.dtype) -> None:
    found = agreement(*merged(dtype, 0.7), 0.7)
    assert found.agrees
    assert found.error <= 0.5  # rounded once
    assert found.strength == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_at_another_strength_does_not(dtype: torch.dtype) -> None:
    """In half precision no single element tells it from a rounding; all together do."""
    assert not agreement(*merged(dtype, 0.69), 0.7).agrees


@pytest.mark.parametrize("wrong", [1.0, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_with_one_wrong_element_does_not(dtype: torch.dtype, wrong: float) -> None:
    weights, bases, factors = merged(dtype, 0.7)
    weights["a"].view(-1)[1234] = wrong
    assert not agreement(weights, bases, factors, 0.7).agrees


@pytest.mark.parametrize("dtype", DTYPES)
def test_differences_are_of_bits(dtype: torch.dtype) -> None:
    bases = {"a": torch.zeros(8, 4, dtype=dtype), "b": torch.ones(2, 4, dtype=dtype)}
    weights = {name: base.clone() for name, base in bases.items()}
    assert difference(weights, bases) == (0, 0)
    weights["a"][7, 3] = -0.0
    assert torch.equal(weights["a"], bases["a"])
    assert difference(weights, bases) == (1 / 40, 0)
    weights["b"][1, 2] = 1.5
    assert difference(weights, bases) == (2 / 40, 0.5)


@pytest.fixture(scope="module")
def beside() -> dict[str, Any]:
    """A run as a user starts it, of ours and one that subtracts."""
    return said("compared", "--rounds", "1", "--ways", "ours-checkpoint,lycoris", "--ranks", "8")


def test_form_of_the_comparison(beside: dict[str, Any]) -> None:
    assert [way["way"] for way in beside["ways"]] == ["ours-checkpoint", "lycoris"]
    assert all(way["calls"].keys() == STEPS and way["version"] and way["note"] for way in beside["ways"])
    assert [(row["way"], row["rank"]) for row in beside["rows"]] == [("ours-checkpoint", 8), ("lycoris", 8)]
    for row in beside["rows"]:
        assert row["why"] is None
        assert row["seconds"].keys() == STEPS
        for step, seconds in row["seconds"].items():
            assert row["ratio"][step] == pytest.approx(seconds / row["floor_seconds"])
        assert row["agreement"].keys() == {"apply", "change"}


def test_all_merge_the_same_and_ours_alone_gives_the_base_back(beside: dict[str, Any]) -> None:
    for row in beside["rows"]:
        assert all(checked["agrees"] for checked in row["agreement"].values())
        assert (row["different_share"] == 0) == (row["way"] == "ours-checkpoint")
        assert (row["largest_difference"] == 0) == (row["way"] == "ours-checkpoint")


@pytest.mark.parametrize("way", ["peft", "lycoris-precise", "diffusers"])
def test_every_other_way_merges_right(way: str) -> None:
    if way == "diffusers":
        pytest.importorskip("diffusers")
    (row,) = compared_worker.measure(way, "tiny", "bf16", [8], 1)["rows"]
    assert row["why"] is None
    assert all(checked["agrees"] for checked in row["agreement"].values())


def test_a_way_that_merges_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compared_worker.WAYS, "ours-ram", f"{__name__}:Weak")
    (row,) = compared_worker.measure("ours-ram", "tiny", "bf16", [8], 1)["rows"]
    assert not row["agreement"]["apply"]["agrees"]
    assert row["agreement"]["apply"]["strength"] == pytest.approx(0.99, abs=1e-3)


class Weak(OursRam):
    def apply(self, strength: float) -> None:
        super().apply(0.99 * strength)


def test_a_library_that_is_not_there_has_rows_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compared_worker.WAYS, "diffusers", "no_such_library:Way")
    found = compared_worker.measure("diffusers", "tiny", "fp32", [8, 32], 1)
    assert [row["rank"] for row in found["rows"]] == [8, 32]
    for row in found["rows"]:
        assert "no_such_library" in row["why"]
        assert row["seconds"] is row["different_share"] is row["agreement"] is None
    assert any("no_such_library" in line for line in compared.lines(wrapped(found)))
    assert "`diffusers`: not measured: not installed" in page({"compared": measured(wrapped(found))})


def wrapped(way: dict[str, Any]) -> dict[str, Any]:
    """One way's rows as the whole comparison has them."""
    about = {name: value for name, value in way.items() if name != "rows"}
    result = {"model": "tiny", "torch": "2", "threads": 1, "rounds": 1, "touched_mib": {"fp32": 1.0}}
    return {**result, "ways": [about], "rows": way["rows"]}


# ---- the page


def measured(result: dict[str, Any]) -> dict[str, Any]:
    return {"command": "python -m …", "machine": report.machine(), "result": result}


def test_the_page_says_what_the_benchmarks_said(result: dict[str, Any], beside: dict[str, Any]) -> None:
    text = page({"switch-base": measured(result), "compared": measured(beside)})
    for row in result["rows"]:
        assert (f"{row['ratio']:.2f} ×" in text) == (row["name"] != "same")
    for row in beside["rows"]:
        assert f"{row['seconds']['apply']:.2f} s ({row['ratio']['apply']:.1f} ×)" in text
        assert row["different_share"] == 0 or f"{row['different_share']:.2%}" in text
    assert "From another LoCon, whose base is kept already\n\nNot measured." in text
    assert torch.__version__ in text


def test_bars_are_for_the_true_shapes_and_judged_as_measured(result: dict[str, Any]) -> None:
    ratios = {"remove": 1.2, "locon-r8": 2.6, "same": 0.1}
    rows = [{**row, "ratio": ratios[row["name"]], "seconds": 0.0009} for row in result["rows"]]
    true = {**result, "model": "sd15", "rows": rows}
    assert [met(row, BARS) for row in rows] == [False, True, True]  # locon-r8, remove, same
    text = page({"switch-base": measured(true)})
    assert "**2 of 3 bars are met.**" in text
    assert "**2.60 ×** (≤ 2.5)" in text
    assert "| 1.20 × (≤ 1.2)" in text
    assert met({**rows[2], "written": 1}, BARS) is False
    assert "No bars." in page({"switch-base": measured(result)})


def test_who_loses_is_said_both_ways(beside: dict[str, Any]) -> None:
    ours, theirs = beside["rows"]
    lost = {**beside, "rows": [{**ours, "peak_mib": 30.0}, {**theirs, "peak_mib": 10.0}]}
    won = {**beside, "rows": [{**ours, "peak_mib": 10.0}, {**theirs, "peak_mib": 30.0}]}
    assert "peak of memory | – | **3.0 × more than lycoris** |" in page({"compared": measured(lost)})
    assert "peak of memory | – | 3.0 × less than lycoris |" in page({"compared": measured(won)})


def test_what_could_not_be_measured_is_said_with_the_reason() -> None:
    found = report.measure(["benchmarks.switch", "--json", "--rows", "locon-r9"])
    assert "'locon-r9' is none of" in found["failed"]
    assert "Not measured: python -m benchmarks.switch: error: 'locon-r9'" in page({"switch-base": found})


def test_what_a_gpu_took_is_said_in_milliseconds(result: dict[str, Any]) -> None:
    assert "None measured" in page({"switch-base": measured(result)})
    there = {**result, "device": "a card", "floor_seconds": {"fp16": 0.0031}, "floor_gbs": {"fp16": 2600.0}}
    rows = [{**row, "seconds": 0.0123, "ratio": 4.0, "gpu_mib": 17.0} for row in result["rows"]]
    text = page({"gpu-sdxl": measured({**there, "rows": rows})})
    assert "on a card. Floor: 3.10 ms, 2600 GB/s." in text
    assert "| one LoCon, rank 8 | 12.30 ms | 25% | 17 MiB |" in text
    assert "| the same set again | 12.30 ms | – | 17 MiB |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_measurements_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--measure", "gpu-sdxl", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "page.md")]
    assert report.main(asked) == 1
    assert "torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(("has", "left_out"), [("AVX2", False), ("AVX512", True), ("DEFAULT", True)])
def test_what_is_for_a_kind_of_processor_is_left_out_on_others(
    monkeypatch: pytest.MonkeyPatch, has: str, left_out: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: has)
    assert (has in report.why_not_here("switch-avx2")) is left_out
    assert report.why_not_here("switch-other") == ""
    assert report.machine()["instructions"] == has


def test_the_page_in_the_repository_is_that_of_its_results() -> None:
    assert report.PAGE.read_text(encoding="utf8") == page(report.read(report.RESULTS))


def test_a_page_is_made_of_what_is_there_and_of_nothing_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "results", tmp_path / "page.md"
    asked = ["--measure", "none", "--results", str(folder), "--out", str(out)]
    assert report.main(asked) == 1
    assert "there is no measurement" in capsys.readouterr().err
    assert not out.exists()
    failed = {"command": "python -m …", "machine": report.machine(), "failed": "no room"}
    (folder / "compared.json").write_text(json.dumps(failed), encoding="utf8")
    assert report.main(asked) == 0
    assert "Not measured: no room" in out.read_text(encoding="utf8")
