"""Laws of whole stacks: several files of any family and dtype on one model, set after set, merged or beside the layers.

The files are those of the trainers' own cases (`tests.oracles`), rounded to the file's dtype; every expected weight is
base + Σ strength · ΔW by the scalar formulas in float64, from what the model and the file hold.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.patching.bits import same_bits
from tests import conformance
from tests.oracles import naive
from tests.oracles.cases import Case, all_cases
from tests.oracles.lycoris_oracle import inputs
from tests.test_crew import bits
from tests.test_engine import strange
from tests.test_side_path import NOISE, error, hooked, output

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FP64_NOISE = 1e-12
"""Of the sums that are made in fp64, for weights of that dtype."""
ADDITIVE = {"lora", "tucker", "sparse", "loha", "loha_tucker", "lokr", "full"}
"""Families whose ΔW is that of no base, so that it can run beside the layer."""
UNTOUCHED = "untouched"


@cache
def slots() -> dict[str, list[str]]:
    """The name of a layer, for each kind and shape that there are cases of → the names of all of them."""
    found: dict[str, list[str]] = {}
    for case in all_cases():
        found.setdefault("_".join((case.kind, *map(str, case.base.shape))), []).append(case.name)
    return found


def by_family(among: list[str]) -> list[list[str]]:
    """The cases for these layers."""
    names = sorted((name for slot in among for name in slots()[slot]), key=family)
    return [list(same) for _, same in itertools.groupby(names, family)]


def family(name: str) -> str:
    return name.split("/")[1]


@cache
def rounded(name: str, dtype: torch.dtype) -> Case:
    """The case with its numbers in the file's dtype; flags, indices and sizes stay as they are."""
    case = next(case for case in all_cases() if case.name == name)
    numbers = {suffix: t.to(dtype) if t.is_floating_point() else t for suffix, t in case.tensors.items()}
    return replace(case, tensors=numbers)


@dataclass(frozen=True)
class File:
    """Of one trainer: a case for each of some layers."""

    dtype: torch.dtype
    names: dict[str, str]

    @property
    def cases(self) -> dict[str, Case]:
        return {slot: rounded(name, self.dtype) for slot, name in self.names.items()}

    def write(self, folder: Path) -> Path:
        """As its trainer writes it; PEFT's with its configuration, which says one scale for all."""
        folder.mkdir()
        peft = any(case.source == "peft" for case in self.cases.values())
        prefix = "base_model.model." if peft else "lora_unet_"
        tensors = {key: t for slot, case in self.cases.items() for key, t in case.prefixed(prefix + slot).items()}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter.safetensors")
        if peft:
            ((slot, case),) = self.cases.items()
            (folder / "adapter_config.json").write_text(json.dumps(conformance.peft_settings(case, slot)))
        return folder / "adapter.safetensors"


@dataclass(frozen=True)
class Stack:
    """A model's dtype and layers, files for them, and sets to be applied: (number of the file, strength)."""

    dtype: torch.dtype
    slots: list[str]
    files: list[File]
    sets: list[list[tuple[int, float]]]

    def model(self) -> nn.Module:
        """The layers, with a bias where their kind has one, and one that no file names."""
        layers = {slot: conformance.layer_for(rounded(slots()[slot][0], torch.float32)) for slot in self.slots}
        return nn.ModuleDict({**layers, UNTOUCHED: nn.Linear(5, 5)}).to(self.dtype).eval().requires_grad_(False)

    def load(self, folder: Path) -> list[lib_locon.Adapter]:
        return [lib_locon.load(file.write(folder / str(number))) for number, file in enumerate(self.files)]


def any_file(rng: random.Random, among: list[str]) -> File:
    some = rng.sample(among, rng.randint(1, len(among)))
    names = {slot: rng.choice(rng.choice(by_family([slot]))) for slot in some}
    alone = [slot for slot, name in names.items() if name.startswith("peft/")][:1]
    return File(rng.choice(DTYPES), {slot: names[slot] for slot in alone or some})


