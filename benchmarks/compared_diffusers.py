"""diffusers: the pipeline's own loader over peft's layers, on modules of diffusers and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import adapters
from benchmarks.compared_ways import Unable, Way, fill
from benchmarks.models import skeleton
from extensions_builtin_shim.tiny_sd import Config
from lib_locon.models.table import TargetTable

transformers.logging.set_verbosity_error()
_PARTS = ("unet", "text_encoder")
_ADAPTER = "benchmark"


class Diffusers(Way):
    """`load_lora_weights` of the file as kohya writes it, `fuse_lora` and `unfuse_lora`."""

    name = "diffusers"
    package = "diffusers"
    calls: ClassVar = {
        "load": "load_lora_weights",
        "apply": "fuse_lora()",
        "change": "unfuse_lora(), set_adapters([name], [new]), fuse_lora()",
        "remove": "unfuse_lora()",
        "again": "fuse_lora()",
    }
    note = (
        "Over peft's layers. The new strength is set by `set_adapters`: `fuse_lora(lora_scale=…)` multiplies the "
        "layers' scale, which `unfuse_lora` leaves multiplied."
    )

    def __init__(self, model: str, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(model, dtype, folder)
        if model not in ("tiny", "sd15"):
            raise Unable(f"there is no configuration for {model} here")
        unet, text_encoder = _build(Config.tiny() if model == "tiny" else Config.sd15())
        fill((unet, text_encoder), dtype)
        self.pipe = StableDiffusionPipeline(
            vae=None,
            text_encoder=text_encoder,
            tokenizer=None,
            unet=unet,
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.weights = _weights(model, unet, text_encoder)

    def convert(self, file: Path) -> Path:
        return file

    def load(self, file: Path) -> None:
        self.pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=_ADAPTER, local_files_only=True
        )

    def apply(self, strength: float) -> None:
        self.pipe.set_adapters([_ADAPTER], [strength])
        self.pipe.fuse_lora(components=list(_PARTS))

    def change(self, old: float, new: float) -> None:
        self.pipe.unfuse_lora(components=list(_PARTS))
        self.apply(new)

    def remove(self, strength: float) -> None:
        self.pipe.unfuse_lora(components=list(_PARTS))

    def unload(self) -> None:
        self.pipe.unload_lora_weights()


def _build(config: Config) -> tuple[nn.Module, nn.Module]:
    """The same sizes, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=config.image_size,
            block_out_channels=tuple(config.model_channels * factor for factor in config.channel_mult),
            norm_num_groups=config.norm_groups,
            attention_head_dim=config.heads,
            cross_attention_dim=config.context_dim,
        )
        text = CLIPTextConfig(
            vocab_size=config.clip_vocab,
            hidden_size=config.clip_hidden,
            intermediate_size=config.clip_intermediate,
            num_hidden_layers=config.clip_layers,
            num_attention_heads=config.clip_heads,
            max_position_embeddings=config.clip_max_length,
        )
        return unet, CLIPTextModel(text)


def _weights(model: str, unet: nn.Module, text_encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that kohya's names mean, checked against this project's model: the same modules, the same shapes."""
    found = {}
    for prefix, part in (("lora_unet_", unet), ("lora_te_", text_encoder)):
        for path, module in part.named_modules():
            # before version 5 of transformers the modules' names began with it; kohya's have kept it
            path = f"text_model.{path}" if part is text_encoder and not path.startswith("text_model") else path
            found[prefix + path.replace(".", "_")] = module
    table = TargetTable.of_model(skeleton(model))
    weights = {name: found[name].weight.detach() for name in adapters.trained(table)}
    for name, path in adapters.trained(table).items():
        if weights[name].shape != table.shapes[path]:
            raise RuntimeError(f"{name} is {tuple(weights[name].shape)} in diffusers and {table.shapes[path]} here")
    return weights
