"""Whole adapter files for SD1.5 as the trainers write them, and a table of the modules they train.

The table is made here from the shape of the architecture (four blocks, two resnets each, attention in three of them);
it imports neither ``lib_locon`` nor diffusers, against whose own class it was checked once (names, shapes and class
names of all 391 leaves, diffusers 0.42.1). It gives every module under its diffusers name and under its ldm name.

kohya files are written by kohya's rule (names, key order, shapes, metadata); LyCORIS files by running LyCORIS' own
``lycoris.kohya.create_network`` over a tree of modules built from the table.

Widths are a parameter: ``SD15`` is the true model, ``TINY`` the small one of the tests.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .cases import Tensors, seeded

UNET, TEXT = "unet", "te"
TRANSFORMER, RESNET, DOWN, UP = "Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"
ATTENTION, MLP = "CLIPAttention", "CLIPMLP"
KOHYA_UNET = (TRANSFORMER,)
KOHYA_UNET_CONV = (TRANSFORMER, RESNET, DOWN, UP)
KOHYA_TEXT = (ATTENTION, MLP)
LYCORIS_FULL_NAMES = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")


@dataclass(frozen=True)
class Sizes:
    """Widths of a model of SD1's plan: UNet channels, cross-attention input, CLIP width and depth."""

    channels: int
    context: int
    clip: int
    clip_layers: int = 12
    mult: tuple[int, int, int, int] = (1, 2, 4, 4)
    latents: int = 4
    vocabulary: int = 49408
    positions: int = 77


SD15 = Sizes(320, 768, 768)
TINY = Sizes(16, 64, 64, vocabulary=64)


@dataclass(frozen=True)
class Module:
    """One leaf that has a weight.

    part   ``unet`` or ``te``
    name   dotted name in diffusers' UNet, or in HF's CLIP with its ``text_model.``
    ldm    dotted name in the ldm UNet; for the text encoder the same as ``name``
    type   ``Linear``, ``Conv2d``, ``GroupNorm``, ``LayerNorm`` or ``Embedding``
    shape  of the weight
    owner  class name of the enclosing block that a trainer looks for; empty where there is none
    block  dotted name of that block
    bias   whether it has one
    """

    part: str
    name: str
    ldm: str
    type: str
    shape: tuple[int, ...]
    owner: str = ""
    block: str = ""
    bias: bool = True

    @property
    def file_name(self) -> str:
        """The name in a kohya or LyCORIS file: ``lora_unet_down_blocks_0_…`` or ``lora_te_text_model_…``."""
        return f"lora_{self.part}_{self.name}".replace(".", "_")

    @property
    def ldm_file_name(self) -> str:
        """The same with ldm names, as some trainers write SD1 files too: ``lora_unet_input_blocks_1_1_…``."""
        return f"lora_{self.part}_{self.ldm}".replace(".", "_")

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def is_wide_conv(self) -> bool:
        """A convolution whose kernel is more than one position."""
        return self.type == "Conv2d" and self.kernel != (1, 1)


# ---- the table: UNet


@dataclass(frozen=True)
class Block:
    """A sub-tree with a name in each naming; ``owner`` is its class name."""

    name: str
    ldm: str
    owner: str = ""

    def leaf(self, name: str, ldm: str, type_: str, *shape: int, bias: bool = True) -> Module:
        block = self.name if self.owner else ""
        full, full_ldm = (f"{root}.{tail}" if root else tail for root, tail in ((self.name, name), (self.ldm, ldm)))
        return Module(UNET, full, full_ldm, type_, shape, self.owner, block, bias)


def resnet(block: Block, inp: int, out: int, time: int) -> Iterator[Module]:
    """Two convolutions, the time projection, and a shortcut where the widths differ."""
    yield block.leaf("norm1", "in_layers.0", "GroupNorm", inp)
    yield block.leaf("conv1", "in_layers.2", "Conv2d", out, inp, 3, 3)
    yield block.leaf("time_emb_proj", "emb_layers.1", "Linear", out, time)
    yield block.leaf("norm2", "out_layers.0", "GroupNorm", out)
    yield block.leaf("conv2", "out_layers.3", "Conv2d", out, out, 3, 3)
    if inp != out:
        yield block.leaf("conv_shortcut", "skip_connection", "Conv2d", out, inp, 1, 1)


