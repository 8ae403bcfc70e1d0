"""Which block a module is in, by the numbering of ldm's UNet and of Flux; the names are those of lora-block-weight."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from lib_locon.models.table import ROOTS, WHOLE, WRAPPERS

_NUMBERED = {"input_blocks": "IN", "output_blocks": "OUT", "double_blocks": "D", "single_blocks": "S",
             "transformer_blocks": "D", "single_transformer_blocks": "S"}  # fmt: skip
_DIFFUSERS_FLUX = {"x_embedder": "IN", "context_embedder": "IN", "norm_out.linear": "OUT", "proj_out": "OUT"}
"""Flux' layers outside its blocks, as diffusers calls them; SD3 has an `x_embedder` with something inside."""
_ENCODER = ("encoder", "embedders", "transformer_resblocks")
"""In the name of a text encoder's module. What has none of these (embeddings, the last norm) is in no block."""
_OF_LEVEL = re.compile(
    r"(?P<stage>down|up)_blocks\.(?P<level>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\."
)


class Place(NamedTuple):
    """Where a weight belongs: "IN04", "MID", "OUT11", "BASE", "D03", … or ""; its module's path in its component."""

    block: str
    layer: str


@lru_cache(maxsize=16384)
def place_of(component: str, path: str) -> Place:
    """The place of the parameter `path` of a model. Cached: schedules ask again at each step."""
    levels = path.rpartition(".")[0].split(".")
    layer = ".".join(level for level in levels if level not in WRAPPERS)
    if component != WHOLE:
        root = next((root for root, _ in ROOTS if f"{layer}.".startswith(root)), "")
        layer = layer[len(root) :]
    return Place(block_of(component, layer), layer)


def block_of(component: str, layer: str) -> str:
    """The block of a module by its dotted path inside its component."""
    if component == "te3":
        return "T5"
    if component.startswith("te"):
        name = layer.replace(".", "_")
        return "BASE" if any(mark in name for mark in _ENCODER) else ""
    first, _, rest = layer.partition(".")
    if first in _NUMBERED:
        number = rest.partition(".")[0]
        return f"{_NUMBERED[first]}{number.zfill(2)}" if number.isdecimal() else ""
    if first in ("middle_block", "mid_block"):
        return "MID"
    if first == "conv_in":
        return "IN00"
    if first.endswith("_in"):  # Flux: img_in, txt_in, time_in, vector_in, guidance_in
        return "IN"
    if first == "time_text_embed":
        return "IN"
    return "OUT" if first == "final_layer" else _DIFFUSERS_FLUX.get(layer) or _of_level(f"{layer}.")


def _of_level(layer: str) -> str:
    """diffusers' UNets count by level: each has its layers and, but for the last, a resampler."""
    match = _OF_LEVEL.match(layer)
    if match is None:
        return ""
    level, number = int(match["level"]), int(match["number"])
    if match["stage"] == "down":
        inside = 2 if match["kind"] == "downsamplers" else number
        return f"IN{1 + 3 * level + inside:02}"
    inside = 2 if match["kind"] == "upsamplers" else number
    return f"OUT{3 * level + inside:02}"
