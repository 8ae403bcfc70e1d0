"""Adapters on models that went through torch.compile: known by their names, seen at once, taken off to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import lib_locon
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon import Session, Strengths, Use
from tests import random_adapters
from tests.oracles import naive
from tests.test_crew import bits
from tests.test_laws import lora

if TYPE_CHECKING:
    from tests.conftest import WriteAdapter

GROUPS = {"body.first": lora(8, 12), "body.second": lora(4, 8, seed=3)}
graphs: list[object] = []


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + 1


def eager(graph: Any, _: object) -> Callable[..., Any]:
    """torch's "eager" backend, that counts."""
    graphs.append(graph)
    forward: Callable[..., Any] = graph.forward
    return forward


def compiled(model: Any) -> Any:
    return torch.compile(model, backend=eager)


def part_compiled(model: Any, path: str) -> Any:
    """With the submodule at `path` compiled."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, compiled(model.get_submodule(path)))
    return model


@pytest.fixture(autouse=True)
def forget() -> None:
    torch.compiler.reset()
    graphs.clear()


def plain_names(weights: dict[str, bytes]) -> dict[str, bytes]:
    return {name.replace("_orig_mod.", ""): value for name, value in weights.items()}


@pytest.mark.parametrize(
    "make",
    [compiled, lambda model: part_compiled(model, "body"), lambda model: part_compiled(model, "body.first")],
    ids=["whole", "a part", "a layer"],
)
@torch.no_grad()
def test_a_compiled_model_gives_the_output_of_the_patched_weights_without_being_compiled_again(
    make: Callable[[nn.Module], nn.Module], write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    model = Net()
    wide, x = copy.deepcopy(model).double(), torch.randn(5, 12)
    held = make(model)
    before, plain = bits(held), held(x)
    assert any("_orig_mod." in name for name in before)
    session = Session(held)
    adapter = lib_locon.load(write_adapter(tmp_path / "a.safetensors", GROUPS))
    for strength in (0.7, -1.5):
        report = session.apply([Use(adapter, Strengths.both(strength))])
        assert (report.written, report.adapters[0].used, report.adapters[0].unmatched) == (2, 2, ())
        patched = copy.deepcopy(wide)
        for path, group in GROUPS.items():
            weight = patched.get_submodule(path).weight
            weight.copy_(naive.at_strength(weight, naive.lora(group, weight), strength))
        assert torch.allclose(held(x).double(), patched(x.double()), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(held(x), plain, atol=0.1)
    session.apply([])
    assert torch.equal(held(x), plain)
    assert bits(held) == before
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "make", [compiled, lambda model: part_compiled(model, "model.diffusion_model")], ids=["whole", "the UNet"]
)
def test_every_trainers_names_find_the_modules_of_a_compiled_model(make: Callable[[nn.Module], nn.Module]) -> None:
    ordinary, held = TinySD.random(0), make(TinySD.random(0))
    base = bits(held)
    assert sum("_orig_mod." in name for name in base) > 100
    uses = [Use(lib_locon.load(path)) for path in sorted(random_adapters.folder().iterdir())]
    session, other = Session(held), Session(ordinary)
    for use in uses:
        report, expected = session.apply([use]), other.apply([use])
        assert report.adapters == expected.adapters
        assert report.adapters[0].used == report.adapters[0].total > 0
        assert plain_names(bits(held)) == bits(ordinary)
    session.restore()
    assert bits(held) == base
