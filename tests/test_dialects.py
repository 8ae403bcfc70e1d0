"""Dialects: how each tool spells the names. Each is recognised, fits its own model whole, and no other model at all.

`real` ones are the names and shapes of adapters that people published (`tests/fixtures/adapters`); the others are
written by each tool's rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from lib_locon.files.adapter import Adapter, read_adapter
from lib_locon.files.dialects import PREFIXES, module_name, split_key
from lib_locon.matching import match
from lib_locon.models.base_family import base_family
from lib_locon.models.table import TargetTable
from tests.oracles import model_tables as tables
from tests.oracles import trainer_rules as rules

Shapes = Mapping[str, tuple[int, ...]]
PEFT = (".lora_A.weight", ".lora_B.weight")
NAMED = (".lora_A.default.weight", ".lora_B.default.weight")
MIDDLE = (".lora.down.weight", ".lora.up.weight")
LINEAR_LAYER = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")


@cache
def table(name: str) -> TargetTable:
    return TargetTable.of_shapes(tables.live(name))


def under(prefix: str, modules: Shapes) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{name}": shape for name, shape in modules.items()}


def flat(prefix: str, modules: Shapes) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{name.replace('.', '_')}": shape for name, shape in modules.items()}


def unet(name: str, ldm: bool = False) -> dict[str, tuple[int, ...]]:
    return {module.ldm if ldm else module.name: module.shape for module in rules.attention_only(name)}


def clip(encoder: str, text_model: bool = True) -> dict[str, tuple[int, ...]]:
    width, layers = {"l": (768, 12), "h": (1024, 23), "g": (1280, 32)}[encoder]
    modules = rules.clip("", width, layers)
    return modules if text_model else {name.removeprefix("text_model."): shape for name, shape in modules.items()}


def processors(prefix: str, modules: Shapes) -> dict[str, tuple[int, ...]]:
    """diffusers' attention processors: `….attn1.processor.to_q_lora.down.weight`; `to_out_lora` is `to_out.0`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, inp) in modules.items():
        block, _, leaf = name.removesuffix(".0").rpartition(".")
        stem = f"{prefix}{block}.processor.{leaf}_lora"
        shapes.update({f"{stem}.down.weight": (4, inp), f"{stem}.up.weight": (out, 4)})
    return shapes


def text_processors(prefix: str, modules: Shapes) -> dict[str, tuple[int, ...]]:
    """The same age's text encoders: `….self_attn.to_q_lora.down.weight`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, inp) in modules.items():
        if ".self_attn." in name:
            stem = f"{prefix}{name.removesuffix('_proj')}".replace(".self_attn.", ".self_attn.to_") + "_lora"
            shapes.update({f"{stem}.down.weight": (4, inp), f"{stem}.up.weight": (out, 4)})
    return shapes


def open_clip_text(prefix: str) -> dict[str, tuple[int, ...]]:
    """Layers of OpenCLIP's own names that a LoRA can sit on."""
    leaves = {"attn.out_proj": (1280, 1280), "mlp.c_fc": (5120, 1280), "mlp.c_proj": (1280, 5120)}
    return {f"{prefix}{n}.{leaf}": shape for n in range(32) for leaf, shape in leaves.items()}


def linears(name: str) -> dict[str, tuple[int, ...]]:
    shapes = tables.read("diffusers", name)
    return {key.removesuffix(".weight"): shape for key, shape in shapes.items() if len(shape) == 2}


@dataclass(frozen=True)
class Sample:
    """A file: its tensors, module counts by dialect, and the models that it fits whole."""

    name: str
    shapes: Callable[[], Shapes]
    dialects: Mapping[str, int]
    models: tuple[str, ...]

    def read(self, folder: Path) -> Adapter:
        return read_adapter(tables.hollow(folder / "adapter.safetensors", self.shapes()), header_only=True)


def pairs(modules: Shapes, suffixes: tuple[str, str]) -> Shapes:
    return rules.pairs(modules, *suffixes)


