"""Names: whole files as the trainers write them, against the module tree of SD1 in the host's names.

The files come from `tests.oracles.trainer_files`, whose module lists follow the trainers' rules and not our table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import lib_locon
from extensions_builtin_shim.tiny_sd import Config, TinySD
from lib_locon.files.dialects import module_name, split_key
from lib_locon.matching import match
from lib_locon.models.base_family import base_family
from lib_locon.models.table import TargetTable
from tests.oracles import trainer_files as files

SD15 = TargetTable.of_model(TinySD.skeleton(Config.sd15()))
TINY = TargetTable.of_model(TinySD.skeleton(Config.tiny()))
TINY_SIZES = files.Sizes(16, 64, 64, vocabulary=512, positions=32)


def test_every_module_of_the_unet_answers_to_both_namings() -> None:
    modules = files.unet_modules(files.SD15)
    assert len(modules) == 391
    for module in modules:
        by_diffusers = SD15.find(module.name, ("unet",))
        by_ldm = SD15.find(module.ldm, ("unet",))
        assert by_diffusers is not None and by_diffusers is by_ldm, module
        assert by_diffusers.name == f"model.diffusion_model.{module.ldm}"
        assert SD15.shapes[by_diffusers.views["weight"][0].path] == module.shape


def test_every_module_of_the_text_encoder_is_found() -> None:
    for module in files.te_modules(files.SD15):
        for name in (module.name, module.name.removeprefix("text_model.")):
            target = SD15.find(name, ("te1",))
            assert target is not None, name
            assert SD15.shapes[target.views["weight"][0].path] == module.shape
            assert target.component == "te1"


def test_no_two_modules_share_a_name() -> None:
    assert SD15.collisions == []
    assert len(SD15.modules()) == 391 + len(files.te_modules(files.SD15))


def test_a_collision_is_noticed() -> None:
    assert TargetTable.of_shapes({"a.b.weight": (1,), "a_b.weight": (1,)}).collisions


@pytest.mark.parametrize(("conv", "modules"), [(False, 264), (True, 350)])
def test_kohya_files_match_completely(conv: bool, modules: int, tmp_path: Path) -> None:
    path = tmp_path / "kohya.safetensors"
    files.kohya_lora(path, files.SD15, conv=conv, rank=2)
    adapter = lib_locon.load(path)
    found = match(adapter, SD15)
    assert (found.used, found.total, found.unmatched) == (modules, modules, ())
    assert len({item.view for item in found.matched}) == modules
    assert base_family(adapter) == "SD1"


@pytest.mark.parametrize(
    "algorithm",
    ["lora", "tucker", "loha", "loha_tucker", "lokr", "lokr_factor4", "lokr_both", "lokr_tucker", "lokr_full"],
)
def test_lycoris_files_match_completely(algorithm: str, tmp_path: Path) -> None:
    path = tmp_path / "lycoris.safetensors"
    written = files.lycoris_file(path, algorithm, TINY_SIZES)
    found = match(lib_locon.load(path), TINY)
    assert (found.used, found.total, found.unmatched) == (len(written), len(written), ())
    assert found.total >= 354 - 2


def test_a_file_for_another_width_changes_nothing_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "sd15.safetensors"
    files.kohya_lora(path, files.SD15, rank=1)
    found = match(lib_locon.load(path), TINY)
    assert (found.used, found.total) == (0, 264)
    assert all(item.reason.startswith("wrong shape") for item in found.unmatched)


@pytest.mark.parametrize(
    ("key", "module", "suffix"),
    [
        ("lora_unet_mid_block_proj_in.lora_up.weight", "lora_unet_mid_block_proj_in", "lora_up.weight"),
        ("lora_unet_x.alpha", "lora_unet_x", "alpha"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet.down_blocks.0.attn1.to_q", "lora_down.weight"),
        ("a.b.lora_B.default.weight", "a.b", "lora_up.weight"),
        ("lycoris_x.lokr_w2_a", "lycoris_x", "lokr_w2_a"),
    ],
)
def test_the_longest_known_suffix_is_split_off(key: str, module: str, suffix: str) -> None:
    assert split_key(key) == (module, suffix)


@pytest.mark.parametrize("key", ["alpha", "first_stage_model.conv.kernel", "", "lora_up"])
def test_what_is_no_adapters_key_is_left_alone(key: str) -> None:
    assert split_key(key) is None


def test_the_prefix_says_which_part_is_meant() -> None:
    assert module_name("lora_te1_text_model_x").dialect.components == ("te1",)
    assert module_name("lora_te_text_model_x").dialect.components[0] == "te1"
    assert module_name("lora_unet_x").body == "x"
    assert module_name("text_encoder_2.x").dialect.components == ("te2",)
