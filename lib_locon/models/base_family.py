"""Which family of base models an adapter was made for, from its tensors and names; metadata is often wrong or gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lib_locon.files.adapter import Adapter
from lib_locon.models.table import WHOLE, TargetTable, plain, spellings, underscored

CROSS_ATTENTION = {768: "SD1", 1024: "SD2", 2048: "SDXL", 1280: "SDXL refiner"}
"""The width of the text that cross-attention reads, by family."""
TRANSFORMERS: dict[str, dict[int, str]] = {
    "joint_blocks_": {1536: "SD3", 2432: "SD3"},
    "double_blocks_": {3072: "Flux"},
    "single_blocks_": {3072: "Flux"},
    "single_transformer_blocks_": {3072: "Flux"},
    "transformer_blocks_": {1536: "SD3", 2432: "SD3", 3072: "Flux"},
}
"""How the names of a transformer's blocks begin (a UNet's stand inside others) → their width → family."""
_READS_BLOCK = ("_qkv", "_to_q", "_to_k", "_to_v", "_add_q_proj", "_add_k_proj", "_add_v_proj", "_attn_proj",
                "_to_out_0", "_to_add_out", "_ff_net_0_proj", "_ff_context_net_0_proj", "_mlp_0", "_mlp_fc1",
                "_proj_mlp", "_linear1", "_lin", "_norm1_linear", "_norm_linear", "_adaLN_modulation_1")  # fmt: skip
"""Layers of such a block whose input is as wide as the block."""
_SDXL_DEPTH = 4
"""SDXL alone has transformer blocks of this number and above in one place."""
_TEXT = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1")
_CLIP_L, _CLIP_H = 768, 1024
Layers = list[tuple[str, "int | None"]]
"""Names with underscores and the input width of each, where it is known."""


def base_family(adapter: Adapter) -> str:
    """One of "SD1", "SD2", "SDXL", "SDXL refiner", "SD3", "Flux", "unknown (why)"."""
    layers = _layers(adapter)
    family = _by_network(layers)
    if family:
        return family
    if any(name.startswith("encoder_block_") for name, _ in layers):
        return "unknown (T5 alone: SD3 or Flux)"
    if any("te2" in module.name.dialect.components[:1] for module in adapter.modules):
        return "SDXL"
    text = {width for name, width in layers if name.endswith(_TEXT)}
    if text == {_CLIP_L}:
        numbered = any(module.name.dialect.prefix == "lora_te1_" for module in adapter.modules)
        return "unknown (CLIP-L alone: SD1 or SDXL)" if numbered else "SD1"
    return "SD2" if text == {_CLIP_H} else "unknown (no cross-attention in it)"


def other_family(adapter: Adapter, table: TargetTable) -> tuple[str, str] | None:
    """(the adapter's family, the model's) where both are certain and differ; else None.

    SD1, SD2 and SDXL have modules with equal names and equal shapes: part of a file would fit the wrong model. Text
    encoders prove nothing here, since families share them.
    """
    mine, model = _by_network(_layers(adapter)), _by_network(_model_layers(table))
    unsure = any(not family or family.startswith("unknown") for family in (mine, model))
    return None if unsure or mine == model else (mine, model)


def model_family(table: TargetTable) -> str:
    """The family of a loaded model, in the words of `base_family`; "" where nothing tells."""
    return _by_network(_model_layers(table))


def _by_network(layers: Layers) -> str:
    """The family by the UNet or transformer; "" where nothing of these is there, or nothing that tells."""
    for start, families in TRANSFORMERS.items():
        blocks = [(name, width) for name, width in layers if name.startswith(start)]
        if blocks:
            width = _commonest(width for name, width in blocks if name.endswith(_READS_BLOCK))
            if width is None:
                return next(iter(families.values())) if len(set(families.values())) == 1 else ""
            return families.get(width, f"unknown (a transformer of width {width})")
    width = _commonest(width for name, width in layers if name.endswith(("attn2_to_k", "attn2_to_v")))
    if width is not None:
        return CROSS_ATTENTION.get(width, f"unknown (cross-attention of width {width})")
    deep = (f"_transformer_blocks_{number}_" for number in range(_SDXL_DEPTH, 10))
    return "SDXL" if any(mark in name for mark in deep for name, _ in layers) else ""


def _commonest(widths: Iterable[int | None]) -> int | None:
    counted = Counter(width for width in widths if width is not None).most_common(1)
    return counted[0][0] if counted else None


def _layers(adapter: Adapter) -> Layers:
    return [
        (_network_name(module.name.body), layer.family.shape()[1])
        for module in adapter.modules
        for layer in module.layers
        if layer.parameter == "weight"
    ]


def _network_name(body: str) -> str:
    """The module's name without the trainers' quirks, from its transformer's blocks on if it is in one."""
    name = underscored(body)
    return next((each for each in spellings(name) if each.startswith(tuple(TRANSFORMERS))), plain(name))


def _model_layers(table: TargetTable) -> Layers:
    network = table.aliases.get("unet") or table.aliases.get(WHOLE, {})
    weights = [(name, view) for name, target in network.items() for view in target.views.get("weight", ())[:1]]
    return [(name, next(iter(table.shapes[view.path][1:]), None)) for name, view in weights]
