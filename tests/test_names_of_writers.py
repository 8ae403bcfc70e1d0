"""Names that one writer or host alone uses: numbered projections, other numbers of text encoders, wrapped networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lib_locon
from lib_locon.files.dialects import module_name
from lib_locon.matching import match
from lib_locon.models.base_family import base_family
from lib_locon.models.blocks import place_of
from lib_locon.models.table import TargetTable
from tests.oracles import model_tables as tables
from tests.test_names_both_ways import HF, OPEN, T5, changes, expect, lora, network

FLUX = {
    **{f"double_blocks.0.{side}_attn.qkv.weight": (12, 4) for side in ("img", "txt")},
    "single_blocks.0.linear1.weight": (28, 4),
    "img_in.weight": (4, 8),
}
FLUX_OF_DIFFUSERS = {
    **{f"transformer_blocks.0.attn.{name}.weight": (4, 4) for name in ("to_q", "to_k", "to_v")},
    **{f"transformer_blocks.0.attn.add_{name}_proj.weight": (4, 4) for name in "qkv"},
    **{f"single_transformer_blocks.0.attn.{name}.weight": (4, 4) for name in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.0.proj_mlp.weight": (16, 4),
    "x_embedder.weight": (4, 8),
}
NUMBERED = {
    "double_blocks.0.img_attn.qkv.1": ("transformer_blocks.0.attn.to_k", slice(4, 8)),
    "double_blocks.0.txt_attn.qkv.2": ("transformer_blocks.0.attn.add_v_proj", slice(8, 12)),
    "single_blocks.0.linear1.0": ("single_transformer_blocks.0.attn.to_q", slice(0, 4)),
    "single_blocks.0.linear1.3": ("single_transformer_blocks.0.proj_mlp", slice(12, 28)),
    "img_in.proj": ("x_embedder", slice(0, 4)),
}
"""OneTrainer's own format of Flux → diffusers' module, and the rows of BFL's."""


@pytest.mark.parametrize("name", NUMBERED)
def test_projections_that_onetrainer_numbers_are_found_in_both_layouts(name: str, tmp_path: Path) -> None:
    other, rows = NUMBERED[name]
    shape = FLUX_OF_DIFFUSERS[f"{other}.weight"]
    delta = lora(tmp_path / "a.safetensors", {f"transformer.{name}": shape})[f"transformer.{name}"]
    apart = network({f"transformer.{path}": size for path, size in FLUX_OF_DIFFUSERS.items()})
    expect(changes(tmp_path / "a.safetensors", apart)[0], {f"transformer.{other}.weight": delta})
    fused = network({f"model.diffusion_model.{path}": size for path, size in FLUX.items()})
    path = f"model.diffusion_model.{name.rpartition('.')[0]}.weight"
    filled = torch.zeros(FLUX[path.removeprefix("model.diffusion_model.")])
    filled[rows] = delta
    expect(changes(tmp_path / "a.safetensors", fused)[0], {path: filled})


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_numbered_projections_are_the_same_targets_as_those_apart(name: str) -> None:
    table = TargetTable.of_shapes(tables.live(name))
    assert table.collisions == []
    block = "joint_blocks.2.x_block.attn.qkv" if name == "sd3" else "double_blocks.2.img_attn.qkv"
    for number, projection in enumerate(("to_q", "to_k", "to_v")):
        target = table.find(f"{block}.{number}", ("unet",))
        assert target is not None and target is table.find(f"transformer_blocks.2.attn.{projection}", ("unet",))


ONLY_ONE = {
    f"conditioner.embedders.0.wrapped.model.{OPEN}": ("lora_te1_", "lora_te_", "text_encoder.", "clip_g."),
    f"conditioner.embedders.0.model.{OPEN}": ("lora_te1_", "text_encoder.", "clip_h.", "text_encoders.clip_h."),
    f"text_encoder_2.{HF}": ("lora_te1_", "lora_te2_", "text_encoder.", "lycoris_text_encoder_2_"),
    f"text_encoder.{HF}": ("lycoris_text_encoder_", "cond_stage_model.transformer."),
}  # fmt: skip


@pytest.mark.parametrize("place", ONLY_ONE)
def test_a_models_only_text_encoder_answers_to_the_first_number(place: str, tmp_path: Path) -> None:
    table = TargetTable.of_shapes({f"{place}.weight": (8, 8), "unet.conv_in.weight": (4, 4, 3, 3)})
    for prefix in ONLY_ONE[place]:
        name = prefix + (HF if "." in prefix else HF.replace(".", "_"))
        lora(tmp_path / "a.safetensors", {name: (8, 8)})
        found = match(lib_locon.load(tmp_path / "a.safetensors"), table)
        assert [item.view.path for item in found.matched] == [f"{place}.weight"], name


def test_two_text_encoders_keep_their_numbers() -> None:
    table = TargetTable.of_shapes({f"text_encoder{n}.{HF}.weight": (8, 8) for n in ("", "_2")})
    for number, place in ((1, "text_encoder"), (2, "text_encoder_2")):
        written = module_name(f"lora_te{number}_{HF.replace('.', '_')}")
        assert [t.name for t in table.candidates(written.body, written.dialect.components)] == [f"{place}.{HF}"]
    assert not TargetTable.of_shapes({f"text_encoder_2.{T5}.weight": (4, 4)}).has(("te1",))


