"""What one module cannot tell by itself, worked out from the whole file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lib_locon.families.build import Hints
from lib_locon.families.dora import magnitude_side
from lib_locon.untrusted_json import parse


def dora_side(metadata: Mapping[str, str], magnitudes: Sequence[Tensor]) -> Hints:
    """The side of DoRA for layers whose shape leaves it open: by the metadata, else by the file's other layers."""
    arguments = network_arguments(metadata)
    stated = arguments.get("wd_on_output", arguments.get("wd_on_out"))
    if stated is not None:
        return Hints(dora_on_output=str(stated).lower() == "true", dora_why="the file's metadata")
    sides = {side for side in map(magnitude_side, magnitudes) if side is not None}
    if len(sides) == 1:
        return Hints(dora_on_output=sides.pop(), dora_why="the file's other layers")
    return Hints()


def network_arguments(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """kohya's `--network_args` by name, nearly all of them texts; empty where there are none that can be read."""
    try:
        arguments = parse(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def rank_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank by the `down` side (suffix → shape), for a configuration that has an alpha and no rank."""
    for suffix in ("lora_down.weight", "lora_embedding_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if shapes.get(suffix):
            return shapes[suffix][0]
    return None
