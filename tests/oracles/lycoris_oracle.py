"""Cases computed by LyCORIS' own modules.

Each case builds one module of the library on one small layer, gives every parameter a random value, takes the file's
tensors from the module's ``state_dict`` and ΔW from the method that can be trusted for that family. Parameters are
drawn in float32 and the module is then widened to float64, so the tensors of the case are exactly what the library
computed with (OFT and BOFT cast to float32 inside and stay there).

Not used, because they are wrong in 4.1.3: ``get_diff_weight`` and ``get_merged_weight`` of LoHa and LoKr (alpha/rank
twice, ``scalar`` not at all), ``get_diff_weight`` of DyLoRA (a random rank), the state dict of Full before ``apply_to``
(subtracts the base).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from lycoris.modules.tlora import TLoraModule
from lycoris.utils import extract_conv, extract_linear, make_sparse
from torch import Tensor, nn

from .cases import Case, Tensors, seeded

logging.getLogger("LyCORIS").setLevel(logging.ERROR)

OUT, IN, RANK = 14, 10, 4
WEIGHT_KINDS = ("linear", "conv1d", "conv2d_1x1", "conv2d_3x3", "conv3d")
SPATIAL_KINDS = ("conv1d", "conv2d_3x3", "conv3d")
SINGLE_PRECISION = {"oft", "boft"}
MULTIPLIERS = {"dora_scale", "rescale", "lambda_layer"}

Delta = Callable[[Any, Tensor], tuple[Tensor, Tensor | None]]


# ---- layers, random values


def layer(kind: str, out: int, inp: int, groups: int = 1) -> Any:
    """A layer of the kind, with a bias; its values do not matter yet."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(inp, out),
        "conv1d": lambda: nn.Conv1d(inp, out, 3, padding=1, groups=groups),
        "conv2d_1x1": lambda: nn.Conv2d(inp, out, 1, groups=groups),
        "conv2d_3x3": lambda: nn.Conv2d(inp, out, 3, padding=1, groups=groups),
        "conv3d": lambda: nn.Conv3d(inp, out, 3, padding=1, groups=groups),
        "embedding": lambda: nn.Embedding(out, inp),
        "layernorm": lambda: nn.LayerNorm(out),
        "groupnorm": lambda: nn.GroupNorm(2, out),
    }
    return makers[kind]()


def inputs(kind: str, inp: int, generator: torch.Generator) -> Tensor:
    """Something to run the layer on: two samples, and a few positions where the layer is spatial."""
    sizes = {"linear": (), "conv1d": (5,), "conv2d_1x1": (4, 3), "conv2d_3x3": (4, 3), "conv3d": (3, 4, 3)}[kind]
    return torch.randn(2, inp, *sizes, generator=generator, dtype=torch.float64)


def fill(module: nn.Module, generator: torch.Generator, std: float) -> None:
    """A random value for every parameter; a magnitude or a rescale keeps its own size and moves by a fifth of it."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.split(".")[-1] in MULTIPLIERS:
                parameter.mul_(1.0 + 0.2 * noise)
            elif name == "scalar":
                parameter.fill_(0.5)
            else:
                parameter.copy_(noise * std)


def as_stored(tensors: dict[str, Tensor]) -> Tensors:
    """Float64 back to float32 (the values came from float32), integers as they are; detached copies."""
    return {
        name: (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).clone().contiguous()
        for name, tensor in tensors.items()
    }


# ---- what to trust where


def by_diff(module: Any, base: Tensor) -> tuple[Tensor, Tensor | None]:
    """``get_diff_weight`` at strength 1: right for all but LoHa, LoKr, DyLoRA, OFT, BOFT."""
    weight, bias = module.get_diff_weight(1.0, None)
    return weight.reshape(base.shape), bias


def by_weight(module: Any, base: Tensor) -> tuple[Tensor, Tensor | None]:
    """``get_weight``: LoHa and LoKr. It leaves ``scalar`` out; the state dict and the forward pass have it in."""
    return module.get_weight(base.shape) * module.scalar, None


def by_decomposition(module: Any, base: Tensor) -> tuple[Tensor, Tensor | None]:
    """DoRA as the training forward does it: decompose W + D, with D scaled once whatever the family."""
    inner = module.get_diff_weight(1, base.shape)[0] if isinstance(module, LoConModule) else by_weight(module, base)[0]
    return module.apply_weight_decompose(base + inner, 1) - base, None


def by_merge(module: Any, base: Tensor) -> tuple[Tensor, Tensor | None]:
    """``get_merged_weight`` at strength 1 less W: OFT and BOFT, whose strengths other than 1 are their own affair."""
    return module.get_merged_weight(1.0, base.shape)[0] - base, None


# ---- specs


@dataclass(frozen=True)
class Spec:
    """How to build one case: the library's class, its options, and the layer."""

    family: str
    variant: str
    kind: str
    cls: type
    trust: Delta
    rank: int = RANK
    alpha: float | None = 1.5
    options: dict[str, Any] = field(default_factory=dict)
    out: int = OUT
    inp: int = IN
    groups: int = 1
    std: float = 0.4
    expects: frozenset[str] = frozenset()
    tier: int = 1

    @property
    def name(self) -> str:
        return f"lycoris/{self.family}/{self.variant}/{self.kind}"


