"""What trainers train in SD2, SDXL, its refiner, SD3 and Flux, and under which names they write it.

The module lists are made from the plan of each network (levels, depths, widths) and from the rule by which a trainer
picks its targets; nothing of ``lib_locon`` is used. They were compared once with the classes themselves: the webui's
(ldm, sgm) and diffusers' 0.42.1 for the UNets; ``tests/fixtures`` holds those names, and a test compares again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from .trainer_files import (
    ATTENTION,
    DOWN,
    KOHYA_TEXT,
    KOHYA_UNET,
    KOHYA_UNET_CONV,
    LYCORIS_FULL_NAMES,
    MLP,
    RESNET,
    TRANSFORMER,
    UP,
    Block,
    Module,
    Sizes,
    kohya_targets,
    resnet,
    skip_widths,
    te_modules,
)

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """A UNet of this kind. ``depths``: transformer blocks per level (0: no attention); ``adm``: width of the vector."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    context: int
    linear: bool = True
    adm: int = 0
    sgm: bool = False
    """Whether kohya trains it under sgm's names (it does where it has a UNet class of sgm's plan)."""
    text: tuple[tuple[str, Sizes], ...] = ()
    """Text encoders: their part (``te``, ``te1``, ``te2``) and sizes."""

    @property
    def middle(self) -> int:
        return max(self.depths)


CLIP_L = Sizes(0, 0, 768)
CLIP_H = Sizes(0, 0, 1024, clip_layers=23)
"""SD2's: the trainers hold 23 layers, the last but one being what the model reads."""
CLIP_G = Sizes(0, 0, 1280, clip_layers=32)
PLANS = {
    "sd15": Plan((320, 640, 1280, 1280), (1, 1, 1, 0), 768, linear=False, text=(("te", CLIP_L),)),
    "sd21": Plan((320, 640, 1280, 1280), (1, 1, 1, 0), 1024, text=(("te", CLIP_H),)),
    "sdxl": Plan((320, 640, 1280), (0, 2, 10), 2048, adm=2816, sgm=True, text=(("te1", CLIP_L), ("te2", CLIP_G))),
    "sdxl_refiner": Plan((384, 768, 1536, 1536), (0, 4, 4, 0), 1280, adm=2560, sgm=True, text=(("te2", CLIP_G),)),
}


# ---- the UNet


