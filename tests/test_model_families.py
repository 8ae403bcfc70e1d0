"""Model families: every module of every model under every name, whole files of each trainer, and fused projections.

The models are tables of names and shapes (`tests.oracles.model_tables`); the files follow the trainers' own rules
(`tests.oracles.trainer_rules`) and hold zeros, or small numbers where a test looks at values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_locon.bake import bake
from lib_locon.files.adapter import Adapter, read_adapter
from lib_locon.files.reader import SafetensorsFile
from lib_locon.matching import Match, match
from lib_locon.models.base_family import base_family
from lib_locon.models.table import TargetTable
from lib_locon.models.targets import View
from lib_locon.report import AdapterReport
from lib_locon.session import Session, Use
from tests.oracles import model_tables as tables
from tests.oracles import trainer_rules as rules
from tests.oracles.trainer_files import lycoris_network, module_tree

LEAVES = {"sd15": 391, "sd21": 391, "sdxl": 1050, "sdxl_refiner": 742}
DIFFUSERS = {
    **{name: name for name in tables.UNETS},
    "sd15_inpaint": "sd15",
    "sd3": "sd3",
    "sd35_medium": "sd35m",
    "sd35_large": "sd35l",
    "flux": "flux",
    "flux_bare": "flux",
}
Shapes = Mapping[str, tuple[int, ...]]


@cache
def table(name: str) -> TargetTable:
    return TargetTable.of_shapes(tables.live(name))


@cache
def baked_table(name: str) -> TargetTable:
    return TargetTable.of_shapes(tables.checkpoint(name))


def hollow(tmp_path: Path, shapes: Shapes) -> Adapter:
    return read_adapter(tables.hollow(tmp_path / "adapter.safetensors", shapes), header_only=True)


def counts(found: Match) -> tuple[int, int, int]:
    return found.used, found.total, len(found.unmatched)


def whole_shape(model: TargetTable, views: Sequence[View]) -> tuple[int, ...]:
    """The shape that an adapter sees: of one view, or of several one below the other."""
    shapes = [view.shape(model.shapes[view.path]) for view in views]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


# ---- the rules against the classes


@pytest.mark.parametrize("name", tables.UNETS)
def test_the_rules_give_the_modules_that_the_classes_have(name: str) -> None:
    modules = rules.unet_modules(name)
    assert len(modules) == LEAVES[name]
    weights = {key: shape for key, shape in tables.unet(name).items() if key.endswith(".weight")}
    assert {f"{module.ldm}.weight": module.shape for module in modules} == weights
    weights = {key: shape for key, shape in tables.read("diffusers", name).items() if key.endswith(".weight")}
    assert {f"{module.name}.weight": module.shape for module in modules} == weights


@pytest.mark.parametrize(
    ("name", "lora", "conv", "full", "attention"),
    [
        ("sd15", 264, 350, 354, 128),
        ("sd21", 330, 416, 420, 128),
        ("sdxl", 986, 1052, 1052, 560),
        ("sdxl_refiner", 462 + 192, 462 + 86 + 192, 462 + 86 + 192, 352),
    ],
)
def test_the_rules_choose_as_many_modules_as_the_trainers(
    name: str, lora: int, conv: int, full: int, attention: int
) -> None:
    lists = (rules.kohya(name), rules.kohya(name, conv=True), rules.lycoris_full(name), rules.attention_only(name))
    assert [len(modules) for modules in lists] == [lora, conv, full, attention]


# ---- names


@pytest.mark.parametrize("name", tables.MODELS)
@pytest.mark.parametrize("held", [table, baked_table])
def test_no_two_modules_share_a_name(name: str, held: Any) -> None:
    assert held(name).collisions == []


@pytest.mark.parametrize("name", tables.UNETS)
@pytest.mark.parametrize("held", [table, baked_table])
def test_every_module_of_the_unets_answers_to_both_namings(name: str, held: Any) -> None:
    model = held(name)
    found = set()
    for module in rules.unet_modules(name):
        spelled = (module.name, module.name.replace(".", "_"), module.ldm, module.ldm.replace(".", "_"))
        targets = [model.find(spelling, ("unet",)) for spelling in spelled]
        assert all(target is targets[0] for target in targets), module
        target = targets[0]
        assert target is not None, module
        assert target.name == f"model.diffusion_model.{module.ldm}"
        assert model.shapes[target.views["weight"][0].path] == module.shape
        found.add(target.name)
    assert len(found) == LEAVES[name]


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner"])
def test_the_vector_embedding_has_a_second_name(name: str) -> None:
    for layer in ("linear_1", "linear_2"):
        target = table(name).find(f"class_embedding.{layer}", ("unet",))
        assert target is not None and target is table(name).find(f"add_embedding.{layer}", ("unet",))


@pytest.mark.parametrize("name", tables.MODELS)
def test_every_parameter_has_its_shape_under_diffusers_name(name: str) -> None:
    model = table(name)
    for path, shape in tables.read("diffusers", DIFFUSERS[name]).items():
        module, _, parameter = path.rpartition(".")
        if name == "sd15_inpaint" and path == "conv_in.weight":
            shape = (320, 9, 3, 3)
        for spelling in (module, module.replace(".", "_")):
            target = model.find(spelling, ("unet",))
            assert target is not None and whole_shape(model, target.views[parameter]) == shape, path


@pytest.mark.parametrize("name", tables.MODELS)
def test_every_module_answers_to_its_own_name(name: str) -> None:
    model = table(name)
    for body in tables.modules(tables.unet(name)):
        target = model.find(body, ("unet",))
        assert target is not None and target.name.endswith(body)


@pytest.mark.parametrize(
    ("name", "component", "encoder"),
    [
        ("sd15", "te1", rules.CLIP_L),
        ("sd15_inpaint", "te1", rules.CLIP_L),
        ("sd21", "te1", rules.CLIP_H),
        ("sdxl", "te1", rules.CLIP_L),
        ("sdxl", "te2", rules.CLIP_G),
        ("sdxl_refiner", "te2", rules.CLIP_G),
        ("sd3", "te1", rules.CLIP_L),
        ("sd3", "te2", rules.CLIP_G),
        ("flux", "te1", rules.CLIP_L),
    ],
)
@pytest.mark.parametrize("held", [table, baked_table])
def test_text_encoders_answer_to_hugging_faces_names(name: str, component: str, encoder: Any, held: Any) -> None:
    model = held(name)
    views = set()
    for module in rules.te_modules(encoder):
        short = module.name.removeprefix("text_model.")
        spelled = (module.name, short, module.name.replace(".", "_"), short.replace(".", "_"))
        targets = [model.find(spelling, (component,)) for spelling in spelled]
        assert all(target is targets[0] for target in targets), module
        target = targets[0]
        assert target is not None and target.component == component, module
        (view,) = target.views["weight"]
        assert view.shape(model.shapes[view.path]) == module.shape, module
        assert ("bias" in target.views) == module.bias, module
        views.add(view)
    assert len(views) == 8 * encoder.clip_layers + 3


@pytest.mark.parametrize("name", ["sd21", "sdxl", "sdxl_refiner", "sd3"])
def test_the_projection_of_the_text_is_turned_where_the_model_holds_it_turned(name: str) -> None:
    component = "te1" if name == "sd21" else "te2"
    for spelling in ("text_projection", "text_model.text_projection", "text_model_text_projection"):
        target = table(name).find(spelling, (component,))
        assert target is not None and target.views["weight"][0].transposed == (name != "sd3")


# ---- whole files


@pytest.mark.parametrize("name", tables.UNETS)
@pytest.mark.parametrize("kind", ["lora", "conv", "full"])
def test_kohyas_and_lycoris_files_match_completely(name: str, kind: str, tmp_path: Path) -> None:
    modules = rules.lycoris_full(name) if kind == "full" else rules.kohya(name, conv=kind == "conv")
    adapter = hollow(tmp_path, rules.kohya_file(modules))
    for model in (table(name), baked_table(name)):
        found = match(adapter, model)
        assert counts(found) == (len(modules), len(modules), 0)
        assert len({item.view for item in found.matched}) == len(modules)
    assert base_family(adapter) == tables.FAMILY[name]


def test_kohyas_convolutions_fit_the_linear_projections_of_sd2(tmp_path: Path) -> None:
    modules = rules.with_conv_projections(rules.kohya("sd21"))
    assert sum(module.type == "Conv2d" for module in modules) == 32
    found = match(hollow(tmp_path, rules.kohya_file(modules)), table("sd21"))
    assert counts(found) == (330, 330, 0)


def test_the_only_text_encoder_may_be_called_the_first(tmp_path: Path) -> None:
    shapes = {key.replace("lora_te_", "lora_te1_"): s for key, s in rules.kohya_file(rules.kohya("sd21")).items()}
    assert counts(match(hollow(tmp_path, shapes), table("sd21"))) == (330, 330, 0)


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner"])
def test_sdxl_files_in_diffusers_names_match_too(name: str, tmp_path: Path) -> None:
    """OneTrainer writes them so under kohya's prefix."""
    modules = rules.kohya_targets(rules.unet_modules(name), rules.KOHYA_UNET_CONV, True)
    found = match(hollow(tmp_path, rules.kohya_file(modules)), table(name))
    assert counts(found) == (len(modules), len(modules), 0)
    assert len(modules) == {"sdxl": 788, "sdxl_refiner": 548}[name]


