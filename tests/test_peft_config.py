"""PEFT's configurations: what changes numbers is honoured as PEFT itself does it, or refused by name.

The truth is PEFT: an adapter is trained a little, saved, loaded by PEFT again and merged.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.files.adapter import read_adapter
from lib_locon.files.peft_config import METADATA_KEY
from lib_locon.report import AdapterReport

PEFTS = "adapter_model.safetensors"
ONES = torch.ones(32)


class Net(nn.Module):
    """A layer of each kind that PEFT's LoRA takes, two of one name, and two that are trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.to_q = nn.Linear(24, 32)
        self.block = nn.ModuleDict({"to_q": nn.Linear(16, 20, bias=False), "to_k": nn.Linear(20, 20)})
        self.conv = nn.Conv2d(4, 6, 3)
        self.words = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(32)
        self.square = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)  # type: ignore[no-any-return]


def trained(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Saves a LoRA as PEFT does; returns every weight of PEFT's own merged model."""
    return trained_by(LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["to_q"], **settings}), folder)


def trained_by(config: PeftConfig, folder: Path) -> dict[str, Tensor]:
    model = get_peft_model(Net(), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    merged: dict[str, Tensor] = PeftModel.from_pretrained(Net(), folder).merge_and_unload().state_dict()
    return merged


def applied(path: Path, strength: float = 1.0) -> tuple[dict[str, Tensor], AdapterReport]:
    net = Net()
    use = lib_locon.Use(lib_locon.load(path), lib_locon.Strengths.both(strength))
    report = lib_locon.Session(net).apply([use]).adapters[0]
    return {name: value.detach().clone() for name, value in net.state_dict().items()}, report


def expect(path: Path, merged: dict[str, Tensor]) -> AdapterReport:
    """Every weight is PEFT's at full strength, and half way at half."""
    base = Net().state_dict()
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    for strength in (1.0, 0.5):
        found, report = applied(path, strength)
        for name, value in base.items():
            torch.testing.assert_close(
                found[name], value + strength * (merged[name] - value), rtol=1e-4, atol=2e-5, msg=name
            )
    return report


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True, "target_modules": "to_q"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 3},
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "olora", "alpha_pattern": {"block.to_q": 2}},
        {"target_modules": ["conv", "words", "to_q"]},
        {"target_modules": ["to_q", "to_k"], "rank_pattern": {"block.to_q": 2}, "alpha_pattern": {"to_k": 16}},
        {"alpha_pattern": {r"block\.to_[qk]": 3}},
        {"alpha_pattern": {"^to_q": 3}},
        {"alpha_pattern": {r".*\.to_q": 3}, "rank_pattern": {"to_q": 3}},
        {"alpha_pattern": {"to_q": 16, "block.to_q": 2}},
        {"modules_to_save": ["norm", "conv"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"bias": "all", "lora_bias": True, "target_modules": "to_q"},
        {"alpha_pattern": {r"(block|other)\.(to_q|to_k)": 3}},
        {"init_lora_weights": "pissa", "r": 64},
        {"init_lora_weights": "olora", "r": 64},
        {"init_lora_weights": "pissa", "target_modules": ["to_q", "words"]},
        {"target_modules": ["to_k"], "target_parameters": ["to_q.weight"]},
        {"target_modules": r".*\.(to_q|to_k)"},
    ],
    ids=str,
)
def test_an_adapter_is_what_peft_makes_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    expect(tmp_path / PEFTS, trained(tmp_path, **settings))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_header_alone_tells_the_start(init: str, tmp_path: Path) -> None:
    trained(tmp_path, init_lora_weights=init)
    adapter = read_adapter(tmp_path / PEFTS, header_only=True)
    labels = {layer.label.lower() for module in adapter.modules for layer in module.layers}
    assert labels == {init}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_cayley_neumann_terms": 1},
        {"num_cayley_neumann_terms": 2},
        {"num_cayley_neumann_terms": 3},
        {"num_cayley_neumann_terms": 4},
        {"num_cayley_neumann_terms": 7},
        {"use_cayley_neumann": False, "num_cayley_neumann_terms": 3},
        {"coft": True, "eps": 0.01},
        {"coft": True, "eps": 0.01, "block_share": True},
        {"coft": True, "eps": 1000.0},
    ],
    ids=str,
)
def test_an_oft_is_what_peft_makes_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    base = Net().state_dict()
    config = OFTConfig(**{"r": 0, "oft_block_size": 4, "target_modules": ["to_q"], **settings})
    merged = trained_by(config, tmp_path)
    if settings != {"num_cayley_neumann_terms": 1}:
        expect(tmp_path / PEFTS, merged)
    else:  # the first term alone is no change at all
        assert torch.equal(applied(tmp_path / PEFTS)[0]["to_q.weight"], base["to_q.weight"])


