"""Marks that trainers leave in a file's header. They decide what the tensors alone leave open.

- OneTrainer (`ot_branch`, `ot_revision`, `ot_config`, or the marker of its scaled OFT): its convolutions are rotated
  the other way than PEFT's, under whatever names the file was written.
- kohya's `split_qkv` (Flux and SD3): q, k and v (and the MLP of Flux' `linear1`) were trained as pairs of their own,
  each with the scale alpha / network_dim. They are saved as one block-diagonal pair of 3 or 4 times that rank, with
  the alpha of one part.
- LyCORIS' `rs_lora`: the scale is alpha / √rank. LoCon, LoHa and LoKr store alpha · √rank, which makes alpha / rank
  right for them. GLoRA stores alpha itself, as they all did before July 2024; a LoKr of two whole halves has no rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lib_locon.arithmetic import matrix
from lib_locon.families.build import Hints
from lib_locon.files.dialects import ONETRAINER, ModuleName
from lib_locon.files.hints import network_arguments, rank_of

Shapes = Mapping[str, "tuple[int, ...]"]
SPLIT = (
    "q, k and v were trained apart (kohya's split_qkv): its fused layers count with the trainer's alpha / network_dim, "
    "3 times (linear1: 4 times) the alpha / rank of other loaders"
)
NOT_SPLIT = "its metadata says split_qkv, but some fused layer is not as that trainer writes it: alpha / rank there"
STABILISED = "its metadata says rs_lora: the scale is LyCORIS' alpha / √rank, which other loaders do not read"
_ROUNDED = 0.01
"""An alpha is stored in the file's dtype: bf16 keeps 8 bits of it."""


@dataclass(frozen=True)
class TrainerMarks:
    """The marks of one file."""

    renames: Mapping[str, str] = field(default_factory=dict)
    """Suffixes that mean something else in this file."""
    split_qkv: bool = False
    rank_stabilised: bool = False
    dims: tuple[float | None, float | None] = (None, None)
    """The trainer's rank for linear layers (and 1×1 convolutions), and for larger convolutions."""
    alphas: tuple[float | None, float | None] = (None, None)
    """The same for alpha."""

    def named(self, name: ModuleName) -> ModuleName:
        """The module's name, in a dialect that knows what the suffixes mean in this file."""
        if not self.renames:
            return name
        return replace(name, dialect=replace(name.dialect, renames={**name.dialect.renames, **self.renames}))

    def refine(self, hints: Hints, written: str, shapes: Shapes, read: Callable[[str], Tensor]) -> Hints:
        """The hints for one module, by its name, the shapes of its factors and, where needed, rows of a factor.

        `read` gives a factor of the file; only a few rows of it are looked at, with the header only as well.
        """
        if hints.alpha is None:
            return hints
        if self.split_qkv and "lora_up.weight" in shapes and (shares := fused_shares(written)):
            return self._split(hints, shares, shapes["lora_up.weight"], read)
        return self._by_root_of_rank(hints, shapes) if self.rank_stabilised else hints

    def _split(
        self, hints: Hints, shares: tuple[int, ...], shape: tuple[int, ...], read: Callable[[str], Tensor]
    ) -> Hints:
        out, rank, parts = shape[0] if shape else 0, math.prod(shape[1:]), len(shares)
        whole = out and rank and out % sum(shares) == 0 and rank % parts == 0
        # another tool may have made the file anew and kept the metadata: its alpha is then not the trainer's
        own = self.alphas[0] is None or _equal(hints.alpha, self.alphas[0] or rank / parts)
        if whole and own and is_block_diagonal(matrix(read("lora_up.weight")), shares):
            return replace(hints, parts=parts, note=SPLIT)
        return replace(hints, note=NOT_SPLIT)

    def _by_root_of_rank(self, hints: Hints, shapes: Shapes) -> Hints:
        if "a1.weight" in shapes:
            return replace(hints, root_of_rank=True, note=STABILISED)
        if "lokr_w1" in shapes and "lokr_w2" in shapes:
            dim = self.dims[math.prod(shapes["lokr_w2"][2:]) > 1]
            # the alpha of such a LoKr is made of its dim, and confirms it; fp16 turns that of a large one into infinity
            if dim and (hints.alpha == math.inf or any(_equal(hints.alpha, dim**power) for power in (1, 1.5))):
                return replace(hints, alpha=None, scale=math.sqrt(dim), note=STABILISED)
            return hints
        rank = rank_of(shapes)
        known = [alpha for alpha in self.alphas if alpha]
        if not rank or any(_equal(hints.alpha, alpha * math.sqrt(rank)) for alpha in known):
            return hints
        if any(_equal(hints.alpha, alpha) for alpha in known):
            return replace(hints, root_of_rank=True, note=STABILISED)
        return hints


def read_marks(metadata: Mapping[str, str], keys: Iterable[str]) -> TrainerMarks:
    """The marks in a file's metadata and among its keys. Never raises: metadata may hold anything."""
    # under PEFT's own prefix, which OneTrainer never writes, the marker alone says no more than how values are packed
    marked = any(key.endswith(".oft_R.scaled_oft") and "base_model.model." not in key for key in keys)
    onetrainer = marked or any(key.startswith("ot_") for key in metadata)
    arguments = network_arguments(metadata)
    dim, alpha = _number(metadata.get("ss_network_dim")), _number(metadata.get("ss_network_alpha"))
    algorithm = str(arguments.get("algo", "")).lower()
    return TrainerMarks(
        ONETRAINER if onetrainer else {},
        # "Dynamic" is what kohya's resizing writes: the pairs are no longer the trained ones
        _true(arguments.get("split_qkv")) and metadata.get("ss_network_alpha") != "Dynamic",
        metadata.get("ss_network_module", "lycoris").startswith("lycoris")  # no other trainer has such an argument
        and str(arguments.get("rs_lora", False)).lower() != "false"
        and algorithm != "dylora",  # it takes no notice of the setting
        (dim, _number(arguments.get("conv_dim")) or dim),
        (alpha, _number(arguments.get("conv_alpha")) or alpha),
    )


def fused_shares(written: str) -> tuple[int, ...]:
    """The shares of the rows that q, k, v (and the MLP) have in a fused projection of Flux or SD3; empty for others."""
    name = written.replace(".", "_")
    if name.endswith("_qkv") and ("double_blocks_" in name or "joint_blocks_" in name):
        return (1, 1, 1)
    return (1, 1, 1, 4) if name.endswith("_linear1") and "single_blocks_" in name else ()


def is_block_diagonal(up: Tensor, shares: tuple[int, ...]) -> bool:
    """Tell whether each part of the rows of `up` (out, r) has its own part of the ranks, and exact zeros elsewhere.

    By the first and the last row of each part: what was trained as one has numbers everywhere.
    """
    start, ranks, unit = 0, up.shape[1] // len(shares), up.shape[0] // sum(shares)
    for i, share in enumerate(shares):
        for row in (start, start + share * unit - 1):
            numbers = up[row].float()
            if numbers[: i * ranks].any() or numbers[(i + 1) * ranks :].any():
                return False
        start += share * unit
    return True


def _equal(stored: float | None, expected: float) -> bool:
    return stored is not None and math.isclose(stored, expected, rel_tol=_ROUNDED)


def _true(value: object) -> bool:
    return str(value).lower() in ("true", "1")


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None