@pytest.mark.parametrize("name", tables.UNETS)
def test_kohyas_oft_files_match_completely(name: str, tmp_path: Path) -> None:
    adapter = hollow(tmp_path, rules.kohya_oft_file(name))
    total = len(rules.attention_only(name))
    assert counts(match(adapter, table(name))) == (total, total, 0)


@pytest.mark.parametrize("name", tables.UNETS)
@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("unet.", ".lora_A.weight", ".lora_B.weight"),
        ("unet.", ".lora.down.weight", ".lora.up.weight"),
        ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"),
    ],
)
def test_diffusers_files_match_completely(name: str, prefix: str, down: str, up: str, tmp_path: Path) -> None:
    modules = {f"{prefix}{module.name}": module.shape for module in rules.attention_only(name)}
    adapter = hollow(tmp_path, rules.pairs(modules, down, up))
    assert counts(match(adapter, table(name))) == (len(modules), len(modules), 0)
    assert base_family(adapter) == tables.FAMILY[name]


@pytest.mark.parametrize(("name", "layers", "norms"), [("sd21", 420, 108), ("sdxl", 1052, 255)])
def test_what_lycoris_itself_writes_matches_completely(name: str, layers: int, norms: int, tmp_path: Path) -> None:
    """Its own entry point over the whole module tree, preset "full", with norms."""
    path = tmp_path / "lycoris.safetensors"
    unet = module_tree(rules.trained_names(name))
    trees = [module_tree(modules) for modules in rules.text_modules(name).values()]
    text: Any = trees if len(trees) > 1 else trees[0]
    network = lycoris_network(1, 1.0, text, unet, {"algo": "lokr", "factor": 8, "train_norm": True})
    network.apply_to(text, unet, True, True)
    network.save_weights(str(path), torch.float16, {})
    found = match(read_adapter(path, header_only=True), table(name))
    used = {item.module: item.layer.label for item in found.matched}
    assert found.unmatched == () and found.used == found.total
    assert sum(label != "Norm" for label in used.values()) == layers
    assert sum(label == "Norm" and module.startswith("lora_unet_") for module, label in used.items()) == norms


