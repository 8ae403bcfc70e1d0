"""Cases computed by PEFT.

Each case wraps a model of one layer with ``get_peft_model``, draws every adapter parameter, takes the file's tensors
from ``get_peft_model_state_dict`` (the ``base_model.model.`` prefix taken off) and ΔW from ``get_delta_weight`` or, for
what is not a sum, from ``merge`` less the base. A PEFT file holds no alpha: the scale of the layer goes to
``Case.config["scale"]``.

BOFT with more than one butterfly factor needs PEFT's CUDA extension for one step, a block diagonal. Without it PEFT
silently sets the factor to 1. Here a stand-in does that one step in torch; the permutations, the order of the stages
and the merge are PEFT's own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.boft import layer as boft_layer
from torch import Tensor, nn

from .cases import Case, Tensors, seeded
from .lycoris_oracle import as_stored, fill, inputs, layer

OUT, IN, RANK, ALPHA = 14, 10, 4, 6
NAME = "layer"
PREFIX = f"base_model.model.{NAME}."
CONV_KINDS = ("conv1d", "conv2d_1x1", "conv2d_3x3", "conv3d")
MULTIPLIERS = ("lora_magnitude_vector", "boft_s", "ia3_l")


class TorchBlockDiagonal:
    """What PEFT asks of its CUDA extension: ``(m, d, b, b)`` -> ``[(m, d·b, d·b)]``."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


class OneLayer(nn.Module):
    """A model of a single layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layer = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Spec:
    """How to build one case. ``additive``: the library gives ΔW itself; otherwise merge and subtract."""

    family: str
    variant: str
    kind: str
    make_config: type
    options: dict[str, Any] = field(default_factory=dict)
    additive: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    out: int = OUT
    inp: int = IN
    std: float = 0.4
    expects: frozenset[str] = frozenset()
    tier: int = 2

    @property
    def name(self) -> str:
        return f"peft/{self.family}/{self.variant}/{self.kind}"


@dataclass(frozen=True, eq=False)
class Built:
    """A case, the live model with the adapter not merged, and its bias before."""

    spec: Spec
    case: Case
    model: Any
    base_bias: Tensor | None


# ---- building


def draw(model: nn.Module, generator: torch.Generator, std: float) -> None:
    """A random value for each adapter parameter; factors that multiply move by a fifth around where they stand."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "base_layer" in name:
                continue
            if any(part in name for part in MULTIPLIERS):
                parameter.mul_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(noise * std)


@contextmanager
def block_diagonal_for(spec: Spec) -> Iterator[None]:
    """The stand-in where several butterfly factors are wanted, else no extension and no attempt to compile one."""
    before = boft_layer._FBD_CUDA
    boft_layer._FBD_CUDA = TorchBlockDiagonal if spec.options.get("boft_n_butterfly_factor", 1) > 1 else False
    try:
        yield
    finally:
        boft_layer._FBD_CUDA = before


def wrapped(spec: Spec, host: nn.Module) -> Any:
    """The PEFT model with a fresh adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(OneLayer(host), spec.make_config(target_modules=[NAME], **spec.options))


def file_tensors(model: Any) -> Tensors:
    """The state dict as PEFT saves it, by suffix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return as_stored({key.removeprefix(PREFIX): tensor for key, tensor in state.items()})


def build(spec: Spec) -> Built:
    """Layer and adapter with random values, the tensors as a file holds them, and PEFT's ΔW."""
    with block_diagonal_for(spec):
        return built_now(spec)


def built_now(spec: Spec) -> Built:
    """``build``, once the extension question is settled."""
    generator = seeded(spec.name)
    host = layer(spec.kind, spec.out, spec.inp)
    fill(host, generator, 0.3)
    model = wrapped(spec, host)
    draw(model, generator, spec.std)
    host_bias = getattr(host, "bias", None)
    base = host.weight.detach().clone()
    base_bias = None if host_bias is None else host_bias.detach().clone().double()
    tensors = file_tensors(model)
    if spec.expects and frozenset(tensors) != spec.expects:
        raise AssertionError(f"{spec.name}: wanted {sorted(spec.expects)}, PEFT saves {sorted(tensors)}")
    model = model.double().eval()
    peft_layer = model.base_model.model.layer
    config = dict(spec.config)
    if hasattr(peft_layer, "scaling"):
        config["scale"] = float(peft_layer.scaling["default"])
    if spec.family == "peft_ia3":
        config["base_bias"] = None if base_bias is None else base_bias.float()
    delta = peft_layer.get_delta_weight("default").detach().clone() if spec.additive else None
    merged_delta, bias_delta = by_merge(peft_layer, base, base_bias)
    case = Case(
        name=spec.name,
        family=spec.family,
        kind=spec.kind,
        source="peft",
        tensors=tensors,
        base=base,
        delta=merged_delta if delta is None else delta,
        bias_delta=bias_delta,
        config=config,
        tier=spec.tier,
    )
    return Built(spec, case, model, base_bias)