def attention(block: Block, width: int, context: int, depth: int, linear: bool) -> Iterator[Module]:
    """Named alike in both namings."""

    def same(name: str, type_: str, *shape: int, bias: bool = True) -> Module:
        return block.leaf(name, name, type_, *shape, bias=bias)

    def projection(name: str) -> Module:
        return same(name, "Linear", width, width) if linear else same(name, "Conv2d", width, width, 1, 1)

    yield same("norm", "GroupNorm", width)
    yield projection("proj_in")
    for n in range(depth):
        inner = f"transformer_blocks.{n}"
        for name, source in (("attn1", width), ("attn2", context)):
            yield same(f"{inner}.{name}.to_q", "Linear", width, width, bias=False)
            yield same(f"{inner}.{name}.to_k", "Linear", width, source, bias=False)
            yield same(f"{inner}.{name}.to_v", "Linear", width, source, bias=False)
            yield same(f"{inner}.{name}.to_out.0", "Linear", width, width)
        yield same(f"{inner}.ff.net.0.proj", "Linear", 8 * width, width)
        yield same(f"{inner}.ff.net.2", "Linear", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            yield same(f"{inner}.{norm}", "LayerNorm", width)
    yield projection("proj_out")


def _down(plan: Plan, time: int) -> Iterator[Module]:
    inp, last = plan.widths[0], len(plan.widths) - 1
    for level, (out, depth) in enumerate(zip(plan.widths, plan.depths, strict=True)):
        for layer in range(2):
            n = 1 + 3 * level + layer
            place = Block(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{n}.0", RESNET)
            yield from resnet(place, inp, out, time)
            if depth:
                place = Block(f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{n}.1", TRANSFORMER)
                yield from attention(place, out, plan.context, depth, plan.linear)
            inp = out
        if level != last:
            place = Block(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{3 + 3 * level}.0", DOWN)
            yield place.leaf("conv", "op", "Conv2d", out, out, 3, 3)


def _up(plan: Plan, time: int) -> Iterator[Module]:
    skips = skip_widths(list(plan.widths))
    inp, last = plan.widths[-1], len(plan.widths) - 1
    for level, (out, depth) in enumerate(zip(reversed(plan.widths), reversed(plan.depths), strict=True)):
        for layer in range(3):
            n = 3 * level + layer
            place = Block(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{n}.0", RESNET)
            yield from resnet(place, inp + skips.pop(), out, time)
            if depth:
                place = Block(f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{n}.1", TRANSFORMER)
                yield from attention(place, out, plan.context, depth, plan.linear)
            inp = out
        if level != last:
            ldm = f"output_blocks.{3 * level + 2}.{2 if depth else 1}"
            yield Block(f"up_blocks.{level}.upsamplers.0", ldm, UP).leaf("conv", "conv", "Conv2d", out, out, 3, 3)


@cache
def unet_modules(name: str) -> tuple[Module, ...]:
    """All leaves that have a weight, under diffusers' names, with ldm's or sgm's beside them."""
    plan = PLANS[name]
    first, last, time = plan.widths[0], plan.widths[-1], 4 * plan.widths[0]
    top = Block("", "")
    embedding = [
        top.leaf("add_embedding.linear_1", "label_emb.0.0", "Linear", time, plan.adm),
        top.leaf("add_embedding.linear_2", "label_emb.0.2", "Linear", time, time),
    ]
    middle = [Block(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", RESNET) for j in range(2)]
    centre = Block("mid_block.attentions.0", "middle_block.1", TRANSFORMER)
    return (
        top.leaf("conv_in", "input_blocks.0.0", "Conv2d", first, 4, 3, 3),
        top.leaf("time_embedding.linear_1", "time_embed.0", "Linear", time, first),
        top.leaf("time_embedding.linear_2", "time_embed.2", "Linear", time, time),
        *(embedding if plan.adm else ()),
        *_down(plan, time),
        *resnet(middle[0], last, last, time),
        *attention(centre, last, plan.context, plan.middle, plan.linear),
        *resnet(middle[1], last, last, time),
        *_up(plan, time),
        top.leaf("conv_norm_out", "out.0", "GroupNorm", first),
        top.leaf("conv_out", "out.2", "Conv2d", 4, first, 3, 3),
    )


def in_sgm_names(module: Module) -> Module:
    """The module as it stands in a UNet class of sgm's plan."""
    segments = module.ldm.split(".")
    depth = 2 if segments[0] == "middle_block" else 3
    return replace(module, name=module.ldm, block=".".join(segments[:depth]) if module.owner else "")


def trained_names(name: str) -> tuple[Module, ...]:
    """The UNet's modules under the names that kohya and LyCORIS write for this model."""
    found = unet_modules(name)
    return tuple(map(in_sgm_names, found)) if PLANS[name].sgm else found


def text_modules(name: str) -> dict[str, tuple[Module, ...]]:
    """Part (``te``, ``te1``, …) → its modules, the part being what a file's prefix says."""
    return {part: tuple(replace(m, part=part) for m in te_modules(sizes)) for part, sizes in PLANS[name].text}


# ---- which of them a trainer trains


def kohya(name: str, *, conv: bool = False) -> list[Module]:
    """kohya's LoRA; with ``conv`` its C3Lier. Text encoders first."""
    text = (m for modules in text_modules(name).values() for m in kohya_targets(modules, KOHYA_TEXT, False))
    return [*text, *kohya_targets(trained_names(name), KOHYA_UNET_CONV if conv else KOHYA_UNET, conv)]


def with_conv_projections(modules: Iterable[Module]) -> list[Module]:
    """kohya's own UNet class for SD2 has 1x1 convolutions where the model has linear projections."""
    return [
        replace(m, shape=(*m.shape, 1, 1), type="Conv2d") if m.name.endswith(("proj_in", "proj_out")) else m
        for m in modules
    ]


def lycoris_full(name: str) -> list[Module]:
    """LyCORIS' preset "full": C3Lier and four modules by name, which sgm's naming does not have."""
    named = [m for m in trained_names(name) if m.part == "unet" and m.name in LYCORIS_FULL_NAMES]
    return [*kohya(name, conv=True), *named]


def attention_only(name: str) -> list[Module]:
    """The linear layers of self- and cross-attention: diffusers' scripts, kohya's OFT."""
    return [m for m in unet_modules(name) if ".attn1." in m.name or ".attn2." in m.name]


# ---- what the files hold: module name → suffix → shape


def lora(modules: Mapping[str, tuple[int, ...]], rank: int = 2) -> Shapes:
    """kohya's three tensors for each module."""
    shapes: Shapes = {}
    for name, (out, inp, *kernel) in modules.items():
        shapes[f"{name}.alpha"] = ()
        shapes[f"{name}.lora_down.weight"] = (rank, inp, *kernel)
        shapes[f"{name}.lora_up.weight"] = (out, rank, *(1 for _ in kernel))
    return shapes


def pairs(modules: Mapping[str, tuple[int, ...]], down: str, up: str, rank: int = 2) -> Shapes:
    """Two tensors for each module, no alpha; ``down`` and ``up`` are what follows the module's name."""
    shapes: Shapes = {}
    for name, (out, inp, *kernel) in modules.items():
        shapes[f"{name}{down}"] = (rank, inp, *kernel)
        shapes[f"{name}{up}"] = (out, rank, *(1 for _ in kernel))
    return shapes


def kohya_file(modules: Iterable[Module], rank: int = 2) -> Shapes:
    """A whole kohya file."""
    return lora({module.file_name: module.shape for module in modules}, rank)


def kohya_oft_file(name: str, blocks: int = 4) -> Shapes:
    """``networks.oft``: the output axis in ``blocks`` blocks."""
    names = {m.name: in_sgm_names(m) if PLANS[name].sgm else m for m in attention_only(name)}
    shapes: Shapes = {}
    for module in names.values():
        stem = f"oft_unet_{module.name}".replace(".", "_")
        width = module.shape[0] // blocks
        shapes.update({f"{stem}.alpha": (), f"{stem}.oft_blocks": (blocks, width, width)})
    return shapes


# ---- SD3 and Flux


def sd3_kohya(depth: int = 24, dual: int = 0) -> dict[str, tuple[int, ...]]:
    """kohya's ``networks.lora_sd3``: every Linear of the joint blocks, q, k and v in one."""
    h = 64 * depth
    found: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        for block in ("context_block", "x_block"):
            stem = f"lora_unet_joint_blocks_{i}_{block}_"
            pre_only = block == "context_block" and i == depth - 1
            found[f"{stem}attn_qkv"] = (3 * h, h)
            if not pre_only:
                found[f"{stem}attn_proj"] = (h, h)
                found[f"{stem}mlp_fc1"] = (4 * h, h)
                found[f"{stem}mlp_fc2"] = (h, 4 * h)
            if block == "x_block" and i < dual:
                found[f"{stem}attn2_qkv"] = (3 * h, h)
                found[f"{stem}attn2_proj"] = (h, h)
            parts = 2 if pre_only else 9 if block == "x_block" and i < dual else 6
            found[f"{stem}adaLN_modulation_1"] = (parts * h, h)
    return found


def t5(prefix: str = "lora_te3_", layers: int = 24) -> dict[str, tuple[int, ...]]:
    """Every Linear of the T5 encoder."""
    found: dict[str, tuple[int, ...]] = {}
    for n in range(layers):
        stem = f"{prefix}encoder_block_{n}_layer_"
        found.update({f"{stem}0_SelfAttention_{p}": (4096, 4096) for p in "qkvo"})
        found.update({f"{stem}1_DenseReluDense_{p}": (10240, 4096) for p in ("wi_0", "wi_1")})
        found[f"{stem}1_DenseReluDense_wo"] = (4096, 10240)
    return found


def clip(prefix: str, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The 6 Linear of each CLIP layer, under Hugging Face's names."""
    modules = te_modules(Sizes(0, 0, width, clip_layers=layers))
    return {f"{prefix}{m.name}": m.shape for m in modules if m.owner in (ATTENTION, MLP) and m.type == "Linear"}