# ---- another family


@pytest.mark.parametrize("name", tables.UNETS)
def test_a_file_for_another_family_is_one_clear_line_and_changes_nothing(name: str, tmp_path: Path) -> None:
    modules = rules.kohya(name, conv=True)
    adapter = hollow(tmp_path, rules.kohya_file(modules))
    for other in tables.MODELS:
        if tables.FAMILY[other] == tables.FAMILY[name]:
            continue
        found = match(adapter, table(other))
        assert found.matched == ()
        assert len(found.unmatched) == len(modules)
        line = str(AdapterReport.of("mine", Use(adapter).strengths, found))
        assert "\n" not in line and len(line) < 200
        assert f"made for {tables.FAMILY[name]}" in line and f"this model is {tables.FAMILY[other]}" in line


def test_a_text_encoder_alone_is_used_wherever_it_fits(tmp_path: Path) -> None:
    adapter = hollow(tmp_path, rules.lora(rules.clip("lora_te_", 768, 12)))
    for name in ("sd15", "sdxl", "sd3"):
        assert counts(match(adapter, table(name))) == (72, 72, 0)
    assert counts(match(adapter, table("sd21"))) == (0, 72, 72)
    assert base_family(adapter) == "SD1"


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        (rules.clip("lora_te_", 1024, 23), "SD2"),
        (rules.clip("lora_te2_", 1280, 32), "SDXL"),
        (rules.clip("lora_te1_", 768, 12), "unknown (CLIP-L alone: SD1 or SDXL)"),
        (rules.t5(), "unknown (T5 alone: SD3 or Flux)"),
        (rules.sd3_kohya(24), "SD3"),
        (rules.sd3_kohya(38), "SD3"),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv": (90, 30)}, "unknown (a transformer of width 30)"),
        ({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (64, 64)}, "unknown (cross-attention of"),
        ({"lora_unet_mid_block_resnets_0_conv1": (64, 64, 3, 3)}, "unknown (no cross-attention in it)"),
    ],
)
def test_the_base_family_comes_from_the_tensors(modules: Shapes, family: str, tmp_path: Path) -> None:
    assert base_family(hollow(tmp_path, rules.lora(modules))).startswith(family)