@pytest.mark.parametrize(
    "feedforward", [["to_k", "square"], r".*(to_k|square)", r".*to_[k]|square", "to_k|square"], ids=str
)
def test_an_ia3_is_on_the_side_that_peft_has_it(feedforward: Any, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["to_q", "to_k", "square"], feedforward_modules=feedforward)
    expect(tmp_path / PEFTS, trained_by(config, tmp_path))


def test_words_that_were_trained_leave_the_scale_to_the_other_modules(tmp_path: Path) -> None:
    merged = trained(tmp_path, trainable_token_indices={"words": [1, 2]})
    found, report = applied(tmp_path / PEFTS)
    torch.testing.assert_close(found["to_q.weight"], merged["to_q.weight"], rtol=1e-4, atol=2e-5)
    assert "PEFT's trainable tokens is not supported" in str(report.unmatched[0])


def test_the_start_is_divided_by_the_scale_wherever_that_is_from(tmp_path: Path) -> None:
    merged = trained(tmp_path, init_lora_weights="pissa")
    tensors = load_file(tmp_path / PEFTS)
    save_file({**tensors, "base_model.model.to_q.alpha": torch.tensor(8.0)}, tmp_path / PEFTS)
    resaved(tmp_path, lora_alpha=99)
    found, _ = applied(tmp_path / PEFTS)
    torch.testing.assert_close(found["to_q.weight"], merged["to_q.weight"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("alpha", [0, -8])
def test_a_start_that_would_be_divided_by_nothing_is_refused_by_name(alpha: int, tmp_path: Path) -> None:
    trained(tmp_path, init_lora_weights="pissa")
    resaved(tmp_path, lora_alpha=alpha)
    found, report = applied(tmp_path / PEFTS)
    assert torch.equal(found["to_q.weight"], Net().to_q.weight)
    assert "PiSSA at the scale" in str(report.unmatched[0])


@pytest.mark.parametrize("name", ["modules_to_save.style", "modules_to_save", "modules_to_save.default"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.base_model.model."])
def test_modules_that_were_saved_whole_are_found_behind_any_adapters_name(
    prefix: str, name: str, tmp_path: Path
) -> None:
    tensors = {f"{prefix}norm.{name}.weight": torch.full((32,), 3.0), f"{prefix}norm.original_module.weight": ONES}
    save_file(tensors, tmp_path / "a.safetensors")
    found, report = applied(tmp_path / "a.safetensors")
    assert found["norm.weight"].eq(3).all()
    assert [item.reason for item in report.unmatched] == ["the base's own weight, as it was before the training"]


def test_names_within_a_whole_pipeline_are_those_of_the_pipeline(tmp_path: Path) -> None:
    down, up = torch.ones(4, 24), torch.ones(32, 4)
    key = "base_model.model.unet.to_q"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / PEFTS)
    table = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["unet.to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**table, "alpha_pattern": {"^unet.to_q": 12}}))
    assert scale_of(tmp_path / PEFTS) == 3


def resaved(folder: Path, **changes: Any) -> None:
    """Changes the configuration that PEFT wrote."""
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_lora_weights": "corda"}, "CorDA took its start from training data"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA took its start from gradients"),
        ({"init_lora_weights": "loftq"}, "LoftQ trained beside a quantised base"),
        ({"init_lora_weights": "pissa_niter_4"}, "approximate SVD (pissa_niter) starts at random"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "an activated LoRA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"peft_type": "RANDLORA"}, "PEFT's RANDLORA is not supported"),
        ({"peft_type": "LILY"}, "PEFT's LILY is not supported"),
        ({"init_lora_weights": "milora"}, "init_lora_weights=milora is not known here"),
        ({"alpha_pattern": {"(?!to_q)": 3}}, "a pattern of module names that is not understood here ((?!to_q))"),
        ({"peft_type": "OFT", "num_cayley_neumann_terms": 10**9}, "no number from 1 to 100"),
        ({"peft_type": "OFT", "coft": True, "eps": -1}, "eps in its configuration is no positive number"),
        ({"peft_type": "IA3", "feedforward_modules": "(?i)TO_Q"}, "not understood here ((?i)TO_Q)"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    trained(tmp_path)
    resaved(tmp_path, **changes)
    with pytest.raises(lib_locon.FileError, match=re.escape(said)):
        lib_locon.load(tmp_path / PEFTS)


def test_a_refused_adapter_refuses_no_module_that_was_saved_whole(tmp_path: Path) -> None:
    merged = trained(tmp_path, modules_to_save=["norm"])
    resaved(tmp_path, init_lora_weights="corda")
    found, report = applied(tmp_path / PEFTS)
    torch.testing.assert_close(found["norm.weight"], merged["norm.weight"])
    assert "CorDA" in str(report.unmatched)


# ---- diffusers' metadata


def test_the_components_of_a_file_have_settings_of_their_own(tmp_path: Path) -> None:
    tensors = {
        "unet.to_q.lora_A.weight": torch.ones(4, 24), "unet.to_q.lora_B.weight": torch.ones(32, 4),
        "unet.norm.weight": torch.full((32,), 3.0), "unet.norm.bias": torch.full((32,), 5.0),
    }  # fmt: skip
    settings = {"unet.r": 4, "unet.lora_alpha": 2, "unet.modules_to_save": ["norm"], "text_encoder.lora_alpha": 99}
    save_file(tensors, tmp_path / "a.safetensors", {METADATA_KEY: json.dumps(settings)})
    found, _ = applied(tmp_path / "a.safetensors")
    torch.testing.assert_close(found["to_q.weight"] - Net().to_q.weight, torch.full((32, 24), 2.0))
    assert found["norm.weight"].eq(3).all() and found["norm.bias"].eq(5).all()


def test_metadata_of_another_rank_scale_nothing_and_it_is_said(tmp_path: Path) -> None:
    tensors = {"unet.to_q.lora_A.weight": torch.ones(4, 24), "unet.to_q.lora_B.weight": torch.ones(32, 4)}
    settings = {"unet.r": 64, "unet.lora_alpha": 8}
    save_file(tensors, tmp_path / "a.safetensors", {METADATA_KEY: json.dumps(settings)})
    assert scale_of(tmp_path / "a.safetensors") == 1
    assert "it is of rank 64, this file has 4" in lib_locon.load(tmp_path / "a.safetensors").notes[0]


def test_a_method_that_is_not_supported_is_named_where_its_tensors_look_like_plain_weights(tmp_path: Path) -> None:
    save_file({"base_model.model.to_q.peanut_A.weight": torch.ones(4, 24)}, tmp_path / PEFTS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PEANUT", "target_modules": ["to_q"]}))
    assert "PEFT's PEANUT is not supported" in lib_locon.load(tmp_path / PEFTS).notes


def test_a_plain_weight_of_a_file_that_is_not_pefts_stays_out(tmp_path: Path) -> None:
    tensors = {"to_q.lora_A.weight": torch.ones(4, 24), "to_q.lora_B.weight": torch.ones(32, 4)}
    save_file({**tensors, "norm.weight": torch.ones(32), "norm.bias": torch.ones(32)}, tmp_path / "a.safetensors")
    found, report = applied(tmp_path / "a.safetensors")
    assert torch.equal(found["norm.weight"], Net().norm.weight) and report.used == 1
    assert [item.reason for item in report.unmatched] == ["a plain weight, not an adapter's"] * 2


# ---- whose configuration it is


@pytest.mark.parametrize("alpha", ["8", True, 10**400])
def test_an_alpha_that_is_no_number_scales_nothing_and_it_is_said(alpha: Any, tmp_path: Path) -> None:
    trained(tmp_path)
    resaved(tmp_path, lora_alpha=alpha)
    assert scale_of(tmp_path / PEFTS) == 1
    assert "lora_alpha in its configuration is no number" in lib_locon.load(tmp_path / PEFTS).notes[1]


def scale_of(path: Path) -> float:
    return next(layer.scale for module in lib_locon.load(path).modules for layer in module.layers)


def test_a_renamed_adapter_alone_in_its_folder_keeps_its_configuration(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / PEFTS).rename(tmp_path / "style.safetensors")
    assert scale_of(tmp_path / "style.safetensors") == 2
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    assert scale_of(tmp_path / "style.safetensors") == 1
    assert "there are 2 adapters in this folder" in " ".join(lib_locon.load(tmp_path / "style.safetensors").notes)


def test_pefts_own_name_keeps_it_beside_others(tmp_path: Path) -> None:
    trained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    assert scale_of(tmp_path / PEFTS) == 2


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"r": 8}, "it is of rank 8, this file has 4"),
        ({"target_modules": ["to_v"]}, "it is for to_v, this file has"),
        ({"target_modules": r".*\.to_(k|v)"}, "it is for .*\\.to_(k|v), this file has"),
    ],
)
@pytest.mark.parametrize("name", [PEFTS, "style.safetensors"])
def test_one_that_contradicts_the_file_is_another_adapters(
    name: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    trained(tmp_path)
    resaved(tmp_path, **changes)
    (tmp_path / PEFTS).rename(tmp_path / name)
    assert scale_of(tmp_path / name) == 1
    assert why in " ".join(lib_locon.load(tmp_path / name).notes)


def test_a_file_of_another_trainer_takes_no_configuration(tmp_path: Path) -> None:
    trained(tmp_path)
    tensors = load_file(tmp_path / PEFTS)
    up, down = (next(value for key, value in tensors.items() if side in key) for side in ("lora_B", "lora_A"))
    (tmp_path / PEFTS).unlink()
    save_file(
        {"lora_unet_to_q.lora_up.weight": up, "lora_unet_to_q.lora_down.weight": down}, tmp_path / "k.safetensors"
    )
    adapter = lib_locon.load(tmp_path / "k.safetensors")
    assert not adapter.notes and adapter.modules[0].layers[0].scale == 1
