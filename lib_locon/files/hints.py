"""What one module cannot tell by itself, worked out from the whole file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lib_locon.families.build import Hints
from lib_locon.families.dora import magnitude_side
from lib_locon.files.trainer_marks import is_true, network_arguments


def dora_side(metadata: Mapping[str, str], magnitudes: Sequence[Tensor]) -> Hints:
    """The side of DoRA for layers whose shape leaves it open: by the metadata, else by the file's other layers."""
    arguments = network_arguments(metadata)
    stated = arguments.get("wd_on_output", arguments.get("wd_on_out"))
    if stated is not None:
        return Hints(dora_on_output=is_true(stated), dora_why="the file's metadata")
    sides = {side for side in map(magnitude_side, magnitudes) if side is not None}
    if len(sides) == 1:
        return Hints(dora_on_output=sides.pop(), dora_why="the file's other layers")
    return Hints()


def rank_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank by the `down` side (suffix → shape), for a configuration that has an alpha and no rank."""
    for suffix in ("lora_down.weight", "lora_embedding_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if shapes.get(suffix):
            return shapes[suffix][0]
    return None