def test_the_base_family_of_sdxl_shows_without_any_width(tmp_path: Path) -> None:
    assert base_family(hollow(tmp_path, rules.kohya_oft_file("sdxl"))) == "SDXL"


def test_the_base_family_ignores_what_the_metadata_claims(tmp_path: Path) -> None:
    claim = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    path = tables.hollow(tmp_path / "a.safetensors", rules.kohya_file(rules.kohya("sd15")), claim)
    assert base_family(read_adapter(path, header_only=True)) == "SD1"


# ---- SD3 and Flux, whole files


@pytest.mark.parametrize(("name", "depth", "dual"), [("sd3", 24, 0), ("sd35_medium", 24, 13), ("sd35_large", 38, 0)])
def test_kohyas_sd3_files_match_completely(name: str, depth: int, dual: int, tmp_path: Path) -> None:
    transformer = rules.sd3_kohya(depth, dual)
    assert len(transformer) == 10 * depth - 3 + 2 * dual
    text = {**rules.clip("lora_te1_", 768, 12), **rules.clip("lora_te2_", 1280, 32), **rules.t5()}
    text = {key.replace(".", "_"): shape for key, shape in text.items()}
    adapter = hollow(tmp_path, rules.lora({**transformer, **text}))
    total = len(transformer) + 72 + 192 + 168
    assert counts(match(adapter, table(name))) == (total, total, 0)
    assert base_family(adapter) == "SD3"


def linears(name: str) -> dict[str, tuple[int, ...]]:
    """Every Linear of a diffusers transformer, by its dotted name."""
    shapes = tables.read("diffusers", name)
    return {key.removesuffix(".weight"): shape for key, shape in shapes.items() if len(shape) == 2}


@pytest.mark.parametrize("name", ["sd3", "sd35_medium", "sd35_large", "flux", "flux_bare"])
@pytest.mark.parametrize(
    ("prefix", "underscored"),
    [
        ("transformer.", False),
        ("base_model.model.", False),
        ("lora_transformer_", True),
        ("lycoris_", True),
    ],
)
def test_adapters_of_diffusers_transformers_match_completely(
    name: str, prefix: str, underscored: bool, tmp_path: Path
) -> None:
    modules = linears(DIFFUSERS[name])
    spelled = {prefix + (key.replace(".", "_") if underscored else key): shape for key, shape in modules.items()}
    adapter = hollow(tmp_path, rules.lora(spelled) if underscored else rules.pairs(spelled, ".lora_A", ".lora_B"))
    found = match(adapter, table(name))
    assert counts(found) == (len(modules), len(modules), 0)
    rows = [view for item in found.matched for view in _rows(item.view, tables.live(name))]
    assert len(rows) == len(set(rows))  # no two of them touch the same rows
    assert base_family(adapter) == tables.FAMILY[name]


def _rows(view: View, shapes: Shapes) -> list[tuple[str, int]]:
    start, length = (view.start, view.length) if view.length >= 0 else (0, shapes[view.path][0])
    return [(view.path, row) for row in range(start, start + length, 64)]


@pytest.mark.parametrize("prefix", ["lora_te2_", "lora_te3_", "text_encoder_2."])
def test_fluxs_t5_is_its_second_or_its_third_text_encoder(prefix: str, tmp_path: Path) -> None:
    modules = rules.t5(prefix)
    found = match(hollow(tmp_path, rules.lora(modules)), table("flux"))
    assert counts(found) == (168, 168, 0)
    assert {item.component for item in found.matched} == {"te3"}


@pytest.mark.parametrize("held", ["sd3", "sd35m", "sd35l", "flux"])
def test_adapters_in_original_names_match_a_transformer_in_diffusers_names(held: str, tmp_path: Path) -> None:
    original = {"sd35m": "sd35_medium", "sd35l": "sd35_large"}.get(held, held)
    shapes = {key: shape for key, shape in tables.unet(original).items() if len(shape) == 2}
    modules = {f"lora_unet_{key.removesuffix('.weight')}".replace(".", "_"): shape for key, shape in shapes.items()}
    model = TargetTable.of_shapes(tables.read("diffusers", held))
    assert counts(match(hollow(tmp_path, rules.lora(modules)), model)) == (len(modules), len(modules), 0)
    assert model.collisions == []


# ---- values: what exactly changes


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def factors(generator: torch.Generator, out: int, inp: int, rank: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    """Suffix → tensor, and the ΔW they make. Small integers over 8: every sum below is exact."""
    up = torch.randint(-8, 8, (out, rank), generator=generator) / 8
    down = torch.randint(-8, 8, (rank, inp), generator=generator) / 8
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(float(rank))}, up @ down