@pytest.mark.parametrize("prefix", ["t5.", "text_encoders.t5."])
def test_t5_is_found_by_the_short_name_too(prefix: str, tmp_path: Path) -> None:
    place = f"text_encoder_3.{T5}"
    lora(tmp_path / "a.safetensors", {prefix + T5: (4, 4)})
    found = match(lib_locon.load(tmp_path / "a.safetensors"), TargetTable.of_shapes({f"{place}.weight": (4, 4)}))
    assert [item.view.path for item in found.matched] == [f"{place}.weight"]


@pytest.mark.parametrize(
    "name",
    [
        "module.lora_unet_mid_block_attentions_0_proj_in",
        "_orig_mod.lora_unet_middle_block_1_proj_in",
        "module._orig_mod.unet.mid_block.attentions.0.proj_in",
        "module.mid_block.attentions.0.proj_in",
        "base_model.model.module.unet.mid_block.attentions.0.proj_in",
        "unet.mid_block.attentions.0.proj_in",
    ],
)
def test_a_wrapper_around_the_whole_network_does_not_matter(name: str) -> None:
    written = module_name(name)
    table = TargetTable.of_shapes({"model.diffusion_model.middle_block.1.proj_in.weight": (4, 4)})
    target = table.find(written.body, written.dialect.components)
    assert written.written == name and target is not None and target.name.endswith("middle_block.1.proj_in")


def test_a_name_cut_short_leads_to_no_first_child() -> None:
    table = TargetTable.of_shapes(tables.live("sdxl"))
    for name in ("out", "time_embed", "label_emb_0", "middle_block"):
        assert table.find(name, ("unet",)) is None
    assert table.find("middle_block_1_transformer_blocks_0_attn1_to_out", ("unet",)) is not None


def test_the_embedding_of_sizes_has_the_place_for_classes_as_a_second_name_in_both_layouts() -> None:
    for shapes in (tables.live("sdxl_refiner"), tables.read("diffusers", "sdxl_refiner")):
        table = TargetTable.of_shapes(shapes)
        for number in (1, 2):
            target = table.find(f"add_embedding_linear_{number}", ("unet",))
            assert target is not None and target is table.find(f"class_embedding_linear_{number}", ("unet",))


def test_whole_differences_of_openclips_parameters_reach_a_text_encoder_of_hugging_face(tmp_path: Path) -> None:
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn"
    shapes: dict[str, tuple[int, ...]] = {"text_encoder_2.text_projection.weight": (6, 4)}
    for name in ("q_proj", "k_proj", "v_proj"):
        shapes |= {f"{layer}.{name}.weight": (4, 4), f"{layer}.{name}.bias": (4,)}
    weight, bias, projection = torch.randn(12, 4), torch.randn(12), torch.randn(4, 6)
    root = "conditioner.embedders.1.model"
    attention = f"{root}.transformer.resblocks.0.attn"
    tensors = {f"{attention}.in_proj_weight.diff": weight, f"{attention}.in_proj_bias.diff": bias}
    save_file({**tensors, f"{root}.text_projection.diff": projection}, tmp_path / "a.safetensors")
    wanted = {"text_encoder_2.text_projection.weight": projection.T}
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(4 * number, 4 * number + 4)
        wanted |= {f"{layer}.{name}.weight": weight[rows], f"{layer}.{name}.bias": bias[rows]}
    expect(changes(tmp_path / "a.safetensors", network(shapes))[0], wanted)


def test_one_adapter_of_a_fused_attention_reaches_openclips_parameter(tmp_path: Path) -> None:
    root = "conditioner.embedders.1.model.transformer.resblocks.0.attn"
    delta = lora(tmp_path / "a.safetensors", {f"{root}.in_proj": (12, 4)})[f"{root}.in_proj"]
    model = network({f"{root}.in_proj_weight": (12, 4), f"{root}.in_proj_bias": (12,)})
    expect(changes(tmp_path / "a.safetensors", model)[0], {f"{root}.in_proj_weight": delta})


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("transformer_blocks.3.attn.to_q", "D03"),
        ("single_transformer_blocks.37.proj_mlp", "S37"),
        ("x_embedder", "IN"),
        ("time_text_embed.text_embedder.linear_1", "IN"),
        ("norm_out.linear", "OUT"),
        ("x_embedder.proj", ""),
    ],
)
def test_flux_of_diffusers_has_the_blocks_of_the_original(path: str, block: str) -> None:
    assert place_of("unet", f"transformer.{path}.weight").block == block
    assert place_of("model", f"{path}.weight").block == block


def test_a_root_written_twice_does_not_hide_the_family(tmp_path: Path) -> None:
    lora(tmp_path / "a.safetensors", {"lora_unet_diffusion_model_double_blocks_0_img_attn_proj": (3072, 3072)})
    assert base_family(lib_locon.load(tmp_path / "a.safetensors")) == "Flux"
