"""What was last written into a weight, and how to know it again: others load, move, convert and write weights too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lib_locon.arithmetic import working_dtype
from lib_locon.patching.bits import same_bits
from lib_locon.patching.plan import Patch
from lib_locon.patching.rounding import Rounding

SAMPLE = 16
"""Numbers by which a weight is recognised where torch does not count the writes into it."""
NEAR = 2.0**-5
"""How far a weight may be from what we wrote, as a share of the change. Roundings of another order are far below."""


class Held(NamedTuple):
    """What was last written into a weight (None: it is being written now), and how to know the weight again."""

    patches: tuple[Patch, ...] | None
    weight: int
    version: object
    dtype: torch.dtype
    rounding: Rounding
    abandoned: bool = False
    """Written in part, and left so, for its base was lost meanwhile: whatever is written into it next is its base."""

    @classmethod
    def by(
        cls, weight: Tensor, patches: tuple[Patch, ...] | None, rounding: Rounding, *, abandoned: bool = False
    ) -> Held:
        """As the weight is now."""
        return cls(patches, id(weight), _version(weight), weight.dtype, rounding, abandoned)

    def is_of(self, patches: Sequence[Patch], rounding: Rounding) -> bool:
        """Whether these make the same numbers. Not of a weight that was written in part."""
        return (
            self.patches is not None
            and self.rounding == rounding
            and len(self.patches) == len(patches)
            and all(one.key == other.key for one, other in zip(self.patches, patches, strict=True))
        )

    def untouched(self, weight: Tensor) -> bool:
        """Whether nobody wrote into the weight since, nor put another in its place.

        torch counts the writes into a tensor; moves between devices and dtypes are no writes. The weight is known by
        its id: a reference, weak ones too, would keep torch from swapping tensors in `.to()`.
        """
        if self.patches is None and not self.abandoned:
            return True  # the writes are ours
        return self.weight == id(weight) and self.version == _version(weight)

    def is_the_same(self, weight: Tensor) -> bool:
        """Whether the weight is the tensor that was written, and not one that took over a freed one's id.

        torch never counts the writes into a tensor down: one with fewer than were counted then is another.
        """
        if self.weight != id(weight):
            return False
        return weight.is_inference() or not isinstance(self.version, int) or self.version <= weight._version

    def is_still_in(self, weight: Tensor, ours: Tensor, base: Tensor) -> bool:
        """Whether the weight, or another in its place, holds what was written, which `ours` makes once more.

        To the last bit where somebody wrote into the same tensor, for the least change may be meant. In another one
        not so: a singular value, or a product, depends on the number of threads and on the device that made it. But it
        must be nearer to ours, by far, than our change is large: no other checkpoint is, nor the base.
        """
        made = ours.to(weight.dtype)
        if made.shape != weight.shape or same_bits(made, weight) or self.is_the_same(weight):
            return same_bits(made, weight)
        wide = working_dtype(base)
        change, rest = (made.to(wide) - other.detach().to(wide) for other in (base, weight))
        return bool(rest.norm() <= NEAR * change.norm())  # not where there is a NaN


def _version(weight: Tensor) -> object:
    if not weight.is_inference():
        return weight._version
    flat = weight.detach().flatten()  # tensors made in inference mode are not counted: look at some of the numbers
    return tuple(flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].tolist())