SD1 = ("sd15", "sd15_inpaint")
SD3 = ("sd3",)
FLUX = ("flux",)
BOTH_FLUX = ("flux", "flux_bare")
SAMPLES = (
    Sample("kohya sd1", lambda: rules.kohya_file(rules.kohya("sd15")), {"kohya": 264}, SD1),
    Sample("kohya sd1, ldm names", lambda: rules.lora(flat("lora_unet_", unet("sd15", ldm=True))), {"kohya": 128}, SD1),
    Sample("kohya sd2", lambda: rules.kohya_file(rules.kohya("sd21")), {"kohya": 330}, ("sd21",)),
    Sample("kohya sdxl, sgm names", lambda: rules.kohya_file(rules.kohya("sdxl")), {"kohya": 986}, ("sdxl",)),
    Sample("kohya refiner", lambda: rules.kohya_file(rules.kohya("sdxl_refiner")), {"kohya": 654}, ("sdxl_refiner",)),
    Sample("kohya oft sdxl", lambda: rules.kohya_oft_file("sdxl"), {"kohya OFT": 560}, ("sdxl",)),
    Sample("kohya sd3", lambda: rules.lora(rules.sd3_kohya()), {"kohya": 237}, SD3),
    Sample(
        "onetrainer sd1, checkpointed blocks",
        lambda: rules.lora(
            {k.replace("_attn1_", "_checkpoint_attn1_"): v for k, v in flat("lora_unet_", unet("sd15")).items()}
        ),
        {"kohya": 128},
        SD1,
    ),
    Sample("onetrainer sdxl", lambda: rules.lora(flat("lora_unet_", unet("sdxl"))), {"kohya": 560}, ("sdxl",)),
    Sample(
        "onetrainer sd3",
        lambda: rules.lora({**flat("lora_transformer_", linears("sd3")), **flat("lora_te1_", clip("l"))}),
        {"OneTrainer": len(linears("sd3")), "kohya": 72},
        SD3,
    ),
    Sample("lycoris sd1", lambda: rules.lora({**flat("lycoris_", unet("sd15")), **flat("lycoris_", clip("l"))}),
           {"LyCORIS": 200}, SD1),
    Sample("simpletuner sd3", lambda: rules.lora(flat("lycoris_", linears("sd3"))),
           {"LyCORIS": len(linears("sd3"))}, SD3),
    Sample("simpletuner flux", lambda: rules.lora(flat("lycoris_", linears("flux"))),
           {"LyCORIS": len(linears("flux"))}, BOTH_FLUX),
    Sample("diffusers 2023 sd1", lambda: processors("unet.", unet("sd15")), {"diffusers": 128}, SD1),
    Sample("diffusers 2023 sdxl, no prefix", lambda: processors("", unet("sdxl")), {"bare names": 560}, ("sdxl",)),
    Sample("diffusers 2023 sd1 with text",
           lambda: {**processors("unet.", unet("sd15")), **text_processors("text_encoder.", clip("l"))},
           {"diffusers": 128 + 48}, SD1),
    Sample("diffusers middle sd2",
           lambda: {**pairs(under("unet.", unet("sd21")), MIDDLE),
                    **pairs(under("text_encoder.", clip("h")), LINEAR_LAYER)},
           {"diffusers": 128 + 138}, ("sd21",)),
    Sample("diffusers sdxl, both texts",
           lambda: {**pairs(under("unet.", unet("sdxl")), PEFT), **pairs(under("text_encoder.", clip("l")), PEFT),
                    **pairs(under("text_encoder_2.", clip("g")), PEFT)},
           {"diffusers": 560 + 264}, ("sdxl",)),
    Sample("diffusers sdxl, no text_model",
           lambda: {**pairs(under("unet.", unet("sdxl")), PEFT),
                    **pairs(under("text_encoder.", clip("l", text_model=False)), PEFT),
                    **pairs(under("text_encoder_2.", clip("g", text_model=False)), PEFT)},
           {"diffusers": 560 + 264}, ("sdxl",)),
    Sample("text_model twice",
           lambda: rules.lora({**flat("lora_unet_", unet("sd15")), **flat("lora_te_text_model_", clip("l"))}),
           {"kohya": 200}, SD1),
    Sample("diffusers sd3", lambda: pairs(under("transformer.", linears("sd3")), PEFT),
           {"diffusers": len(linears("sd3"))}, SD3),
    Sample("peft sd1", lambda: pairs(under("base_model.model.", {**unet("sd15"), **clip("l")}), PEFT),
           {"PEFT": 200}, SD1),
    Sample("peft sdxl, adapter name left in", lambda: pairs(under("base_model.model.", unet("sdxl")), NAMED),
           {"PEFT": 560}, ("sdxl",)),
    Sample("peft inside unet",
           lambda: {**pairs(under("unet.base_model.model.", unet("sd15")), PEFT),
                    **pairs(under("text_encoder.base_model.model.", clip("l")), PEFT)},
           {"PEFT": 200}, SD1),
    Sample("peft around all",
           lambda: {**pairs(under("base_model.model.unet.", unet("sdxl")), PEFT),
                    **pairs(under("base_model.model.text_encoder_2.", clip("g")), PEFT)},
           {"PEFT": 560 + 192}, ("sdxl",)),
    Sample("peft sd3", lambda: pairs(under("base_model.model.", linears("sd3")), PEFT),
           {"PEFT": len(linears("sd3"))}, SD3),
    Sample("comfyui sdxl",
           lambda: {**pairs(under("diffusion_model.", unet("sdxl", ldm=True)), KOHYA),
                    **pairs(under("text_encoders.clip_l.transformer.", clip("l")), KOHYA),
                    **pairs(under("text_encoders.clip_g.transformer.", clip("g")), KOHYA)},
           {"ldm": 560, "ComfyUI": 264}, ("sdxl",)),
    Sample("comfyui sd3",
           lambda: {**pairs(under("diffusion_model.", {"joint_blocks.0.x_block.attn.qkv": (4608, 1536)}), KOHYA),
                    **pairs(under("clip_l.", clip("l")), KOHYA),
                    **pairs(under("clip_g.transformer.", clip("g")), KOHYA),
                    **pairs({"text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.q": (4096, 4096)},
                            KOHYA)},
           {"ldm": 1, "ComfyUI": 265}, SD3),
    Sample("checkpoint names sd1",
           lambda: {**pairs(under("model.diffusion_model.", unet("sd15", ldm=True)), PEFT),
                    **pairs(under("cond_stage_model.transformer.", clip("l")), PEFT)},
           {"ldm": 200}, SD1),
    Sample("checkpoint names sdxl",
           lambda: {**pairs(under("model.diffusion_model.", unet("sdxl", ldm=True)), PEFT),
                    **pairs(under("conditioner.embedders.0.transformer.", clip("l")), PEFT),
                    **pairs(open_clip_text("conditioner.embedders.1.model.transformer.resblocks."), PEFT)},
           {"ldm": 560, "sgm": 72 + 96}, ("sdxl",)),
    Sample("checkpoint names refiner",
           lambda: {**pairs(under("model.diffusion_model.", unet("sdxl_refiner", ldm=True)), PEFT),
                    **pairs(open_clip_text("conditioner.embedders.0.model.transformer.resblocks."), PEFT)},
           {"ldm": 352, "sgm": 96}, ("sdxl_refiner",)),
    Sample("bare ldm names", lambda: pairs(unet("sd21", ldm=True), PEFT), {"bare names": 128}, ("sd21",)),
    Sample("real kohya flux", lambda: tables.read("adapters", "flux_lora_kohya"), {"kohya": 304}, BOTH_FLUX),
    Sample("real kohya flux with text", lambda: tables.read("adapters", "flux_lora_kohya_with_te1"),
           {"kohya": 376}, FLUX),
    Sample("real onetrainer flux", lambda: tables.read("adapters", "flux_dora_onetrainer"),
           {"OneTrainer": 266, "kohya": 240}, FLUX),
    Sample("real ai-toolkit flux", lambda: tables.read("adapters", "flux_lora_aitoolkit"), {"ldm": 228}, BOTH_FLUX),
    Sample("real diffusers flux", lambda: tables.read("adapters", "flux_lora_diffusers"),
           {"diffusers": 494}, BOTH_FLUX),
    Sample("real diffusers flux, some layers", lambda: tables.read("adapters", "flux_lora_diffusers_no_proj_mlp"),
           {"diffusers": 342}, BOTH_FLUX),
    Sample("real peft flux", lambda: tables.read("adapters", "flux_lora_diffusers_base_model"),
           {"PEFT": 381}, BOTH_FLUX),
    Sample("real xlabs flux", lambda: tables.read("adapters", "flux_lora_xlabs"), {"bare names": 12}, BOTH_FLUX),
)  # fmt: skip
EVERY = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@EVERY
def test_every_module_is_recognised_as_of_its_dialect(sample: Sample, tmp_path: Path) -> None:
    adapter = sample.read(tmp_path)
    assert Counter(module.name.dialect.name for module in adapter.modules) == dict(sample.dialects)
    assert adapter.unknown == ()
    assert [unread for module in adapter.modules for unread in module.unread] == []
    assert sum(len(module.layers) for module in adapter.modules) == len(adapter.modules)