def applied(model: nn.Module, tmp_path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Applies a file; parameter → what it changed by, of those that changed. Nothing of the file may be left over."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    session = Session(model)
    report = session.apply([Use(read_adapter(save(tmp_path / "a.safetensors", tensors)))])
    assert report.adapters[0].unmatched == () and report.adapters[0].used
    after = {name: parameter.clone() for name, parameter in model.named_parameters()}
    session.restore()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}


def small(name: str, *parts: str, divisor: int = 16) -> nn.Module:
    """A narrow model with the parameters of these paths only."""
    shapes = {path: shape for path, shape in tables.live(name).items() if any(part in path for part in parts)}
    return tables.network(tables.narrow(shapes, divisor))


OPEN_CLIP = {
    "sd21": ("cond_stage_model.wrapped.model", "lora_te_", 64),
    "sdxl": ("conditioner.embedders.1.wrapped.model", "lora_te2_", 80),
    "sdxl_refiner": ("conditioner.embedders.0.wrapped.model", "lora_te2_", 80),
}


@pytest.mark.parametrize("name", OPEN_CLIP)
@pytest.mark.parametrize("parts", ["q", "qk", "v", "qkv"])
def test_open_clips_rows_are_those_of_q_k_and_v(name: str, parts: str, tmp_path: Path) -> None:
    root, prefix, width = OPEN_CLIP[name]
    model = small(name, f"{root}.transformer.resblocks.1.attn", f"{root}.transformer.resblocks.2.attn")
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    expected = torch.zeros(3 * width, width)
    for part in parts:
        made, delta = factors(generator, width, width)
        stem = f"{prefix}text_model_encoder_layers_1_self_attn_{part}_proj"
        tensors.update({f"{stem}.{suffix}": tensor for suffix, tensor in made.items()})
        expected["qkv".index(part) * width :][:width] = delta
    changed = applied(model, tmp_path, tensors)
    assert list(changed) == [f"{root}.transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(next(iter(changed.values())), expected)


def test_open_clips_bias_and_output_are_reached(tmp_path: Path) -> None:
    root, prefix, width = OPEN_CLIP["sdxl"]
    model = small("sdxl", f"{root}.transformer.resblocks.0.")
    stem = f"{prefix}text_model_encoder_layers_0_"
    tensors = {
        f"{stem}self_attn_k_proj.diff_b": torch.ones(width),
        f"{stem}self_attn_out_proj.diff": torch.ones(width, width),
        f"{stem}mlp_fc1.diff": torch.ones(4 * width, width),
        f"{stem}mlp_fc2.diff": torch.ones(width, 4 * width),
        f"{stem}layer_norm1.w_norm": torch.ones(width),
        f"{stem}layer_norm2.b_norm": torch.ones(width),
    }
    changed = applied(model, tmp_path, tensors)
    block = f"{root}.transformer.resblocks.0."
    names = {name.removeprefix(block) for name in changed}
    assert names == {"attn.in_proj_bias", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
                     "ln_1.weight", "ln_2.bias"}  # fmt: skip
    bias = changed[f"{block}attn.in_proj_bias"]
    assert torch.equal(bias, torch.cat([torch.zeros(width), torch.ones(width), torch.zeros(width)]))


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_the_delta_of_the_text_projection_is_transposed(name: str, tmp_path: Path) -> None:
    root, prefix, width = OPEN_CLIP[name]
    model = small(name, f"{root}.text_projection", f"{root}.positional_embedding")
    made, delta = factors(torch.Generator().manual_seed(2), width, width)
    changed = applied(model, tmp_path, {f"{prefix}text_projection.{suffix}": t for suffix, t in made.items()})
    assert list(changed) == [f"{root}.text_projection"]
    assert torch.equal(changed[f"{root}.text_projection"], delta.T)
    assert not torch.equal(delta, delta.T)


def test_the_text_projection_in_the_models_own_name_is_not_turned(tmp_path: Path) -> None:
    root = "conditioner.embedders.1"
    diff = torch.arange(80.0 * 80).reshape(80, 80) / 64
    changed = applied(small("sdxl", f"{root}.wrapped.model.text_projection"), tmp_path,
                      {f"{root}.model.text_projection.diff": diff})  # fmt: skip
    assert torch.equal(next(iter(changed.values())), diff)


@pytest.mark.parametrize(
    "name", ["lora_unet_conv_in", "lora_unet_input_blocks_0_0", "diffusion_model.input_blocks.0.0"]
)
def test_an_inpainting_model_changes_in_its_first_channels_only(name: str, tmp_path: Path) -> None:
    model = small("sd15_inpaint", "diffusion_model.input_blocks.0.0.")
    diff = torch.ones(20, 4, 3, 3)
    changed = applied(model, tmp_path, {f"{name}.diff": diff})["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(changed[:, :4], diff) and not changed[:, 4:].any()


def test_an_adapter_made_on_an_inpainting_model_reaches_all_its_channels(tmp_path: Path) -> None:
    diff = torch.ones(20, 9, 3, 3)
    changed = applied(small("sd15_inpaint", "input_blocks.0.0."), tmp_path, {"lora_unet_conv_in.diff": diff})
    assert torch.equal(changed["model.diffusion_model.input_blocks.0.0.weight"], diff)


SD3_BLOCK = "model.diffusion_model.joint_blocks.1."


@pytest.mark.parametrize(
    ("names", "owner"),
    [
        (("to_q", "to_k", "to_v"), "x_block.attn.qkv"),
        (("add_q_proj", "add_k_proj", "add_v_proj"), "context_block.attn.qkv"),
    ],
)
@pytest.mark.parametrize("used", [(0,), (0, 1), (2,), (0, 1, 2)])
@pytest.mark.parametrize(
    "prefix", ["transformer.transformer_blocks.1.attn.", "lora_transformer_transformer_blocks_1_attn_"]
)
def test_sd3s_split_adapters_change_rows_of_its_fused_projections(
    names: tuple[str, ...], owner: str, used: tuple[int, ...], prefix: str, tmp_path: Path
) -> None:
    model = small("sd3", SD3_BLOCK, divisor=32)
    h = 1536 // 32
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    expected = torch.zeros(3 * h, h)
    for i in used:
        made, expected[i * h :][:h] = factors(generator, h, h)
        tensors.update({f"{prefix}{names[i]}.{suffix}": t for suffix, t in made.items()})
    changed = applied(model, tmp_path, tensors)
    assert list(changed) == [f"{SD3_BLOCK}{owner}.weight"]
    assert torch.equal(changed[f"{SD3_BLOCK}{owner}.weight"], expected)


def test_sd3s_fused_adapter_changes_its_fused_projection_as_it_is(tmp_path: Path) -> None:
    h = 1536 // 32
    made, delta = factors(torch.Generator().manual_seed(4), 3 * h, h)
    stem = "lora_unet_joint_blocks_1_context_block_attn_qkv"
    changed = applied(small("sd3", SD3_BLOCK, divisor=32), tmp_path, {f"{stem}.{s}": t for s, t in made.items()})
    assert torch.equal(changed[f"{SD3_BLOCK}context_block.attn.qkv.weight"], delta)


@pytest.mark.parametrize(
    ("model", "path", "name"),
    [
        ("sd3", "final_layer.adaLN_modulation.1", "transformer.norm_out.linear"),
        ("sd3", "joint_blocks.23.context_block.adaLN_modulation.1",
         "transformer.transformer_blocks.23.norm1_context.linear"),
        ("flux", "final_layer.adaLN_modulation.1", "transformer.norm_out.linear"),
    ],
)  # fmt: skip
def test_shift_and_scale_change_places_where_diffusers_swaps_them(
    model: str, path: str, name: str, tmp_path: Path
) -> None:
    parts = ("joint_blocks.0.x_block.attn.qkv", "joint_blocks.23.", "double_blocks.0.img_attn.qkv", "final_layer.")
    network = small(model, *parts, divisor=32)
    weight = network.get_parameter(f"model.diffusion_model.{path}.weight")
    diff = torch.arange(float(weight.numel())).reshape(weight.shape) / 64
    half = diff.shape[0] // 2
    for suffix, given in (("diff", diff), ("diff_b", diff[:, 0].clone())):
        changed = applied(network, tmp_path, {f"{name}.{suffix}": given})
        assert torch.equal(next(iter(changed.values())), torch.cat([given[half:], given[:half]]))


def test_the_other_context_blocks_are_not_swapped(tmp_path: Path) -> None:
    h = 1536 // 32
    diff = torch.arange(6.0 * h * h).reshape(6 * h, h) / 64
    name = "transformer.transformer_blocks.1.norm1_context.linear"
    changed = applied(small("sd3", SD3_BLOCK, "joint_blocks.23.", divisor=32), tmp_path, {f"{name}.diff": diff})
    assert torch.equal(changed[f"{SD3_BLOCK}context_block.adaLN_modulation.1.weight"], diff)


FLUX_BLOCK = "model.diffusion_model.single_blocks.2.linear1.weight"
FLUX_PARTS = ("single_blocks.2.", "double_blocks.0.")


@pytest.mark.parametrize(
    ("name", "start", "length"),
    [
        ("single_transformer_blocks.2.attn.to_q", 0, 1),
        ("single_transformer_blocks.2.attn.to_k", 1, 1),
        ("single_transformer_blocks.2.attn.to_v", 2, 1),
        ("single_transformer_blocks.2.proj_mlp", 3, 4),
    ],
)
def test_fluxs_split_adapters_change_rows_of_linear1(name: str, start: int, length: int, tmp_path: Path) -> None:
    h = 3072 // 64
    made, delta = factors(torch.Generator().manual_seed(5), length * h, h)
    model = small("flux", *FLUX_PARTS, divisor=64)
    changed = applied(model, tmp_path, {f"transformer.{name}.{s}": t for s, t in made.items()})
    expected = torch.zeros(7 * h, h)
    expected[start * h :][: length * h] = delta
    assert list(changed) == [FLUX_BLOCK] and torch.equal(changed[FLUX_BLOCK], expected)


def test_xlabs_adapters_change_q_k_and_v_of_linear1_and_nothing_of_its_mlp(tmp_path: Path) -> None:
    h = 3072 // 64
    made, delta = factors(torch.Generator().manual_seed(6), 3 * h, h)
    stem = "single_blocks.2.processor.qkv_lora"
    tensors = {f"{stem}.up.weight": made["lora_up.weight"], f"{stem}.down.weight": made["lora_down.weight"]}
    changed = applied(small("flux", *FLUX_PARTS, divisor=64), tmp_path, tensors)
    assert list(changed) == [FLUX_BLOCK]
    assert torch.equal(changed[FLUX_BLOCK][: 3 * h], delta) and not changed[FLUX_BLOCK][3 * h :].any()


def test_a_norm_that_replaces_the_models_does_so_at_full_strength(tmp_path: Path) -> None:
    path = "model.diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale"
    model = small("flux", *FLUX_PARTS, divisor=64)
    wanted = torch.full((128,), 0.25)[: model.get_parameter(path).shape[0]]
    base = model.get_parameter(path).clone()
    changed = applied(model, tmp_path, {path.removeprefix("model.diffusion_model."): wanted})
    assert torch.equal(base + changed[path], wanted)


def split(name: str, *parts: str, divisor: int) -> nn.Module:
    """A narrow transformer that holds q, k and v apart."""
    held = tables.read("diffusers", name)
    shapes = {key: shape for key, shape in held.items() if any(part in key for part in parts)}
    return tables.network(tables.narrow(shapes, divisor))


@pytest.mark.parametrize(
    ("original", "held"),
    [
        ("joint_blocks_1_x_block_attn_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("joint_blocks_1_context_block_attn_qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ],
)
def test_fused_adapters_change_split_projections(original: str, held: tuple[str, ...], tmp_path: Path) -> None:
    h = 1536 // 32
    model = split("sd3", "transformer_blocks.0.", "transformer_blocks.1.", "transformer_blocks.2.", divisor=32)
    made, delta = factors(torch.Generator().manual_seed(7), 3 * h, h)
    changed = applied(model, tmp_path, {f"lora_unet_{original}.{s}": t for s, t in made.items()})
    for i, name in enumerate(held):
        assert torch.equal(changed.pop(f"transformer_blocks.1.{name}.weight"), delta[i * h : (i + 1) * h])
    assert not changed


@pytest.mark.parametrize(
    ("model", "original", "held"),
    [
        ("sd3", "final_layer_adaLN_modulation_1", "norm_out.linear"),
        ("sd3", "joint_blocks_23_context_block_adaLN_modulation_1", "transformer_blocks.23.norm1_context.linear"),
        ("flux", "final_layer_adaLN_modulation_1", "norm_out.linear"),
    ],
)
def test_shift_and_scale_change_places_on_a_transformer_in_diffusers_names_too(
    model: str, original: str, held: str, tmp_path: Path
) -> None:
    network = split(model, "transformer_blocks.0.", "transformer_blocks.23.", "norm_out.", divisor=64)
    shape = network.get_parameter(f"{held}.weight").shape
    diff = torch.arange(float(shape.numel())).reshape(shape) / 64
    half = shape[0] // 2
    changed = applied(network, tmp_path, {f"lora_unet_{original}.diff": diff})
    assert list(changed) == [f"{held}.weight"]
    assert torch.equal(changed[f"{held}.weight"], torch.cat([diff[half:], diff[:half]]))


@pytest.mark.parametrize("xlabs", [False, True])
def test_fluxs_fused_linear1_changes_four_split_layers(xlabs: bool, tmp_path: Path) -> None:
    h = 3072 // 64
    model = split("flux", "transformer_blocks.0.", divisor=64)
    stem = "single_transformer_blocks.0."
    shares = {f"{stem}attn.to_q": h, f"{stem}attn.to_k": h, f"{stem}attn.to_v": h}
    if not xlabs:
        shares[f"{stem}proj_mlp"] = 4 * h
    made, delta = factors(torch.Generator().manual_seed(8), sum(shares.values()), h)
    name = "single_blocks.0.processor.qkv_lora" if xlabs else "lora_unet_single_blocks_0_linear1"
    spelled = {"lora_up.weight": "up.weight", "lora_down.weight": "down.weight"} if xlabs else {s: s for s in made}
    changed = applied(model, tmp_path, {f"{name}.{spelled[s]}": made[s] for s in spelled})
    start = 0
    for path, length in shares.items():
        assert torch.equal(changed.pop(f"{path}.weight"), delta[start : start + length])
        start += length
    assert not changed


def test_a_fused_dora_on_split_layers_is_refused_by_name(tmp_path: Path) -> None:
    h = 1536 // 32
    made, _ = factors(torch.Generator().manual_seed(9), 3 * h, h)
    made["dora_scale"] = torch.ones(3 * h, 1)
    model = split("sd3", "transformer_blocks.0.", divisor=32)
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    adapter = read_adapter(save(tmp_path / "a.safetensors", {f"{stem}.{s}": t for s, t in made.items()}))
    found = match(adapter, TargetTable.of_model(model))
    assert not found.matched and "fused" in found.unmatched[0].reason


def test_a_split_dora_on_a_fused_projection_sees_its_own_rows_only(tmp_path: Path) -> None:
    root, prefix, width = OPEN_CLIP["sdxl"]
    model = small("sdxl", f"{root}.transformer.resblocks.1.attn")
    path = f"{root}.transformer.resblocks.1.attn.in_proj_weight"
    made, delta = factors(torch.Generator().manual_seed(10), width, width)
    magnitude = torch.linspace(1, 2, width)[:, None]
    stem = f"{prefix}text_model_encoder_layers_1_self_attn_k_proj"
    tensors = {f"{stem}.{s}": t for s, t in {**made, "dora_scale": magnitude}.items()}
    base = model.get_parameter(path)[width : 2 * width].double()
    changed = applied(model, tmp_path, tensors)[path]
    merged = base + delta.double()
    wanted = merged * magnitude.double() / merged.norm(dim=1, keepdim=True) - base
    torch.testing.assert_close(changed[width : 2 * width].double(), wanted, atol=1e-4, rtol=1e-4)
    assert not changed[:width].any() and not changed[2 * width :].any()


# ---- bake: the same in a checkpoint's names


@pytest.mark.parametrize(
    ("name", "key", "module"),
    [
        ("sd21", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight",
         "lora_te_text_model_encoder_layers_1_self_attn_k_proj"),
        ("sdxl_refiner", "conditioner.embedders.0.model.transformer.resblocks.1.attn.in_proj_weight",
         "lora_te2_text_model_encoder_layers_1_self_attn_k_proj"),
        ("sd3", "model.diffusion_model.joint_blocks.1.context_block.attn.qkv.weight",
         "transformer.transformer_blocks.1.attn.add_k_proj"),
        ("flux_bare", "double_blocks.1.txt_attn.qkv.weight", "transformer.transformer_blocks.1.attn.add_k_proj"),
    ],
)  # fmt: skip
def test_a_checkpoint_is_baked_in_the_right_rows(name: str, key: str, module: str, tmp_path: Path) -> None:
    block = key.rsplit(".", 2)[0]
    shapes = {path: shape for path, shape in tables.checkpoint(name).items() if path.startswith(block)}
    model = tables.network(tables.narrow(shapes, 32))
    base = {path: parameter.clone() for path, parameter in model.named_parameters()}
    h = base[key].shape[1]
    made, delta = factors(torch.Generator().manual_seed(11), h, h)
    adapter = read_adapter(save(tmp_path / "a.safetensors", {f"{module}.{s}": t for s, t in made.items()}))
    checkpoint = SafetensorsFile(save(tmp_path / "base.safetensors", base))
    done = bake(checkpoint, [Use(adapter)], tmp_path / "out.safetensors", "", lambda *_: None)
    assert done.changed == 1 and done.adapters[0].unmatched == ()
    with SafetensorsFile(tmp_path / "out.safetensors").tensors() as out:
        for path, before in base.items():
            expected = before.clone()
            if path == key:
                expected[h : 2 * h] += delta
            assert torch.equal(out.get_tensor(path), expected), path
