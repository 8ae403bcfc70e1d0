"""Conventions of a trainer that its tensors do not show and its metadata does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

_IN_PARTS = {
    "img_attn_qkv": (3, "img_attn_dim"),
    "txt_attn_qkv": (3, "txt_attn_dim"),
    "linear1": (4, "single_dim"),
}
"""The Flux modules that kohya's `split_qkv` trains in parts, by the end of their names: how many parts there are (q, k,
v and, in linear1, mlp), and the argument that gives such modules a rank of their own."""
_ONETRAINER = ("ot_branch", "ot_revision", "ot_config")
_ONETRAINER_OFT = {"oft_R.weight": "onetrainer.oft_R.weight"}
_SCALED_OFT = "oft_R.scaled_oft"


@dataclass(frozen=True)
class TrainerMarks:
    """What the metadata says of the whole file.

    `arguments` are kohya's `network_args`, `rank` is its `network_dim`.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    onetrainer: bool = False

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> TrainerMarks:
        """From a header's metadata. Never raises: a value that cannot be read counts as not there."""
        return cls(
            network_arguments(metadata),
            _whole(metadata.get("ss_network_dim")),
            any(key in metadata for key in _ONETRAINER),
        )

    def renames(self, suffixes: Mapping[str, str]) -> Mapping[str, str]:
        """Suffixes of a module that mean something else in a file of this trainer.

        OneTrainer alone writes the marker of a scaled OFT, so that tells too where the metadata is gone.
        """
        return _ONETRAINER_OFT if self.onetrainer or _SCALED_OFT in suffixes else {}

    def parts(self, body: str, rank: int | None) -> int:
        """The number of row blocks that the module was trained in, each with a rank of its own (kohya's `split_qkv`).

        `body` is the module's underscored name, `rank` that of the stored factors: those of all parts side by side.
        1 for a module that is none of these, or whose rank contradicts the metadata (a resized file keeps it).
        """
        if rank is None or not is_true(self.arguments.get("split_qkv")):
            return 1
        for end, (count, own_rank) in _IN_PARTS.items():
            if body.endswith(end):
                part = _whole(self.arguments.get(own_rank)) or self.rank
                return count if part is not None and rank == part * count else 1
        return 1

    def without_parts(self) -> TrainerMarks:
        """The same, with no module trained in parts."""
        return replace(self, arguments={**self.arguments, "split_qkv": False})

    @property
    def rank_stabilised(self) -> bool:
        """LyCORIS' `rs_lora`: the scale in training was alpha / √rank."""
        return is_true(self.arguments.get("rs_lora"))

    def kronecker_scale(self, alpha: float | None, *, convolution: bool) -> float | None:
        """The scale of a LoKr whose halves are both whole; None where it is 1, as it is without `rs_lora`.

        LyCORIS then trains at √dim and stores dim^1.5 as alpha. In half precision that number is rounded or infinite,
        so the dim of the metadata is taken where it agrees.
        """
        if not self.rank_stabilised or alpha is None:
            return None
        stated = _whole(self.arguments.get("conv_dim")) if convolution else None
        stated = stated or self.rank
        if stated and (alpha == float("inf") or abs(stated**1.5 - alpha) <= 0.01 * alpha):
            return float(stated**0.5)
        return float(alpha ** (1 / 3)) if 0 < alpha < float("inf") else None


def part_rows(out: int, count: int) -> list[int]:
    """The rows of each part of a projection with `out` rows (mlp has four times those of q); empty if none fit."""
    shares = [1, 1, 1, 4][:count]
    unit, rest = divmod(out, sum(shares))
    return [] if rest else [unit * share for share in shares]


def is_block_diagonal(up: Tensor, rows: list[int]) -> bool:
    """True for an `up` factor (sum of rows, parts · rank) whose row blocks use no columns but their own."""
    rank, start = up.shape[1] // len(rows), 0
    matrix = up.flatten(1)
    for i, count in enumerate(rows):
        block = matrix[start : start + count]
        if bool(block[:, : i * rank].any()) or bool(block[:, (i + 1) * rank :].any()):
            return False
        start += count
    return True


def network_arguments(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """kohya's `ss_network_args`; empty where that is no JSON object."""
    try:
        found = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_true(value: object) -> bool:
    """Whether an argument of a command line is on: it is stored as the text that was written, or as JSON's own."""
    return str(value).strip().lower() in ("true", "1", "yes", "on")


def _whole(value: object) -> int | None:
    """A positive whole number, as a number or as a text."""
    text = str(value).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0 else None
