"""The methods of torch's layers: they are not patched, so these are the classes' own."""

from __future__ import annotations

from torch import nn


class LoraPatches:
    """Each method under the name that the built-in keeps it by."""

    def __init__(self) -> None:
        for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention):
            setattr(self, f"{kind.__name__}_forward", kind.forward)
            setattr(self, f"{kind.__name__}_load_state_dict", kind._load_from_state_dict)

    def undo(self) -> None:
        """There is nothing to undo."""
