"""Every family, from file to weight, against the library that trains it and against the loop-level reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import nn

import lib_locon
from lib_locon.families import FAMILIES
from tests import conformance
from tests.oracles.cases import Case, all_cases


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_every_strength_and_dtype_is_the_trainers(case: Case, tmp_path: Path) -> None:
    assert list(conformance.wrong_cells(case, tmp_path)) == []


def test_the_published_table_is_the_present_one() -> None:
    document = conformance.document()
    assert "| ✗" not in document
    assert conformance.DOCUMENT.read_text(encoding="utf8") == document, "run `python -m tests.conformance`"


def test_the_table_names_every_family_of_the_oracles() -> None:
    assert {case.family for case in all_cases()} <= conformance.FAMILIES.keys()
    assert {case.kind for case in all_cases()} <= conformance.KINDS.keys()


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    case = next(case for case in all_cases() if case.family == "loha")
    spoilt = {**case.tensors, "hada_w1_a": case.tensors["hada_w1_a"] * 1.001}
    wrong = Case(case.name, case.family, case.kind, case.source, spoilt, case.base, case.delta)
    assert len(list(conformance.wrong_cells(wrong, tmp_path))) >= 3


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_no_number_of_a_change_is_beyond_its_bound(case: Case, tmp_path: Path) -> None:
    adapter = lib_locon.load(conformance.write_files(case, tmp_path))
    model = nn.ModuleDict({"layer": conformance.layer_for(case)})
    for item in lib_locon.Session(model).match(adapter).matched:
        base = model.get_parameter(item.view.path).detach()
        assert float(item.layer.delta(base).abs().max()) <= item.layer.bound() * (1 + 1e-5)


def test_the_common_families_have_a_bound(tmp_path: Path) -> None:
    finite = set()
    for number, case in enumerate(all_cases()):
        (tmp_path / str(number)).mkdir()
        adapter = lib_locon.load(conformance.write_files(case, tmp_path / str(number)))
        finite |= {case.family for module in adapter.modules for layer in module.layers if layer.bound() < math.inf}
    assert {"lora", "tucker", "loha", "loha_tucker", "lokr", "full"} <= finite


def test_every_field_names_a_suffix_and_a_shape() -> None:
    for family in FAMILIES:
        assert family.suffixes().keys() == family.specs().keys()
        assert family.missing(()) != [], f"{family.name} would be found in a file without tensors"