def transformer(block: Block, width: int, context: int) -> Iterator[Module]:
    """proj_in, one transformer block (self- and cross-attention, GEGLU), proj_out; named alike in both namings."""

    def same(name: str, type_: str, *shape: int, bias: bool = True) -> Module:
        return block.leaf(name, name, type_, *shape, bias=bias)

    inner = "transformer_blocks.0"
    yield same("norm", "GroupNorm", width)
    yield same("proj_in", "Conv2d", width, width, 1, 1)
    for attention, source in (("attn1", width), ("attn2", context)):
        yield same(f"{inner}.{attention}.to_q", "Linear", width, width, bias=False)
        yield same(f"{inner}.{attention}.to_k", "Linear", width, source, bias=False)
        yield same(f"{inner}.{attention}.to_v", "Linear", width, source, bias=False)
        yield same(f"{inner}.{attention}.to_out.0", "Linear", width, width)
    yield same(f"{inner}.ff.net.0.proj", "Linear", 8 * width, width)
    yield same(f"{inner}.ff.net.2", "Linear", width, 4 * width)
    for norm in ("norm1", "norm2", "norm3"):
        yield same(f"{inner}.{norm}", "LayerNorm", width)
    yield same("proj_out", "Conv2d", width, width, 1, 1)


def down_half(sizes: Sizes, widths: list[int], time: int) -> Iterator[Module]:
    """Four blocks of two resnets; attention in the first three, each of which also ends in a downsampler."""
    inp = widths[0]
    for b, out in enumerate(widths):
        last = b == len(widths) - 1
        for j in range(2):
            n = 1 + 3 * b + j
            yield from resnet(Block(f"down_blocks.{b}.resnets.{j}", f"input_blocks.{n}.0", RESNET), inp, out, time)
            if not last:
                place = Block(f"down_blocks.{b}.attentions.{j}", f"input_blocks.{n}.1", TRANSFORMER)
                yield from transformer(place, out, sizes.context)
            inp = out
        if not last:
            place = Block(f"down_blocks.{b}.downsamplers.0", f"input_blocks.{3 + 3 * b}.0", DOWN)
            yield place.leaf("conv", "op", "Conv2d", out, out, 3, 3)


def up_half(sizes: Sizes, widths: list[int], time: int) -> Iterator[Module]:
    """Four blocks of three resnets, each fed its own width beside a skip; attention in all but the first."""
    skips = skip_widths(widths)
    inp = widths[-1]
    for b, out in enumerate(reversed(widths)):
        attention, last = b > 0, b == len(widths) - 1
        for j in range(3):
            n = 3 * b + j
            place = Block(f"up_blocks.{b}.resnets.{j}", f"output_blocks.{n}.0", RESNET)
            yield from resnet(place, inp + skips.pop(), out, time)
            if attention:
                place = Block(f"up_blocks.{b}.attentions.{j}", f"output_blocks.{n}.1", TRANSFORMER)
                yield from transformer(place, out, sizes.context)
            inp = out
        if not last:
            place = Block(f"up_blocks.{b}.upsamplers.0", f"output_blocks.{3 * b + 2}.{2 if attention else 1}", UP)
            yield place.leaf("conv", "conv", "Conv2d", out, out, 3, 3)


def skip_widths(widths: list[int]) -> list[int]:
    """What the down half leaves for the up half, in order: conv_in, then per block two resnets and a downsampler."""
    skips = [widths[0]]
    for b, out in enumerate(widths):
        skips += [out, out] if b == len(widths) - 1 else [out, out, out]
    return skips


