"""Patterns of module names in a configuration: they fit what PEFT's regular expressions fit, in bounded time."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import lib_locon
from lib_locon.files.name_patterns import Pattern, UnknownPattern
from lib_locon.files.peft_config import METADATA_KEY, read_config

PIECES = ["a", "b", "to_q", ".", r"\.", r"\d+", "[0-9]+", "[^a]", "*", "+", "?", "|", "^", "$", r"\w", "1", ".*", "("]
PIECES += [")", "(?:", "(a|b)"]


@given(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.lists(st.sampled_from(["a", "b", "to_q", ".", "layers", "1", "x"]), max_size=6).map("".join),
)
def test_patterns_fit_the_names_that_pefts_regular_expressions_fit(pattern: str, name: str) -> None:
    try:
        compiled = Pattern(pattern)
        wanted, whole = re.match(rf"(.*\.)?({pattern})$", name), re.fullmatch(pattern, name)
    except (UnknownPattern, re.error):
        return
    assert compiled.fits(name) == bool(wanted)
    assert compiled.fits(name, whole=True) == bool(whole)


@pytest.mark.parametrize(
    "pattern", ["(a", "a)", "(?=a)", "(" * 30 + "a" + ")" * 30, "a{3}", r"\1", r"a\b", "[a", "a**", "(?i)a", "x" * 501]
)
def test_patterns_beyond_that_are_told_apart(pattern: str) -> None:
    with pytest.raises(UnknownPattern):
        Pattern(pattern)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {f"a.*b{i}": 1 for i in range(40_000)}},
        {"alpha_pattern": {f"(a|.)*(b|.)*{i}": 1 for i in range(900)}},
        {"alpha_pattern": {f"m{i}.to_q": 1 for i in range(50_000)}},
        {"target_modules": [*(f"m{i}" for i in range(80_000)), "to_q"]},
        {"target_modules": "(a|a|.)*" * 60},
    ],
    ids=["expressions", "slow expressions", "names", "targets", "a slow target"],
)
def test_a_configuration_costs_no_more_than_its_length(settings: dict[str, Any], tmp_path: Path) -> None:
    keys = [f"base_model.model.{'a' * 200}{i}.to_q.lora_{side}.weight" for i in range(300) for side in "AB"]
    save_file({key: torch.ones(4, 4) for key in keys}, tmp_path / "adapter_model.safetensors")
    table = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(table))
    started = time.process_time()
    try:
        lib_locon.load(tmp_path / "adapter_model.safetensors")
    except lib_locon.FileError as error:
        assert "pattern of module names" in str(error)  # some are refused, none may take long
    assert time.process_time() - started < 20


def test_a_name_of_thousands_of_dots_costs_no_more_than_its_length() -> None:
    long = ".".join("a" * 40_000)
    table = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"a.*a.*a.*a.*b": 3, **{f"m{i}.a": 1 for i in range(1000)}}}
    started = time.process_time()
    config = read_config(Path("x"), {METADATA_KEY: json.dumps(table)}, None)
    assert config.scale(long, 4) == 2
    assert time.process_time() - started < 5
