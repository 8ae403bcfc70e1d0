"""Some hundred random cases of each kind of hostile input, and that the fuzzer sees what it looks for."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.fuzz import limits
from tests.fuzz.adapter_files import AdapterFiles
from tests.fuzz.prompts import Prompts
from tests.fuzz.requests import Requests
from tests.fuzz.runner import fuzz
from tests.fuzz.sidecars import Sidecars


@pytest.mark.parametrize("seed", [1, 2])
def test_adapter_files_keep_every_promise(seed: int, tmp_path: Path) -> None:
    found = fuzz({"files": AdapterFiles()}, 60, seed, tmp_path, most=500)
    assert not found.failures, found.failures[0]
    assert min(found.counts[f"files: {kind}"] for kind in ("used", "refused", "matches nothing")) > 20, found.counts


def test_what_lies_beside_an_adapter_harms_no_other_one(tmp_path: Path) -> None:
    found = fuzz({"sidecars": Sidecars()}, 60, 1, tmp_path, most=150)
    assert not found.failures, found.failures[0]
    assert min(found.counts[f"sidecars: notes {kind}"] for kind in ("saved", "refused")) > 20, found.counts


def test_any_prompt_is_read_as_the_host_reads_it(tmp_path: Path) -> None:
    found = fuzz({"prompts": Prompts()}, 60, 1, tmp_path, most=1000)
    assert not found.failures, found.failures[0]
    assert min(found.counts[f"prompts: {kind}"] for kind in ("read", "skipped", "no tag")) > 50, found.counts


def test_any_request_is_answered(tmp_path: Path) -> None:
    with Requests() as target:
        found = fuzz({"requests": target}, 60, 1, tmp_path, most=300)
    assert not found.failures, found.failures[0]
    assert found.counts["requests: 200"] > 20 and found.counts["requests: 400"] > 5, found.counts


class Failing:
    """A target whose every case breaks a promise."""

    def run(self, rng: random.Random, folder: Path) -> str:
        (folder / "input").write_text(str(rng.random()))
        raise AssertionError("broken")


def test_a_failure_is_kept_with_the_line_that_repeats_it(tmp_path: Path) -> None:
    found = fuzz({"x": Failing()}, 5, 1, tmp_path, most=2)
    assert not found.counts
    assert ["--only x --case 1:0" in found.failures[0], "--case 1:1" in found.failures[1]] == [True, True]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["failed-x-1-0", "failed-x-1-1"]
    with pytest.raises(AssertionError):
        Failing().run(random.Random("x 1:0"), tmp_path)
    assert (tmp_path / "input").read_text() == (tmp_path / "failed-x-1-0" / "input").read_text()


def test_memory_and_time_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Tensor] = []
    monkeypatch.setattr(limits, "SPARE_BYTES", 8 << 20)
    with pytest.raises(AssertionError, match="MB for an input of 10 bytes"), limits.limited(10):
        held.append(torch.ones(64 << 20))  # 256 MB: more than what earlier tests freed and the allocator still has
    monkeypatch.setattr(limits, "WALL_SECONDS", 1)
    with pytest.raises(TimeoutError), limits.limited(10):
        time.sleep(3)
    monkeypatch.setattr(limits, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(limits, "WALL_SECONDS", 30)
    with pytest.raises(TimeoutError), limits.limited(10):
        while True:
            pass
