"""Code of other extensions behind the names of ours: what it raises or answers, and what is said of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lib_locon
from lib_locon.hosts.failures import others_error
from lib_locon.hosts.legacy import TE, UNET, LoadedNetworks, Shown


@pytest.fixture
def use(tmp_path: Path) -> lib_locon.Use:
    save_file(
        {"0.lora_up.weight": torch.ones(4, 1), "0.lora_down.weight": torch.ones(1, 4)}, tmp_path / "a.safetensors"
    )
    return lib_locon.Use(lib_locon.load(tmp_path / "a.safetensors"), lib_locon.Strengths.both(0.8), name="a")


def answering(*answers: object) -> Any:
    """An object whose strength for the UNet is one answer after the other: a value, or an error that is raised."""
    left = list(answers)

    def unet(_: object) -> object:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return type("Network", (), {UNET: property(unet)})()


def shown(network: Any, use: lib_locon.Use) -> Shown:
    each = Shown(network, use)
    each.write()
    return each


def test_a_property_that_fails_for_a_while_acts_again_afterwards(use: lib_locon.Use) -> None:
    each = shown(answering(ZeroDivisionError("division by zero"), 0.25), use)
    assert each.now().strengths.unet == 0.8
    assert each.now().strengths.unet == 0.25
    assert list(each.problems) == [UNET]


def test_a_property_that_fails_after_it_acted_leaves_what_the_tag_says(use: lib_locon.Use) -> None:
    each = shown(answering(0.25, 0.25, ZeroDivisionError("division by zero")), use)
    assert each.now().strengths.unet == 0.25
    assert each.now() == use
    assert "the strength in the tag is used" in each.problems[UNET]


class Unequal:
    """A value that can neither be compared nor made a number."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __float__(self) -> float:
        raise RuntimeError("no number")


@pytest.mark.parametrize(
    "value",
    [torch.ones(3), [0.5, 1.0], Unequal(), float("nan")],
    ids=["array", "list", "incomparable", "nan"],
)
def test_what_is_no_strength_costs_nothing_but_itself(
    value: object, use: lib_locon.Use, caplog: pytest.LogCaptureFixture
) -> None:
    each = shown(answering(value), use)
    assert each.now().strengths == use.strengths
    assert "which is no strength: not used" in caplog.text


def test_what_is_no_strength_can_be_compared_with_what_it_was(use: lib_locon.Use) -> None:
    loaded = LoadedNetworks()
    for values in ((torch.ones(3), torch.zeros(3)), (Unequal(), Unequal())):
        each = shown(answering(*values), use)
        loaded.names = SimpleNamespace(loaded=[each.network], in_memory={}, kind=object)  # type: ignore[assignment]
        loaded.shown = [each]
        assert loaded.current != loaded.current


def test_one_part_failing_leaves_the_other(use: lib_locon.Use) -> None:
    each = shown(answering(ZeroDivisionError()), use)
    setattr(each.network, TE, 0.5)
    strengths = each.now().strengths
    assert (strengths.te, strengths.unet) == (0.5, 0.8)


def module_at(path: Path, text: str) -> ModuleType:
    path.parent.mkdir(parents=True)
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(run: Any) -> str:
    try:
        run()
    except (ArithmeticError, OSError) as error:
        return others_error(error, "a strength", "none is used")
    raise AssertionError("no error")


def test_who_asked_a_library_is_named_not_the_library(tmp_path: Path) -> None:
    library = module_at(tmp_path / "venv/lib/site-packages/numbers/maths.py", "def divide(a, b):\n    return a / b\n")
    extension = module_at(
        tmp_path / "extensions/sd-webui-curves/scripts/curves.py", "def strength(divide):\n    return divide(1, 0)\n"
    )
    expected = (
        "the extension sd-webui-curves failed when it was asked for a strength "
        "(ZeroDivisionError: division by zero, in curves.py line 2); none is used"
    )
    assert said(lambda: extension.strength(library.divide)) == expected


def test_a_library_in_a_folder_of_extensions_is_none(tmp_path: Path) -> None:
    library = module_at(tmp_path / "extensions/venv/site-packages/maths.py", "def divide(a, b):\n    return a / b\n")
    assert said(lambda: library.divide(1, 0)).startswith("another program's code in maths.py failed")


def test_no_folder_and_no_flood_comes_into_the_image(tmp_path: Path) -> None:
    code = "def fail():\n    raise OSError('no /home/me/secret/file.txt\\n' + 'x' * 9999)\n"
    sentence = said(module_at(tmp_path / "extensions/other/it.py", code).fail)
    assert "file.txt" in sentence and "secret" not in sentence and "\n" not in sentence
    assert len(sentence) < 600