@dataclass(frozen=True, eq=False)
class Built:
    """A case and the live module it came from, for a second opinion through the forward pass."""

    spec: Spec
    case: Case
    module: Any
    layer: nn.Module


def build(spec: Spec) -> Built:
    """Layer and module with random values, the tensors as a file holds them, and the library's ΔW."""
    generator = seeded(spec.name)
    host = layer(spec.kind, spec.out, spec.inp, spec.groups)
    fill(host, generator, 0.3)
    base = as_stored({"w": host.weight})["w"]
    settings: dict[str, Any] = {"multiplier": 1.0, **spec.options}
    if spec.cls is not NormModule:
        settings |= {"lora_dim": spec.rank, "alpha": spec.alpha}
    module = spec.cls("x", host, **settings)
    if spec.cls is FullModule:
        module.apply_to()
        fill(module, generator, spec.std)
    else:
        fill(module, generator, spec.std)
    move_off_start(module, generator)
    if spec.family not in SINGLE_PRECISION:
        host.double()
        module.double()
        base = base.double()
    module.eval()
    with torch.no_grad():
        weight, bias = spec.trust(module, base)
        tensors = as_stored(dict(module.state_dict()))
    check_suffixes(spec, tensors)
    case = Case(
        name=spec.name,
        family=spec.family,
        kind=spec.kind,
        source="lycoris",
        tensors=tensors,
        base=base.float(),
        delta=weight.detach().clone(),
        bias_delta=None if bias is None else bias.detach().clone(),
        tier=spec.tier,
    )
    return Built(spec, case, module, host)


def move_off_start(module: Any, generator: torch.Generator) -> None:
    """T-LoRA subtracts its starting point, so its factors must be that start plus something, not noise alone."""
    if not isinstance(module, TLoraModule):
        return
    with torch.no_grad():
        pairs: Any = ((module.q_layer.weight, module.base_q), (module.p_layer.weight, module.base_p))
        for now, start in pairs:
            now.copy_(start + 0.3 * torch.randn(start.shape, generator=generator))


def check_suffixes(spec: Spec, tensors: Tensors) -> None:
    """The options gave the form that the spec is about: LyCORIS falls back to full matrices without an error."""
    if spec.expects and frozenset(tensors) != spec.expects:
        raise AssertionError(f"{spec.name}: wanted {sorted(spec.expects)}, the module has {sorted(tensors)}")


# ---- LoRA and LoCon

PLAIN = frozenset({"alpha", "lora_up.weight", "lora_down.weight"})
CP = PLAIN | {"lora_mid.weight"}
WD = {"dora_scale"}


