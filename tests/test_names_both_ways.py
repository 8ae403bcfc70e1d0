"""The same modules under the names of ldm and diffusers, OpenCLIP and Hugging Face, whichever of them a model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.matching import match
from lib_locon.models.blocks import place_of
from lib_locon.models.table import TargetTable
from lib_locon.models.unet_names import diffusers_names, ldm_names
from lib_locon.report import AdapterReport
from tests.oracles import model_tables as tables

WIDTH = 8
RANK = 2


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A tree of modules that hold parameters of these names and do nothing."""
    root = nn.Module()
    for number, (path, shape) in enumerate(shapes.items()):
        *levels, name = path.split(".")
        place = root
        for level in levels:
            if level not in place._modules:
                place.add_module(level, nn.Module())
            place = place._modules[level]  # type: ignore[assignment]
        place.register_parameter(name, nn.Parameter(rand(*shape, seed=number), requires_grad=False))
    return root


def lora(path: Path, modules: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Writes an adapter for modules with weights of these shapes; returns each ΔW."""
    tensors, deltas = {}, {}
    for number, (name, (out, *rest)) in enumerate(modules.items()):
        up, down = rand(out, RANK, seed=50 + number), rand(RANK, *rest, seed=90 + number)
        tensors |= {f"{name}.lora_up.weight": up.reshape(out, RANK, *(1 for _ in rest[1:]))}
        tensors |= {f"{name}.lora_down.weight": down}
        deltas[name] = (up @ down.flatten(1)).reshape(out, *rest)
    save_file(tensors, path)
    return deltas


def changes(path: Path, model: nn.Module) -> tuple[dict[str, Tensor], AdapterReport]:
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    report = lib_locon.Session(model).apply([lib_locon.Use(lib_locon.load(path))]).adapters[0]
    return {name: weight.detach() - before[name] for name, weight in model.named_parameters()}, report


def expect(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """These changes, and no others."""
    assert {name for name, change in found.items() if change.any()} == wanted.keys()
    for name, change in wanted.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-4)


# ---- UNets


@pytest.mark.parametrize("name", tables.UNETS)
def test_every_module_of_a_unet_leads_to_itself_by_way_of_the_other_name(name: str) -> None:
    ldm, diffusers = tables.unet(name), tables.read("diffusers", name)
    there = diffusers_names(tables.modules(ldm))
    back = ldm_names(tables.modules(diffusers))
    assert there.keys() == set(tables.modules(ldm)) and back.keys() == set(tables.modules(diffusers))
    assert {other: one for one, other in there.items()} == back
    for path, shape in ldm.items():
        module, _, parameter = path.rpartition(".")
        assert diffusers[f"{there[module]}.{parameter}"] == shape


@pytest.mark.parametrize("name", tables.UNETS)
def test_a_unet_of_diffusers_answers_to_both_names_with_one_module_and_block(name: str) -> None:
    shapes = tables.read("diffusers", name)
    table = TargetTable.of_shapes(shapes)
    assert table.collisions == []
    for module, ldm in ldm_names(tables.modules(shapes)).items():
        target = table.find(ldm, ("unet",))
        assert target is not None and target is table.find(module, ("unet",)), module
        assert target.name == module
        assert place_of(target.component, f"{module}.weight").block == place_of("unet", f"{ldm}.weight").block, module


def test_levels_of_one_layer_and_a_middle_without_attention_are_counted_as_they_are() -> None:
    modules = [
        "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0.conv2",
        "down_blocks.1.attentions.0.proj_in", "mid_block.resnets.0.conv1", "mid_block.resnets.1.conv1",
        "up_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.1.conv1", "up_blocks.0.attentions.1.proj_out",
        "up_blocks.0.upsamplers.0.conv", "up_blocks.1.resnets.0.norm1", "up_blocks.1.resnets.1.time_emb_proj",
    ]  # fmt: skip
    names = [
        "input_blocks.1.0.in_layers.2", "input_blocks.2.0.op", "input_blocks.3.0.out_layers.3",
        "input_blocks.3.1.proj_in", "middle_block.0.in_layers.2", "middle_block.1.in_layers.2",
        "output_blocks.0.0.in_layers.2", "output_blocks.1.0.in_layers.2", "output_blocks.1.1.proj_out",
        "output_blocks.1.2.conv", "output_blocks.2.0.in_layers.0", "output_blocks.3.0.emb_layers.1",
    ]  # fmt: skip
    assert ldm_names(modules) == dict(zip(modules, names, strict=True))
    assert diffusers_names(names) == dict(zip(names, modules, strict=True))


# ---- text encoders

HF = "text_model.encoder.layers.1.mlp.fc1"
OPEN = "transformer.resblocks.1.mlp.c_fc"
CLIP_L = ("lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.transformer.")
CLIP_H = ("lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_h.transformer.", "clip_h.transformer.")
CLIP_G = ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.transformer.", "clip_g.")
T5 = "encoder.block.1.layer.0.SelfAttention.q"
T5XXL = ("lora_te3_", "text_encoder_3.", "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "t5xxl.")
PLACES = {
    f"cond_stage_model.transformer.{HF}": (CLIP_L, HF),
    f"cond_stage_model.wrapped.transformer.{HF}": (CLIP_L, HF),
    f"cond_stage_model.model.{OPEN}": (CLIP_H, HF),
    f"text_encoders.clip_h.transformer.{HF}": (CLIP_H, HF),
    f"conditioner.embedders.0.transformer.{HF}": (CLIP_L, HF),
    f"conditioner.embedders.1.model.{OPEN}": (CLIP_G, HF),
    f"conditioner.embedders.0.model.{OPEN}": (CLIP_G, HF),
    f"text_encoders.clip_l.transformer.{HF}": (CLIP_L, HF),
    f"text_encoders.clip_g.transformer.{HF}": (CLIP_G, HF),
    f"text_encoders.t5xxl.transformer.{T5}": (T5XXL, T5),
    f"clip_l.transformer.{HF}": (CLIP_L, HF),
    f"clip_g.transformer.{HF}": (CLIP_G, HF),
    f"text_encoder.{HF}": (CLIP_L, HF),
    f"text_encoder.{HF.removeprefix('text_model.')}": (CLIP_L, HF),
    f"text_encoder_2.{HF}": (CLIP_G, HF),
    f"text_encoder_3.{T5}": (T5XXL, T5),
}
"""Where a host or a file keeps a module of a text encoder → the prefixes of its adapters, and its name behind them."""


@pytest.mark.parametrize("place", PLACES)
def test_a_text_encoder_is_found_under_every_prefix_wherever_it_is_kept(place: str, tmp_path: Path) -> None:
    prefixes, body = PLACES[place]
    table = TargetTable.of_shapes({f"{place}.weight": (WIDTH, WIDTH), "unet.conv_in.weight": (4, 4, 3, 3)})
    for prefix in prefixes:
        name = prefix + (body if "." in prefix else body.replace(".", "_"))
        lora(tmp_path / "a.safetensors", {name: (WIDTH, WIDTH)})
        found = match(lib_locon.load(tmp_path / "a.safetensors"), table)
        assert [item.view.path for item in found.matched] == [f"{place}.weight"], name


@pytest.mark.parametrize("prefix", ["lora_te2_", "lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder_2."])
@pytest.mark.parametrize("place", ["text_encoder_2.", "text_encoders.t5xxl.transformer."])
def test_the_second_text_encoder_of_flux_is_its_t5(prefix: str, place: str, tmp_path: Path) -> None:
    shapes = {f"{place}{T5}.weight": (4, 4), "transformer.single_transformer_blocks.0.proj_out.weight": (4, 4)}
    lora(tmp_path / "a.safetensors", {prefix + (T5 if "." in prefix else T5.replace(".", "_")): (4, 4)})
    found = match(lib_locon.load(tmp_path / "a.safetensors"), TargetTable.of_shapes(shapes))
    assert [item.view.path for item in found.matched] == [f"{place}{T5}.weight"]


@pytest.mark.parametrize("root", ["conditioner.embedders.1.model.", "cond_stage_model.model."])
def test_the_names_of_openclip_lead_to_a_text_encoder_of_hugging_face(root: str, tmp_path: Path) -> None:
    part = "text_encoder_2" if "embedders" in root else "text_encoder"
    layer = f"{part}.text_model.encoder.layers.0"
    shapes = {
        **{f"{layer}.self_attn.{name}.weight": (4, 4) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        f"{layer}.mlp.fc1.weight": (8, 4),
        f"{layer}.mlp.fc2.weight": (4, 8),
        f"{part}.text_model.embeddings.token_embedding.weight": (10, 4),
        "unet.conv_in.weight": (4, 4, 3, 3),
    }
    block = f"{root}transformer.resblocks.0"
    deltas = lora(
        tmp_path / "a.safetensors",
        {
            f"{block}.attn.in_proj": (12, 4),
            f"{block}.attn.out_proj": (4, 4),
            f"{block}.mlp.c_fc": (8, 4),
            f"{block}.mlp.c_proj": (4, 8),
            f"{root}token_embedding": (10, 4),
        },
    )
    found, _ = changes(tmp_path / "a.safetensors", network(shapes))
    q, k, v = deltas[f"{block}.attn.in_proj"].split(4)
    expect(
        found,
        {
            f"{layer}.self_attn.q_proj.weight": q,
            f"{layer}.self_attn.k_proj.weight": k,
            f"{layer}.self_attn.v_proj.weight": v,
            f"{layer}.self_attn.out_proj.weight": deltas[f"{block}.attn.out_proj"],
            f"{layer}.mlp.fc1.weight": deltas[f"{block}.mlp.c_fc"],
            f"{layer}.mlp.fc2.weight": deltas[f"{block}.mlp.c_proj"],
            f"{part}.text_model.embeddings.token_embedding.weight": deltas[f"{root}token_embedding"],
        },
    )


# ---- the spelling of known writers


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_unet_mid_block_attentions_0_proj_in_",
        "lora_unet_diffusion_model_middle_block_1_proj_in",
        "lora_unet_model_diffusion_model_middle_block_1_proj_in",
        "lora_unet_unet_mid_block_attentions_0_proj_in",
        "unet.module.mid_block.attentions.0.proj_in",
        "unet._orig_mod.mid_block.attentions.0.proj_in",
        "unet.mid_block.attentions.0._checkpoint_wrapped_module.proj_in",
        "unet.mid_block.attentions.0._fsdp_wrapped_module.proj_in",
        "base_model.model.unet.mid_block.attentions.0.proj_in",
        "lycoris_mid_block_attentions_0_proj_in",
        "diffusion_model.middle_block.1.proj_in",
        "model.diffusion_model.middle_block.1.proj_in",
        "middle_block.1.proj_in",
        "mid_block.attentions.0.proj_in",
    ],
)
@pytest.mark.parametrize(
    "place", ["model.diffusion_model.middle_block.1.proj_in.weight", "unet.mid_block.attentions.0.proj_in.weight"]
)
def test_levels_and_underscores_that_writers_leave_in_a_name_do_not_matter(
    name: str, place: str, tmp_path: Path
) -> None:
    lora(tmp_path / "a.safetensors", {name: (4, 4)})
    beside = {"unet.mid_block.resnets.0.conv1.weight": (4, 4, 3, 3)} if place.startswith("unet.") else {}
    found = match(lib_locon.load(tmp_path / "a.safetensors"), TargetTable.of_shapes({place: (4, 4), **beside}))
    assert [item.view.path for item in found.matched] == [place]


# ---- layers that read more than a latent image

FIRST = {
    "model.diffusion_model.input_blocks.0.0.weight": ("lora_unet_conv_in", (6, 4, 3, 3)),
    "unet.conv_in.weight": ("lora_unet_input_blocks_0_0", (6, 4, 3, 3)),
    "conv_in.weight": ("unet.conv_in", (6, 4, 3, 3)),
    "model.diffusion_model.img_in.weight": ("transformer.x_embedder", (6, 8)),
    "transformer.x_embedder.weight": ("lora_unet_img_in", (6, 8)),
    "model.diffusion_model.x_embedder.proj.weight": ("transformer.pos_embed.proj", (6, 4, 2, 2)),
}
BESIDE = {
    "model.diffusion_model.double_blocks.0.img_mod.lin.weight": (6, 6),
    "transformer.transformer_blocks.0.attn.add_q_proj.weight": (6, 6),
    "transformer.single_transformer_blocks.0.norm.linear.weight": (6, 6),
    "model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight": (6, 6),
}


def around(path: str) -> dict[str, tuple[int, ...]]:
    """Weights that tell of which kind the model is."""
    if "img_in" in path:
        return {k: v for k, v in BESIDE.items() if "double_blocks" in k}
    if path.startswith("transformer."):
        return {k: v for k, v in BESIDE.items() if k.startswith("transformer.")}
    return {k: v for k, v in BESIDE.items() if "joint" in k and "x_embedder" in path}


@pytest.mark.parametrize("more", [1, 4, 5, 20])
@pytest.mark.parametrize("path", FIRST)
def test_further_inputs_of_a_first_layer_stay_as_they_are(path: str, more: int, tmp_path: Path) -> None:
    name, shape = FIRST[path]
    wide = (shape[0], shape[1] + more, *shape[2:])
    delta = lora(tmp_path / "a.safetensors", {name: shape})[name]
    found, report = changes(tmp_path / "a.safetensors", network({path: wide, **around(path)}))
    filled = torch.zeros(wide)
    filled[:, : shape[1]] = delta
    expect(found, {path: filled})
    assert report.used == report.total == 1


@pytest.mark.parametrize("path", FIRST)
def test_an_adapter_for_more_inputs_than_the_layer_has_is_left_out_with_both_numbers(path: str, tmp_path: Path) -> None:
    name, shape = FIRST[path]
    lora(tmp_path / "a.safetensors", {name: (shape[0], shape[1] + 5, *shape[2:])})
    found, report = changes(tmp_path / "a.safetensors", network({path: shape, **around(path)}))
    expect(found, {})
    assert f"is for {shape[1] + 5} inputs, this layer has {shape[1]}" in report.unmatched[0].reason


def test_any_other_layer_of_another_width_is_left_out(tmp_path: Path) -> None:
    path = "model.diffusion_model.middle_block.1.proj_in.weight"
    lora(tmp_path / "a.safetensors", {"lora_unet_middle_block_1_proj_in": (4, 4)})
    found, report = changes(tmp_path / "a.safetensors", network({path: (4, 6)}))
    expect(found, {})
    assert report.unmatched[0].reason == "wrong shape: its ΔW is 4 × 4, the weight is 4 × 6"


def test_a_whole_difference_for_fewer_inputs_is_filled_with_zeros_too(tmp_path: Path) -> None:
    delta = rand(6, 4, 3, 3)
    save_file({"lora_unet_conv_in.diff": delta}, tmp_path / "a.safetensors")
    found, _ = changes(tmp_path / "a.safetensors", network({"unet.conv_in.weight": (6, 9, 3, 3)}))
    torch.testing.assert_close(found["unet.conv_in.weight"][:, :4], delta, rtol=1e-4, atol=1e-5)
    assert not found["unet.conv_in.weight"][:, 4:].any()


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_factors_of_inputs_are_counted_by_inputs_and_not_by_the_kernel(kernel: int, tmp_path: Path) -> None:
    path = "model.diffusion_model.x_embedder.proj.weight"
    factors = rand(1, 4, 1, 1)
    tensors = {"weight": factors, "on_input": torch.tensor(1)}
    save_file({f"lora_unet_x_embedder_proj.{k}": v for k, v in tensors.items()}, tmp_path / "a.safetensors")
    for width in (4, 9):
        model = network({path: (6, width, kernel, kernel), **around(path)})
        before = model.get_parameter(path).detach().clone()
        found, _ = changes(tmp_path / "a.safetensors", model)
        torch.testing.assert_close(found[path][:, :4], before[:, :4] * factors)
        assert not found[path][:, 4:].any()


def test_a_layer_without_a_kernel_is_left_out_and_stops_nothing(tmp_path: Path) -> None:
    lora(tmp_path / "a.safetensors", {"unet.conv_in": (6, 4, 3, 3)})
    (left,) = match(
        lib_locon.load(tmp_path / "a.safetensors"), TargetTable.of_shapes({"conv_in.weight": (6, 4, 0, 3)})
    ).unmatched
    assert left.reason.startswith("wrong shape")


def test_a_layer_wider_than_the_shape_that_is_asked_for_is_not_to_be_enlarged(tmp_path: Path) -> None:
    up, down = rand(6, RANK), rand(RANK, 8)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "reshape_weight": torch.tensor([6, 8])}
    save_file({f"lora_unet_img_in.{k}": v for k, v in tensors.items()}, tmp_path / "a.safetensors")
    path = "model.diffusion_model.img_in.weight"
    found, report = changes(tmp_path / "a.safetensors", network({path: (6, 24), **around(path)}))
    expect(found, {})
    assert "does not hold the (6, 24)" in report.unmatched[0].reason
