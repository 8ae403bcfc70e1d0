"""The benchmark runs, says what it must, and measures what its rows are named for."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import adapters, switch
from benchmarks.memory import anonymous
from benchmarks.models import skeleton
from benchmarks.rows import ROWS
from lib_locon.families import SUFFIXES
from lib_locon.models.table import TargetTable

ROOT = Path(__file__).parents[1]
ASKED = ["locon-r8", "remove", "same"]
# kohya's C3Lier: what its trainer prints for these models
MODULES = {"tiny": (278, 72), "sd15": (278, 72), "sdxl": (788, 264)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small only loses time to more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A run as a user starts it: stdout holds one JSON object and nothing else."""
    command = [sys.executable, "-m", "benchmarks.switch", "--model", "tiny", "--json", "--dtype", "fp32"]
    run = subprocess.run(
        [*command, "--rows", ",".join(ASKED)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_form(result: dict[str, Any]) -> None:
    assert list(result) == ["model", "torch", "threads", "start", "floor_seconds", "rows"]
    assert result["model"] == "tiny"
    assert result["threads"] >= 1
    assert result["floor_seconds"].keys() == {"fp32"}
    assert [row["name"] for row in result["rows"]] == ASKED
    for row in result["rows"]:
        assert row["dtype"] == "fp32"
        assert row.keys() == {"name", "dtype", "seconds", "ratio", "anon_mib", "written"}


def test_ratios_are_multiples_of_the_floor(result: dict[str, Any]) -> None:
    floor = result["floor_seconds"]["fp32"]
    for row in result["rows"]:
        assert math.isfinite(row["ratio"])
        assert row["ratio"] > 0
        assert row["ratio"] == pytest.approx(row["seconds"] / floor)


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