def lora_specs() -> Iterator[Spec]:
    for kind in WEIGHT_KINDS:
        yield Spec("lora", "plain", kind, LoConModule, by_diff, expects=PLAIN)
        yield Spec("lora", "use_scalar", kind, LoConModule, by_diff, options={"use_scalar": True}, expects=PLAIN)
        yield Spec("lora", "rs_lora", kind, LoConModule, by_diff, options={"rs_lora": True}, expects=PLAIN)
    yield Spec("lora", "rank1", "linear", LoConModule, by_diff, rank=1, alpha=0.5)
    yield Spec("lora", "wide_rank", "linear", LoConModule, by_diff, rank=13, alpha=26.0)
    yield Spec("lora", "negative_alpha", "linear", LoConModule, by_diff, alpha=-2.0)
    yield Spec("lora", "integer_alpha", "linear", LoConModule, by_diff, alpha=8)
    yield Spec("lora", "square", "linear", LoConModule, by_diff, out=12, inp=12)
    yield Spec("lora", "square", "conv2d_3x3", LoConModule, by_diff, out=12, inp=12)
    yield Spec("lora", "grouped", "conv2d_3x3", LoConModule, by_diff, groups=2)
    tucker = {"use_tucker": True}
    for kind in SPATIAL_KINDS:
        yield Spec("tucker", "plain", kind, LoConModule, by_diff, options=tucker, expects=CP)
    yield Spec("tucker", "use_scalar", "conv2d_3x3", LoConModule, by_diff, options=tucker | {"use_scalar": True})
    yield Spec("tucker", "rs_lora", "conv2d_3x3", LoConModule, by_diff, options=tucker | {"rs_lora": True})
    yield Spec("tucker", "square", "conv2d_3x3", LoConModule, by_diff, options=tucker, out=12, inp=12)
    # A 1x1 kernel is stored in the plain form even with use_tucker.
    yield Spec("lora", "use_tucker", "conv2d_1x1", LoConModule, by_diff, options=tucker, expects=PLAIN)


# ---- LoHa

