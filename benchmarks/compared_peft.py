"""peft: its own layers around the model's, merged into the weights and subtracted again."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from benchmarks.compared_check import Factors
from benchmarks.compared_ways import OnTheTree


class Peft(OnTheTree):
    """`merge_adapter` and `unmerge_adapter` of a `PeftModel`."""

    name = "peft"
    package = "peft"
    calls: ClassVar = {
        "load": "PeftModel.from_pretrained(low_cpu_mem_usage=True)",
        "apply": "merge_adapter()",
        "change": "unmerge_adapter(), set_scale(new) on each layer, merge_adapter()",
        "remove": "unmerge_adapter()",
        "again": "merge_adapter()",
    }
    note = "`load` puts a layer of its own around each of the model's; `unload` (not timed) takes them off."

    def convert(self, file: Path) -> Path:
        factors = Factors.of(load_file(file))
        folder = self.folder / f"peft-{file.stem}"
        folder.mkdir()
        tensors = {}
        for name, layer in factors.items():
            path = f"base_model.model.{self.module(name)}"
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = layer.down, layer.up
        save_file(tensors, folder / "adapter_model.safetensors")
        rank = next(iter(factors.values())).down.shape[0]
        scale = next(iter(factors.values())).scale  # the same everywhere in these files
        modules = [self.module(name) for name in factors]
        LoraConfig(r=rank, lora_alpha=int(rank * scale), target_modules=modules).save_pretrained(folder)
        return folder

    def load(self, file: Path) -> None:
        self.wrapped = PeftModel.from_pretrained(self.model, str(file), low_cpu_mem_usage=True)

    def apply(self, strength: float) -> None:
        self._scale(strength)
        self.wrapped.merge_adapter()

    def change(self, old: float, new: float) -> None:
        self.wrapped.unmerge_adapter()
        self.apply(new)

    def remove(self, strength: float) -> None:
        self.wrapped.unmerge_adapter()

    def unload(self) -> None:
        self.wrapped.unload()
        del self.wrapped

    def _scale(self, strength: float) -> None:
        for module in self.wrapped.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", strength)