@st.composite
def stacks(draw: st.DrawFn, among: list[str]) -> Stack:
    """Families by a generator of its own, so that each is met about as often; sets by hypothesis, to be made small."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    firsts = [rng.choice(rng.choice(by_family(among))) for _ in range(draw(st.integers(1, 3)))]
    chosen = sorted({slot for slot in among if not set(firsts).isdisjoint(slots()[slot])})
    files = [any_file(rng, chosen) for _ in range(draw(st.integers(1, 4)))]
    strengths = st.one_of(st.sampled_from([1.0, -1.0, 0.5, 0.0]), st.floats(-2, 2, width=32))
    uses = st.tuples(st.integers(0, len(files) - 1), strengths)
    sets = draw(st.lists(st.lists(uses, min_size=1, max_size=5), min_size=1, max_size=3))
    return Stack(rng.choice(DTYPES), chosen, files, sets)


def sums(stack: Stack, base: dict[str, Tensor]) -> list[dict[str, tuple[Tensor, float]]]:
    """For each set, the parameters that it changes: base + Σ strength · ΔW in float64, and how far off they may be."""
    changes = [changes_of(file, base) for file in stack.files]
    found = []
    for uses in stack.sets:
        totals: dict[str, tuple[Tensor, float]] = {}
        for number, change in enumerate(changes):
            strength = math.fsum(strength for file, strength in uses if file == number)
            for name, (delta, noise) in change.items() if strength else ():
                total, before = totals.get(name, (base[name].double(), own_noise(base[name])))
                off = before + noise * abs(strength) * float(delta.abs().max())
                totals[name] = naive.at_strength(total, delta, strength), off
        found.append(totals)
    return found


def changes_of(file: File, base: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
    """Parameter → its ΔW by formula, from this base, and the noise of that as a share of it."""
    found: dict[str, tuple[Tensor, float]] = {}
    for slot, case in file.cases.items():
        weight, bias = base[f"{slot}.weight"], base.get(f"{slot}.bias")
        # what trainers add to a norm of DoRA is of the size of fp32's noise; a Tucker core is folded in fp32
        single = weight.dtype != torch.float64 or case.family.startswith(("dora", "tucker"))
        noise = conformance.FP32_NOISE if single else FP64_NOISE
        found[f"{slot}.weight"] = naive.delta(case.family, case.tensors, weight.double(), case.config), noise
        shift = naive.bias_delta(case.family, case.tensors, {**case.config, "base_bias": bias})
        if shift is not None:
            found[f"{slot}.bias"] = shift, noise
    return found


def own_noise(base: Tensor) -> float:
    noise = FP64_NOISE if base.dtype == torch.float64 else conformance.FP32_NOISE
    return noise * float(base.abs().max())


def wrong(model: nn.Module, expected: dict[str, tuple[Tensor, float]], base: dict[str, Tensor]) -> list[str]:
    """The parameters that are not the sum, rounded once; or, where no sum is expected, not the base."""
    found = []
    for name, parameter in model.named_parameters():
        if name in expected:
            total, noise = expected[name]
            step = torch.finfo(parameter.dtype).eps / 2 * total.abs()
            found += [name] * (not bool(((parameter.double() - total).abs() <= noise + step).all()))
        else:
            found += [name] * (not same_bits(parameter, base[name]))
    return found


def uses_of(adapters: list[lib_locon.Adapter], chosen: Sequence[tuple[int, float]]) -> list[lib_locon.Use]:
    return [lib_locon.Use(adapters[number], lib_locon.Strengths.both(strength)) for number, strength in chosen]


@settings(max_examples=200)
@given(stack=stacks(list(slots())), order=st.randoms(use_true_random=False))
def test_after_every_set_the_model_holds_its_sum_and_nothing_of_the_sets_before(
    stack: Stack, order: random.Random
) -> None:
    model = stack.model()
    fresh, pristine = copy.deepcopy(model), bits(model)
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    session = lib_locon.Session(model)
    with tempfile.TemporaryDirectory() as folder:
        adapters = stack.load(Path(folder))
    for chosen, expected in zip(stack.sets, sums(stack, base), strict=True):
        report = session.apply(uses_of(adapters, chosen))
        assert not any(adapter.unmatched for adapter in report.adapters), report
        assert wrong(model, expected, base) == []
        held = bits(model)
        assert session.apply(uses_of(adapters, chosen)).written == 0
        shuffled = order.sample(chosen, len(chosen))
        assert session.apply(uses_of(adapters, shuffled)).written == 0
        lib_locon.Session(fresh).apply(uses_of(adapters, shuffled))  # what was there before leaves no trace
        assert bits(fresh) == held == bits(model)
        lib_locon.Session(fresh).restore()
        assert bits(fresh) == pristine
    session.apply([])
    assert bits(model) == pristine
    assert not session.active


@settings(max_examples=200)
@given(stack=stacks([slot for slot in slots() if slot.startswith(("linear", "conv"))]))
def test_beside_its_layers_a_set_gives_the_output_of_its_sum_and_leaves_no_hook(stack: Stack) -> None:
    model = stack.model()
    pristine = bits(model)
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    session = lib_locon.Session(model, side_path=True)
    with tempfile.TemporaryDirectory() as folder:
        adapters = stack.load(Path(folder))
    for chosen, expected in zip(stack.sets, sums(stack, base), strict=True):
        session.apply(uses_of(adapters, chosen))
        assert session.apply(uses_of(adapters, chosen)).written == 0
        for slot in stack.slots:
            layer, case = model[slot], rounded(slots()[slot][0], torch.float32)
            x = inputs(case.kind, case.base.shape[1], torch.Generator().manual_seed(0)).to(stack.dtype)
            weight, bias = (expected.get(f"{slot}.{name}", (base[f"{slot}.{name}"],))[0] for name in ("weight", "bias"))
            assert error(layer(x), output(layer, x, weight, bias)) < NOISE.get(stack.dtype, 1e-5), slot
            families = {file.cases[slot].family for file in stack.files if slot in file.names}
            if families <= ADDITIVE:
                assert all(same_bits(value, base[f"{slot}.{name}"]) for name, value in layer.named_parameters())
                assert (slot in hooked(model)) == (f"{slot}.weight" in expected)
    session.apply([])
    assert hooked(model) == []
    assert bits(model) == pristine
    assert not session.active


@settings(max_examples=60)
@given(
    stack=stacks([slot for slot in slots() if not slot.startswith("linear")]), order=st.randoms(use_true_random=False)
)
def test_numbers_that_no_arithmetic_brings_back_come_back_from_any_sets(stack: Stack, order: random.Random) -> None:
    """NaN, infinities, -0.0. (Linear layers left out: T-LoRA takes the base's singular values, and refuses NaN.)"""
    model = stack.model()
    strange(model)
    fresh, pristine = copy.deepcopy(model), bits(model)
    session, other = lib_locon.Session(model), lib_locon.Session(fresh)
    with tempfile.TemporaryDirectory() as folder:
        adapters = stack.load(Path(folder))
    for chosen in stack.sets:
        session.apply(uses_of(adapters, chosen))
        other.restore()
        assert bits(fresh) == pristine
        other.apply(uses_of(adapters, order.sample(chosen, len(chosen))))
        assert bits(fresh) == bits(model)
    session.apply([])
    assert bits(model) == pristine