HADA = frozenset({"alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
HADA_CP = HADA | {"hada_t1", "hada_t2"}


def loha_specs() -> Iterator[Spec]:
    tucker = {"use_tucker": True}
    for kind in WEIGHT_KINDS:
        yield Spec("loha", "plain", kind, LohaModule, by_weight, expects=HADA)
    for kind in SPATIAL_KINDS:
        yield Spec("loha_tucker", "plain", kind, LohaModule, by_weight, options=tucker, expects=HADA_CP)
    for option in ("use_scalar", "rs_lora"):
        for kind in ("linear", "conv2d_3x3"):
            yield Spec("loha", option, kind, LohaModule, by_weight, options={option: True})
        yield Spec("loha_tucker", option, "conv2d_3x3", LohaModule, by_weight, options=tucker | {option: True})
    yield Spec("loha", "square", "linear", LohaModule, by_weight, out=12, inp=12)
    yield Spec("loha_tucker", "square", "conv2d_3x3", LohaModule, by_weight, options=tucker, out=12, inp=12)
    yield Spec("loha", "grouped", "conv2d_3x3", LohaModule, by_weight, groups=2)


# ---- LoKr

LEFT = {"full": {"lokr_w1"}, "both": {"lokr_w1_a", "lokr_w1_b"}}
RIGHT = {
    "full": {"lokr_w2"},
    "low": {"lokr_w2_a", "lokr_w2_b"},
    "tucker": {"lokr_t2", "lokr_w2_a", "lokr_w2_b"},
}


def lokr_spec(variant: str, kind: str, left: str, right: str, rank: int = 2, **options: Any) -> Spec:
    """out 30 and in 20 split as 5·6 and 4·5 at factor -1: rank 2 is under half of every part."""
    options |= {"decompose_both": left == "both", "use_tucker": right == "tucker"}
    expects = frozenset({"alpha"} | LEFT[left] | RIGHT[right])
    return Spec("lokr", variant, kind, LokrModule, by_weight, rank, 1.5, options, out=30, inp=20, expects=expects)


def lokr_specs() -> Iterator[Spec]:
    for kind in WEIGHT_KINDS:
        yield lokr_spec("w1_low", kind, "full", "low")
        yield lokr_spec("w1_full", kind, "full", "full", rank=8)
        yield lokr_spec("both_low", kind, "both", "low")
        # w1 (15, 2) and w2 (2, 10): the one way to have the left half decomposed beside a full right half.
        yield lokr_spec("both_full", kind, "both", "full", rank=6, factor=2, unbalanced_factorization=True)
        yield lokr_spec("unbalanced", kind, "full", "low", factor=2, unbalanced_factorization=True)
        yield lokr_spec("full_matrix", kind, "full", "full", full_matrix=True)
        for factor in (2, 4):
            yield lokr_spec(f"factor{factor}", kind, "full", "low", factor=factor)
    for kind in SPATIAL_KINDS:
        yield lokr_spec("w1_tucker", kind, "full", "tucker")
        yield lokr_spec("both_tucker", kind, "both", "tucker")
        yield lokr_spec("tucker_factor4", kind, "full", "tucker", rank=4, factor=4)
    # The loader that takes the rank from w2_a's second axis is wrong here: (r, k) with r = 2 and k = 10.
    yield lokr_spec("tucker_unbalanced", "conv2d_3x3", "both", "tucker", factor=2, unbalanced_factorization=True)
    for option in ("use_scalar", "rs_lora"):
        yield lokr_spec(option, "linear", "full", "low", **{option: True})
        yield lokr_spec(f"both_{option}", "conv2d_3x3", "both", "low", **{option: True})
    # dim 100000: alpha is meaningless (and infinite once cast to fp16), the scale is 1.
    yield lokr_spec("dim100000", "linear", "full", "full", rank=100000)
    square = lokr_spec("square", "linear", "both", "low")
    yield Spec(**{**vars(square), "out": 30, "inp": 30})


# ---- DoRA


def dora_specs() -> Iterator[Spec]:
    for axis, on_out in (("output", True), ("input", False)):
        wd = {"weight_decompose": True, "wd_on_out": on_out}

        def spec(family: str, kind: str, cls: type, size: tuple[int, int] = (OUT, IN), **options: Any) -> Spec:
            rank = 2 if cls is LokrModule else RANK
            options = {**wd, **options}  # noqa: B023 - used within this turn of the loop
            variant = f"{axis}_square" if size[0] == size[1] else axis  # noqa: B023
            return Spec(
                family, variant, kind, cls, by_decomposition, rank, options=options, out=size[0], inp=size[1], tier=2
            )

        for kind in WEIGHT_KINDS:
            yield spec("dora_lora", kind, LoConModule)
            yield spec("dora_loha", kind, LohaModule)
            yield spec("dora_lokr", kind, LokrModule, (30, 20))
        yield spec("dora_tucker", "conv2d_3x3", LoConModule, use_tucker=True)
        yield spec("dora_loha_tucker", "conv2d_3x3", LohaModule, use_tucker=True)
        for family, cls in (("dora_lora", LoConModule), ("dora_loha", LohaModule), ("dora_lokr", LokrModule)):
            yield spec(family, "linear", cls, (20, 20))
        yield spec("dora_lora", "conv2d_3x3", LoConModule, (12, 12))


# ---- Full, Norm, IA3, GLoRA, T-LoRA


def dense_specs() -> Iterator[Spec]:
    for kind in WEIGHT_KINDS:
        yield Spec("full", "plain", kind, FullModule, by_diff, expects=frozenset({"diff", "diff_b"}), tier=2)
        for side, on_input in (("output", False), ("input", True)):
            yield Spec("ia3", side, kind, IA3Module, by_diff, options={"train_on_input": on_input}, tier=2)
        yield Spec("glora", "new", kind, GLoRAModule, by_diff, tier=2)
    for kind in ("layernorm", "groupnorm"):
        yield Spec("norm", "plain", kind, NormModule, by_diff, expects=frozenset({"w_norm", "b_norm"}), tier=2)
    for side, on_input in (("output_square", False), ("input_square", True)):
        for kind in ("linear", "conv2d_3x3"):
            options = {"train_on_input": on_input}
            yield Spec("ia3", side, kind, IA3Module, by_diff, options=options, out=12, inp=12, tier=2)
    yield Spec("glora", "use_scalar", "linear", GLoRAModule, by_diff, options={"use_scalar": True}, tier=2)
    yield Spec("glora", "square", "linear", GLoRAModule, by_diff, out=12, inp=12, tier=2)
    yield Spec("tlora", "principal", "linear", TLoraModule, by_diff, tier=2)
    yield Spec("tlora", "principal_square", "linear", TLoraModule, by_diff, out=12, inp=12, tier=2)


# ---- OFT and BOFT


def oft_specs() -> Iterator[Spec]:
    """out 24: Diag-OFT of 6 blocks of 4, BOFT of 4 blocks of 6 in 3 stages. A constraint of 0.01 bites, 10 does not."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "constraint": {"constraint": 0.01},
        "loose_constraint": {"constraint": 10.0},
        "rescale": {"rescaled": True},
        "constraint_rescale": {"constraint": 0.01, "rescaled": True},
    }
    for kind in WEIGHT_KINDS:
        for variant, options in variants.items():
            for family, cls, rank in (("oft", DiagOFTModule, 4), ("boft", ButterflyOFTModule, 8)):
                yield Spec(family, variant, kind, cls, by_merge, rank, None, options, out=24, std=0.15, tier=2)
    yield Spec("oft", "square", "linear", DiagOFTModule, by_merge, 4, None, out=16, inp=16, std=0.15, tier=2)
    yield Spec("boft", "four_stages", "linear", ButterflyOFTModule, by_merge, 4, None, out=32, std=0.15, tier=2)


# ---- cases that no module writes


def old_glora(case: Case) -> Case:
    """The same adapter in the layout of 2023: the names of the two factors change places in both halves."""
    swap = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}
    tensors = {swap.get(suffix, suffix): tensor for suffix, tensor in case.tensors.items()}
    name = case.name.replace("/new/", "/old/").replace("/square/", "/old_square/")
    return Case(name, case.family, case.kind, case.source, tensors, case.base, case.delta, tier=2)


def sparse_case(kind: str) -> Case:
    """LyCORIS' extraction of a known difference, nothing of the residual dropped: the file must give it back whole."""
    name = f"lycoris/sparse/extracted/{kind}"
    generator = seeded(name)
    host = layer(kind, OUT, IN)
    fill(host, generator, 0.3)
    difference = 0.1 * torch.randn(host.weight.shape, generator=generator)
    extract = extract_linear if kind == "linear" else extract_conv
    (down, up, rest), mode = extract(difference.clone(), "fixed", RANK, device="cpu")
    if mode != "low rank":
        raise AssertionError(f"{name}: extraction chose {mode}")
    residual = make_sparse(rest.reshape(OUT, -1), 0.0).to_sparse().coalesce()
    tensors = {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "alpha": torch.tensor([float(RANK)]),
        "bias_indices": residual.indices().to(torch.int16),
        "bias_values": residual.values(),
        "bias_size": torch.tensor(residual.shape).to(torch.int16),
    }
    return Case(
        name, "sparse", kind, "lycoris", as_stored(tensors), as_stored({"w": host.weight})["w"], difference, tier=2
    )


# ---- all cases


def specs() -> Iterator[Spec]:
    for group in (lora_specs, loha_specs, lokr_specs, dora_specs, dense_specs, oft_specs):
        yield from group()


@cache
def built() -> tuple[Built, ...]:
    """Every module, alive."""
    with torch.random.fork_rng(devices=[]):
        return tuple(build(spec) for spec in specs())


def cases() -> tuple[Case, ...]:
    """Every case LyCORIS can compute."""
    found = [item.case for item in built()]
    found += [old_glora(case) for case in found if case.family == "glora" and "/new/" in case.name]
    found += [old_glora(case) for case in found if case.family == "glora" and "/square/" in case.name]
    return (*found, *(sparse_case(kind) for kind in ("linear", "conv2d_1x1", "conv2d_3x3")))


def forward_gap(item: Built) -> float:
    """How far the module's own forward pass is from the layer run with W + ΔW (and b + Δb), relative to the change.

    The forward pass shares no code with ``get_weight``'s callers: this is where a ΔW scaled twice would show.
    """
    spec, case = item.spec, item.case
    generator = seeded(spec.name + "/forward")
    double = spec.family not in SINGLE_PRECISION
    x = inputs(spec.kind, spec.inp, generator)
    x = x if double else x.float()
    wanted_host = layer(spec.kind, spec.out, spec.inp, spec.groups)
    wanted_host = wanted_host.double() if double else wanted_host
    bias = item.module.org_bias[0] if spec.cls is FullModule else item.layer.bias
    with torch.no_grad():
        wanted_host.weight.copy_(case.base)
        wanted_host.bias.copy_(bias)
        before = wanted_host(x)
        wanted_host.weight.add_(case.delta)
        if case.bias_delta is not None:
            wanted_host.bias.add_(case.bias_delta)
        wanted = wanted_host(x)
        got = item.module(x)
    change = (wanted - before).abs().max().item()
    return (got - wanted).abs().max().item() / change if change else math.inf