@EVERY
def test_a_file_fits_its_own_models_whole(sample: Sample, tmp_path: Path) -> None:
    adapter = sample.read(tmp_path)
    for name in sample.models:
        found = match(adapter, table(name))
        assert (found.used, found.total, found.unmatched) == (len(adapter.modules), len(adapter.modules), ()), name
        assert len({item.view for item in found.matched}) == len(found.matched)


@EVERY
def test_the_family_of_a_file_is_that_of_its_models(sample: Sample, tmp_path: Path) -> None:
    assert base_family(sample.read(tmp_path)) == tables.FAMILY[sample.models[0]]


@EVERY
def test_a_file_changes_nothing_of_any_other_family(sample: Sample, tmp_path: Path) -> None:
    adapter = sample.read(tmp_path)
    for name in tables.MODELS:
        if tables.FAMILY[name] != tables.FAMILY[sample.models[0]]:
            assert match(adapter, table(name)).matched == (), name


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_no_dialect_claims_what_another_one_wrote(sample: Sample, tmp_path: Path) -> None:
    """A prefix is a prefix of no other dialect's files, unless a longer one goes before it."""
    for module in sample.read(tmp_path).modules:
        fitting = [dialect for dialect in PREFIXES if module.name.written.startswith(dialect.prefix)]
        longest = max(fitting, key=lambda dialect: len(dialect.prefix), default=None)
        assert module.name.dialect is longest or (longest is None and module.name.dialect.prefix == "")


