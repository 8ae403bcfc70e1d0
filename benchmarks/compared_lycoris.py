"""lycoris-lora: a network made from the file's tensors, merged into the model's weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar

import torch
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file, save_file

from benchmarks.compared_ways import OnTheTree, need

logging.getLogger("LyCORIS").setLevel(logging.ERROR)


class Lycoris(OnTheTree):
    """`merge_to`, taken back as the library's own example does: merged once more with the opposite sign."""

    name = "lycoris"
    package = "lycoris-lora"
    calls: ClassVar = {
        "load": "create_lycoris_from_weights",
        "apply": "merge_to(strength)",
        "change": "merge_to(new - old)",
        "remove": "merge_to(-strength)",
        "again": "merge_to(strength)",
    }
    note = "Keeps nothing of the base: what it takes back is what it can work out again."
    precise = False

    def convert(self, file: Path) -> Path:
        converted = self.folder / f"lycoris-{file.name}"
        tensors = {}
        for key, tensor in load_file(file).items():
            name, _, suffix = key.partition(".")
            tensors[f"lycoris_{self.module(name).replace('.', '_')}.{suffix}"] = tensor
        save_file(tensors, converted)
        return converted

    def load(self, file: Path) -> None:
        self.network, _ = create_lycoris_from_weights(1.0, str(file), self.model)

    def apply(self, strength: float) -> None:
        self.network.merge_to(strength, precise=self.precise)

    def change(self, old: float, new: float) -> None:
        self.apply(new - old)

    def remove(self, strength: float) -> None:
        self.apply(-strength)

    def unload(self) -> None:
        del self.network


class LycorisPrecise(Lycoris):
    """The same with `precise=True`: sums in fp64 beside the model, which stay there for good."""

    name = "lycoris-precise"
    calls: ClassVar = {
        **Lycoris.calls,
        "apply": "merge_to(strength, precise=True)",
        "change": "merge_to(new - old, precise=True)",
        "remove": "merge_to(-strength, precise=True)",
        "again": "merge_to(strength, precise=True)",
    }
    note = "Keeps two copies of every touched weight in fp64 on the modules, and never frees them."
    precise = True

    def __init__(self, model: str, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(model, dtype, folder)
        touched = sum(weight.numel() for weight in self.weights.values())
        # two of fp64 for good, and the plain copy that the floor is timed with
        need(touched * (2 * 8 + dtype.itemsize), "two copies of every touched weight in fp64")

    def unload(self) -> None:
        """Takes the sums off the modules, which the library never does: else no round would start from rest."""
        super().unload()
        for module in self.model.modules():
            for name in [name for name in vars(module) if name.startswith("_lycoris_precise_")]:
                delattr(module, name)


class LycorisOnTheFly(Lycoris):
    """`onfly_merge` and `onfly_restore`, the library's pair for merging for a while."""

    name = "lycoris-onfly"
    calls: ClassVar = {
        "load": "create_lycoris_from_weights",
        "apply": "onfly_merge(strength)",
        "change": "onfly_restore(), onfly_merge(new)",
        "remove": "onfly_restore()",
        "again": "onfly_merge(strength)",
    }
    note = (
        "`onfly_merge` keeps the base as `weight.data.cpu()`. For a weight on the CPU that is no copy but the weight "
        "itself, and `onfly_restore` then restores nothing."
    )

    def apply(self, strength: float) -> None:
        self.network.onfly_merge(strength)

    def change(self, old: float, new: float) -> None:
        self.network.onfly_restore()
        self.network.onfly_merge(new)

    def remove(self, strength: float) -> None:
        self.network.onfly_restore()