@cache
def unet_modules(sizes: Sizes = SD15) -> tuple[Module, ...]:
    """All 391 leaves of the UNet that have a weight."""
    widths = [sizes.channels * m for m in sizes.mult]
    first, last, time = widths[0], widths[-1], 4 * widths[0]
    top = Block("", "")
    middle = [Block(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", RESNET) for j in range(2)]
    return (
        top.leaf("conv_in", "input_blocks.0.0", "Conv2d", first, sizes.latents, 3, 3),
        top.leaf("time_embedding.linear_1", "time_embed.0", "Linear", time, first),
        top.leaf("time_embedding.linear_2", "time_embed.2", "Linear", time, time),
        *down_half(sizes, widths, time),
        *resnet(middle[0], last, last, time),
        *transformer(Block("mid_block.attentions.0", "middle_block.1", TRANSFORMER), last, sizes.context),
        *resnet(middle[1], last, last, time),
        *up_half(sizes, widths, time),
        top.leaf("conv_norm_out", "out.0", "GroupNorm", first),
        top.leaf("conv_out", "out.2", "Conv2d", sizes.latents, first, 3, 3),
    )


# ---- the table: text encoder


@cache
def te_modules(sizes: Sizes = SD15) -> tuple[Module, ...]:
    """All leaves of CLIP's text model that have a weight: 6 Linear and 2 LayerNorm per layer, 2 embeddings, a norm."""
    found: list[Module] = []

    def add(name: str, type_: str, *shape: int, owner: str = "", block: str = "", bias: bool = True) -> None:
        full = f"text_model.{name}"
        found.append(Module(TEXT, full, full, type_, shape, owner, f"text_model.{block}" if block else "", bias))

    d = sizes.clip
    add("embeddings.token_embedding", "Embedding", sizes.vocabulary, d, bias=False)
    add("embeddings.position_embedding", "Embedding", sizes.positions, d, bias=False)
    for n in range(sizes.clip_layers):
        layer, attention, mlp = (f"encoder.layers.{n}{tail}" for tail in ("", ".self_attn", ".mlp"))
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            add(f"{attention}.{projection}", "Linear", d, d, owner=ATTENTION, block=attention)
        add(f"{layer}.layer_norm1", "LayerNorm", d)
        add(f"{mlp}.fc1", "Linear", 4 * d, d, owner=MLP, block=mlp)
        add(f"{mlp}.fc2", "Linear", d, 4 * d, owner=MLP, block=mlp)
        add(f"{layer}.layer_norm2", "LayerNorm", d)
    add("final_layer_norm", "LayerNorm", d)
    return tuple(found)


def modules_by_file_name(sizes: Sizes = SD15) -> dict[str, Module]:
    """Name in a file -> module, for every leaf of UNet and text encoder."""
    return {module.file_name: module for module in (*te_modules(sizes), *unet_modules(sizes))}


# ---- kohya


def kohya_targets(modules: Iterable[Module], owners: Iterable[str], wide_conv: bool) -> list[Module]:
    """Linear and 1x1 conv inside the blocks it looks for; wider kernels only with a rank of their own."""
    wanted = set(owners)
    return [
        module
        for module in modules
        if module.owner in wanted and module.type in ("Linear", "Conv2d") and (wide_conv or not module.is_wide_conv)
    ]


def kohya_unet_targets(sizes: Sizes = SD15, conv: bool = False) -> list[Module]:
    """192 modules; 278 with conv (C3Lier)."""
    return kohya_targets(unet_modules(sizes), KOHYA_UNET_CONV if conv else KOHYA_UNET, conv)


def kohya_te_targets(sizes: Sizes = SD15) -> list[Module]:
    """72 modules."""
    return kohya_targets(te_modules(sizes), KOHYA_TEXT, False)


def lora_tensors(module: Module, rank: int, alpha: float, generator: torch.Generator, std: float = 0.1) -> Tensors:
    """One module of a kohya file: alpha ``()``, down ``(r, in, *k)``, up ``(out, r, 1, 1)`` or ``(out, r)``."""
    out, inp, *kernel = module.shape
    ones = [1] * len(kernel)
    return {
        "alpha": torch.tensor(float(alpha)),
        "lora_down.weight": std * torch.randn(rank, inp, *kernel, generator=generator),
        "lora_up.weight": std * torch.randn(out, rank, *ones, generator=generator),
    }


def kohya_lora(
    path: Path | str,
    sizes: Sizes = SD15,
    *,
    unet: bool = True,
    te: bool = True,
    conv: bool = False,
    rank: int = 4,
    alpha: float = 2.0,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    dtype: torch.dtype = torch.float16,
    seed: str = "kohya",
    metadata: bool = True,
) -> dict[str, Tensors]:
    """Write a file of kohya's ``networks.lora``; returns file name -> suffix -> tensor, as stored.

    All tensors, alpha too, are in ``dtype``. 264 modules, 350 with ``conv``; text encoder first.
    """
    generator = seeded(seed)
    targets = [*(kohya_te_targets(sizes) if te else ()), *(kohya_unet_targets(sizes, conv) if unet else ())]
    wide = (conv_rank or rank, alpha if conv_alpha is None else conv_alpha)
    tensors: dict[str, Tensors] = {}
    for module in targets:
        module_rank, module_alpha = wide if module.is_wide_conv else (rank, alpha)
        made = lora_tensors(module, module_rank, module_alpha, generator)
        tensors[module.file_name] = {suffix: tensor.to(dtype) for suffix, tensor in made.items()}
    args = {"conv_dim": str(wide[0]), "conv_alpha": str(wide[1])} if conv else {}
    header = kohya_metadata("networks.lora", rank, alpha, args) if metadata else {}
    write(path, tensors, header)
    return tensors


def kohya_metadata(module: str, rank: int, alpha: float, args: Mapping[str, Any]) -> dict[str, str]:
    """The ``ss_`` keys that a reader looks at; every value is text, Python's own text for numbers and booleans."""
    header = {
        "ss_network_module": module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_output_name": "oracle",
        "ss_clip_skip": "None",
        "ss_tag_frequency": json.dumps({"10_thing": {"a thing": 10, "outdoors": 3}}),
    }
    if args:
        header["ss_network_args"] = json.dumps({key: str(value) for key, value in args.items()})
    return header


def write(path: Path | str, tensors: Mapping[str, Tensors], header: Mapping[str, str]) -> None:
    """One safetensors file, kohya's two hashes added where there is a header at all."""
    flat = {f"{module}.{suffix}": t.contiguous() for module, group in tensors.items() for suffix, t in group.items()}
    extra = body_hashes(save(flat, dict(header))) if header else {}
    Path(path).write_bytes(save(flat, {**header, **extra} or None))


def body_hashes(data: bytes) -> dict[str, str]:
    """``sshs_model_hash``: sha256 of all after the header; ``sshs_legacy_hash``: 8 digits of 64 KiB at 1 MiB."""
    body = data[8 + int.from_bytes(data[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8],
    }


# ---- LyCORIS


def module_tree(modules: Iterable[Module], device: str | torch.device = "meta") -> nn.Module:
    """The modules under their dotted names, blocks carrying the class names that trainers look for."""
    root = nn.Module()
    for module in modules:
        place = root
        path = module.name.split(".")
        for depth, part in enumerate(path[:-1], 1):
            if part not in place._modules:
                is_block = ".".join(path[:depth]) == module.block
                place.add_module(part, type(module.owner, (nn.Module,), {})() if is_block else nn.Module())
            place = place.get_submodule(part)
        place.add_module(path[-1], real_leaf(module, device))
    return root


def real_leaf(module: Module, device: str | torch.device) -> nn.Module:
    """The torch module of a table row."""
    if module.type == "Linear":
        return nn.Linear(module.shape[1], module.shape[0], bias=module.bias, device=device)
    if module.type == "Conv2d":
        padding = module.kernel[0] // 2
        return nn.Conv2d(module.shape[1], module.shape[0], module.kernel[0], padding=padding, device=device)
    if module.type == "GroupNorm":
        return nn.GroupNorm(math.gcd(32, module.shape[0]), module.shape[0], device=device)
    if module.type == "LayerNorm":
        return nn.LayerNorm(module.shape[0], device=device)
    return nn.Embedding(module.shape[0], module.shape[1], device=device)


LYCORIS_ALGORITHMS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "tucker": {"algo": "locon", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha_tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr"},
    "lokr_factor4": {"algo": "lokr", "factor": 4},
    "lokr_both": {"algo": "lokr", "factor": 8, "decompose_both": True},
    "lokr_tucker": {"algo": "lokr", "use_tucker": True},
    "lokr_full": {"algo": "lokr", "full_matrix": True},
    "lokr_unbalanced": {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "dora_input": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "dora_loha": {"algo": "loha", "dora_wd": True},
    "dora_lokr": {"algo": "lokr", "dora_wd": True},
    "glora": {"algo": "glora"},
    "full": {"algo": "full"},
    # Not LyCORIS' own preset "ia3": its targets ("to_k", ...) are matched from the start of the dotted path, so through
    # the kohya entry point it finds no module at all (4.1.3).
    "ia3": {"algo": "ia3"},
    "oft": {"algo": "diag-oft", "constraint": 0.01},
    "boft": {"algo": "boft", "rescaled": True},
    "tlora": {"algo": "tlora", "preset": "attn-mlp"},
    "norm": {"algo": "lora", "train_norm": True},
}
NEEDS_WEIGHTS = ("dora", "full", "tlora")


def lycoris_file(
    path: Path | str,
    algorithm: str,
    sizes: Sizes = SD15,
    *,
    te: bool = True,
    rank: int = 2,
    alpha: float = 1.0,
    dtype: torch.dtype | None = torch.float16,
    seed: str = "lycoris",
    std: float = 0.1,
    **network_args: Any,
) -> dict[str, Tensors]:
    """Run LyCORIS' kohya entry point over the whole model, fill the adapter, and let it save; returns what is stored.

    ``algorithm`` is a key of ``LYCORIS_ALGORITHMS``; ``network_args`` override its arguments. Base weights stay on the
    meta device except for the algorithms that read them, so the true width costs only the adapter's memory.
    """
    arguments = {**LYCORIS_ALGORITHMS[algorithm], **network_args}
    device = "cpu" if algorithm.startswith(NEEDS_WEIGHTS) else "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = module_tree(unet_modules(sizes), device)
        text = module_tree(te_modules(sizes), device) if te else None
        network = lycoris_network(rank, alpha, text, unet, arguments)
        network.apply_to(text, unet, te, True)
    randomise(network, seeded(seed), std)
    header = kohya_metadata("lycoris.kohya", rank, alpha, arguments)
    network.save_weights(str(path), dtype, header)
    return grouped(path)


def lycoris_network(
    rank: int, alpha: float, text: nn.Module | None, unet: nn.Module, arguments: Mapping[str, Any]
) -> Any:
    """LyCORIS' network over the two trees. A preset is written to class attributes: they are put back afterwards."""
    from lycoris.kohya import LycorisNetworkKohya, create_network

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # after the import, which sets a level of its own
    names = [name for name in vars(LycorisNetworkKohya) if name.isupper()]
    before = {name: getattr(LycorisNetworkKohya, name) for name in names}
    gc.freeze()  # T-LoRA collects garbage once per module
    try:
        return create_network(1.0, rank, alpha, None, text, unet, warn_on_unmatched=False, **arguments)
    finally:
        gc.unfreeze()
        for name, value in before.items():
            setattr(LycorisNetworkKohya, name, value)


def randomise(network: nn.Module, generator: torch.Generator, std: float) -> None:
    """Every parameter random; what multiplies (DoRA's magnitude, a rescale) moves by a tenth around where it stands."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("dora_scale", "rescale")):
                parameter.mul_(1 + 0.1 * noise)
            elif parameter.is_meta:
                raise AssertionError(f"{name} is on the meta device: the algorithm needs real base weights")
            else:
                parameter.add_(std * noise)


def grouped(path: Path | str) -> dict[str, Tensors]:
    """A file in a naming without dots in its module names: module -> suffix -> tensor."""
    groups: dict[str, Tensors] = {}
    for key, tensor in load_file(str(path)).items():
        module, suffix = key.split(".", 1)
        groups.setdefault(module, {})[suffix] = tensor
    return groups


def fitting(groups: Mapping[str, Tensors], sizes: Sizes) -> dict[str, tuple[Module, Tensors]]:
    """Each group beside the module it is for; a name that no module has is an error."""
    table = modules_by_file_name(sizes)
    unknown = [name for name in groups if name not in table]
    if unknown:
        raise AssertionError(f"{len(unknown)} names of no module, the first {unknown[:3]}")
    return {name: (table[name], group) for name, group in groups.items()}


def random_base(module: Module, seed: str = "base", std: float = 0.3) -> Tensor:
    """A weight for the module that depends on its name alone, float32."""
    return std * torch.randn(module.shape, generator=seeded(f"{seed}/{module.name}"))