def by_merge(peft_layer: Any, base: Tensor, base_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Merge, look, and put the untouched values back by copy (unmerge only comes close)."""
    host = peft_layer.get_base_layer()
    with torch.no_grad():
        peft_layer.merge()
        weight = host.weight.detach().clone() - base.double()
        bias = None if base_bias is None else host.bias.detach().clone() - base_bias
        peft_layer.merged_adapters.clear()
        host.weight.data = base.double().clone()
        if base_bias is not None:
            host.bias.data = base_bias.clone()
    return weight, None if bias is None or not bias.any() else bias


# ---- specs

AB = frozenset({"lora_A.weight", "lora_B.weight"})
EMBEDDING = frozenset({"lora_embedding_A", "lora_embedding_B"})


def lora_specs() -> Iterator[Spec]:
    plain = {"r": RANK, "lora_alpha": ALPHA}
    for kind in ("linear", *CONV_KINDS):
        yield Spec("lora", "plain", kind, LoraConfig, plain, expects=AB, tier=1)
        bias = plain | {"lora_bias": True}
        yield Spec("lora", "lora_bias", kind, LoraConfig, bias, expects=AB | {"lora_B.bias"})
    for kind in ("linear", "conv2d_3x3", "embedding"):
        expects = EMBEDDING if kind == "embedding" else AB
        yield Spec("lora", "rslora", kind, LoraConfig, plain | {"use_rslora": True}, expects=expects, tier=1)
    yield Spec("lora", "plain", "embedding", LoraConfig, plain, expects=EMBEDDING, tier=1)
    yield Spec("lora", "square", "linear", LoraConfig, plain, out=12, inp=12, tier=1)
    yield Spec("lora", "square", "embedding", LoraConfig, plain, out=12, inp=12, tier=1)


def dora_specs() -> Iterator[Spec]:
    options = {"r": RANK, "lora_alpha": ALPHA, "use_dora": True}
    for kind in ("linear", *CONV_KINDS, "embedding"):
        expects = (EMBEDDING if kind == "embedding" else AB) | {"lora_magnitude_vector"}
        yield Spec("dora_lora", "plain", kind, LoraConfig, options, additive=False, expects=expects)
    yield Spec("dora_lora", "rslora", "linear", LoraConfig, options | {"use_rslora": True}, additive=False)
    yield Spec("dora_lora", "square", "linear", LoraConfig, options, additive=False, out=12, inp=12)
    yield Spec("dora_lora", "square", "conv2d_3x3", LoraConfig, options, additive=False, out=12, inp=12)
    yield Spec("dora_lora", "square", "embedding", LoraConfig, options, additive=False, out=12, inp=12)


def hada_specs() -> Iterator[Spec]:
    plain = {"r": RANK, "alpha": ALPHA}
    for kind in ("linear", "conv1d", "conv2d_1x1", "conv2d_3x3"):
        yield Spec("loha", "plain", kind, LoHaConfig, plain)
    for kind in ("conv1d", "conv2d_3x3"):
        yield Spec("loha_tucker", "effective", kind, LoHaConfig, plain | {"use_effective_conv2d": True})


def lokr_spec(variant: str, kind: str, expects: set[str], rank: int = 2, **options: Any) -> Spec:
    options = {"r": rank, "alpha": ALPHA, **options}
    names = frozenset(f"lokr_{name}" for name in expects)
    return Spec("lokr", variant, kind, LoKrConfig, options, out=30, inp=20, expects=names)


def odd_lokr_spec() -> Spec:
    """PEFT 0.21.2 on a Conv1d with both halves full: not among the cases, PEFT computes something else than LoKr.

    Its Kronecker product adds trailing axes to w1 for a 4-D w2 only. With a 3-D w2 torch pads w1 in FRONT, the product
    has shape ``(k, l·n, m·K)`` and is reshaped to the weight as it comes. Training and merging both do it.
    """
    return lokr_spec("w1_full", "conv1d", {"w1", "w2"}, rank=8)


def lokr_specs() -> Iterator[Spec]:
    spec = lokr_spec
    for kind in ("linear", "conv1d", "conv2d_1x1", "conv2d_3x3"):
        yield spec("w1_low", kind, {"w1", "w2_a", "w2_b"})
        yield spec("both_low", kind, {"w1_a", "w1_b", "w2_a", "w2_b"}, decompose_both=True)
        # Unlike LyCORIS, PEFT scales this one by alpha / r too.
        if kind != "conv1d":
            yield spec("w1_full", kind, {"w1", "w2"}, rank=8)
        yield spec("factor4", kind, {"w1", "w2_a", "w2_b"}, decompose_factor=4)
    for kind in ("conv1d", "conv2d_3x3"):
        yield spec("effective", kind, {"w1", "t2", "w2_a", "w2_b"}, use_effective_conv2d=True)


def oft_specs() -> Iterator[Spec]:
    for neumann in (True, False):
        for share in (False, True):
            for kind in ("linear", "conv2d_1x1", "conv2d_3x3"):
                way = "neumann" if neumann else "exact"
                variant = f"{way}_shared" if share else way
                options = {"r": 0, "oft_block_size": 5, "use_cayley_neumann": neumann, "block_share": share}
                known = {"use_cayley_neumann": neumann}
                expects = frozenset({"oft_R.weight"})
                yield Spec("peft_oft", variant, kind, OFTConfig, options, False, known, std=0.12, expects=expects)
    square = {"r": 0, "oft_block_size": 4}
    yield Spec("peft_oft", "square", "linear", OFTConfig, square, False, out=12, inp=12, std=0.12)


def boft_specs() -> Iterator[Spec]:
    """in 24 (or 8·9 = 72 in the 3x3 conv), blocks of 6 or 9 or 2: up to three stages."""
    for factors, block, inp in ((1, 6, 24), (2, 6, 24), (3, 6, 24), (4, 2, 16)):
        options = {"boft_block_size": block, "boft_n_butterfly_factor": factors}
        for kind in ("linear", "conv2d_1x1"):
            yield Spec("peft_boft", f"m{factors}", kind, BOFTConfig, options, False, inp=inp, std=0.3)
    for factors, block in ((1, 9), (3, 6)):
        options = {"boft_block_size": block, "boft_n_butterfly_factor": factors}
        yield Spec("peft_boft", f"m{factors}", "conv2d_3x3", BOFTConfig, options, False, inp=8, std=0.3)


def ia3_specs() -> Iterator[Spec]:
    for feedforward in (False, True):
        variant = "input" if feedforward else "output"
        options = {"feedforward_modules": [NAME] if feedforward else []}
        known = {"feedforward": feedforward}
        for kind in ("linear", "conv2d_1x1", "conv2d_3x3", "conv3d"):
            yield Spec("peft_ia3", variant, kind, IA3Config, options, False, known)
        for kind in ("linear", "conv2d_3x3"):
            yield Spec("peft_ia3", f"{variant}_square", kind, IA3Config, options, False, known, out=12, inp=12)


def specs() -> Iterator[Spec]:
    for group in (lora_specs, dora_specs, hada_specs, lokr_specs, oft_specs, boft_specs, ia3_specs):
        yield from group()


@cache
def built() -> tuple[Built, ...]:
    """Every model, alive and not merged."""
    with torch.random.fork_rng(devices=[]):
        return tuple(build(spec) for spec in specs())


def cases() -> tuple[Case, ...]:
    """Every case PEFT can compute."""
    return tuple(item.case for item in built())


def forward_gap(item: Built) -> float:
    """How far PEFT's unmerged forward is from the bare layer with W + ΔW and b + Δb, relative to the change."""
    spec, case = item.spec, item.case
    generator = seeded(spec.name + "/forward")
    x = torch.arange(spec.out) if spec.kind == "embedding" else inputs(spec.kind, spec.inp, generator)
    plain = layer(spec.kind, spec.out, spec.inp).double()
    with torch.no_grad():
        plain.weight.copy_(case.base)
        if item.base_bias is not None:
            plain.bias.copy_(item.base_bias)
        before = plain(x)
        plain.weight.add_(case.delta)
        if case.bias_delta is not None:
            plain.bias.add_(case.bias_delta)
        wanted = plain(x)
        with block_diagonal_for(spec):
            got = item.model(x)
    change = (wanted - before).abs().max().item()
    return (got - wanted).abs().max().item() / change if change else math.inf
