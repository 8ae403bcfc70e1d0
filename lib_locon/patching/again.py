"""To know again what others touched: a weight by what was written into it, a checkpoint file by the sums it gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lib_locon.patching.bits import same_bits
from lib_locon.patching.compute import exact_sums
from lib_locon.patching.held import Held
from lib_locon.patching.parameters import Parameters
from lib_locon.patching.store import BaseStore
from lib_locon.patching.writer import Writer


def made_again(path: str, held: Held, base: Tensor, writer: Writer) -> Tensor:
    """A new tensor with what was written into the weight, in its dtype then; where the base is."""
    ours = torch.empty_like(base, dtype=held.dtype)
    with exact_sums(base.device.type):
        writer.write_sum(path, ours, base, held.patches or (), held.rounding)
    return ours


def look_at_files(store: BaseStore, weights: Parameters, held: Mapping[str, Held], writer: Writer) -> None:
    """Goes on with a checkpoint file of which nothing but the time has changed, as a backup or a sync may leave it.

    If it gives what the weights hold, to the last bit: all of those that rely on it, or it is believed for none.
    """
    for source, paths in store.sources().items():
        refuse = source.take_as_it_is()
        if refuse is None:
            continue
        believed = False
        try:
            there = weights.found(paths)
            believed = all(_is_given(path, held.get(path), there.get(path), store, writer) for path in paths)
        finally:
            if not believed:
                refuse()


def _is_given(path: str, held: Held | None, weight: Tensor | None, store: BaseStore, writer: Writer) -> bool:
    if held is None or weight is None:
        return False
    try:
        return same_bits(made_again(path, held, store.fetch(path, weight), writer), weight)
    except Exception:  # noqa: BLE001  whatever it is: what cannot be told is not believed
        return False