def test_every_real_adapter_has_its_sample() -> None:
    used = {shapes for sample in SAMPLES if sample.name.startswith("real") for shapes in [tuple(sample.shapes())]}
    left = [name for name in tables.ADAPTERS if tuple(tables.read("adapters", name)) not in used]
    assert left == ["flux_control_lora"]  # the one that wants a larger model: below


def test_bfls_control_adapter_fits_but_for_the_layer_that_it_wants_larger(tmp_path: Path) -> None:
    shapes = tables.read("adapters", "flux_control_lora")
    adapter = read_adapter(tables.hollow(tmp_path / "a.safetensors", shapes), header_only=True)
    for name in BOTH_FLUX:
        found = match(adapter, table(name))
        assert (found.used, found.total) == (466, 466)  # img_in: its bias
        assert [(item.key, item.reason[:11]) for item in found.unmatched] == [("img_in", "wrong shape")]
        assert Counter(item.layer.label for item in found.matched)["Set"] == 152
    assert base_family(adapter) == "Flux"


def test_dialects_that_cannot_be_read_say_so() -> None:
    for written in ("lora_unet__blocks_0_self_attn_q", "lora_prior_unet_x", "lora_prior_te_x"):
        assert module_name(written).dialect.rejected


@pytest.mark.parametrize("prefix", [dialect.prefix for dialect in PREFIXES if not dialect.rejected])
def test_every_prefix_is_in_some_sample_or_means_a_part_of_the_model(prefix: str) -> None:
    name = module_name(f"{prefix}x")
    assert name.dialect.prefix == prefix and name.body == "x"


SEEN = (
    # keys that people quoted in public issues, with the module that they mean
    ("lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_ff_net_0_proj.lora_down.weight", "sd15",
     "input_blocks.5.1.transformer_blocks.0.ff.net.0.proj"),  # sd-webui-lora-block-weight 97
    ("lora_unet_down_blocks_0_attentions_0_proj_out.alpha", "sd15", "input_blocks.1.1.proj_out"),  # sd-scripts 1080
    ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight", "sd15",
     "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0"),  # stable-diffusion-webui 12221
    ("lora_unet_input_blocks_7_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight", "sdxl",
     "input_blocks.7.1.transformer_blocks.0.attn1.to_out.0"),  # kohya_ss 3105
    ("unet.down_blocks.1.attentions.1.transformer_blocks.1.attn1.processor.to_q_lora.up.weight", "sdxl",
     "input_blocks.5.1.transformer_blocks.1.attn1.to_q"),  # efficiency-nodes-comfyui 104
    ("unet.down_blocks.1.attentions.1.transformer_blocks.1.attn1.processor.to_out_lora.down.weight", "sdxl",
     "input_blocks.5.1.transformer_blocks.1.attn1.to_out.0"),
    ("down_blocks.2.attentions.1.transformer_blocks.6.attn2.processor.to_out_lora.down.weight", "sdxl",
     "input_blocks.8.1.transformer_blocks.6.attn2.to_out.0"),  # ComfyUI 1144
    ("lora_transformer_transformer_blocks_1_attn_to_add_out.lora_down.weight", "flux",
     "double_blocks.1.txt_attn.proj"),  # diffusers 10599
    ("transformer.single_transformer_blocks.5.proj_out.lora_B.weight", "flux", "single_blocks.5.linear2"),  # toolkit 67
    ("transformer.transformer_blocks.18.norm1_context.linear.lora_A.weight", "flux",
     "double_blocks.18.txt_mod.lin"),  # sd-scripts 1523
    ("double_blocks.3.processor.proj_lora2.up.weight", "flux", "double_blocks.3.txt_attn.proj"),
)  # fmt: skip


@pytest.mark.parametrize(("key", "model", "module"), SEEN)
def test_keys_that_other_loaders_failed_on_are_found(key: str, model: str, module: str) -> None:
    split = split_key(key)
    assert split is not None
    name = module_name(split[0])
    target = table(model).find(name.body, name.dialect.components)
    assert target is not None and target.name == f"model.diffusion_model.{module}"
