"""PEFT's configurations: what changes numbers is honoured as PEFT itself does it, or refused by name.

The truth is PEFT: an adapter is trained a little, saved, loaded by PEFT again and merged.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.files.adapter import read_adapter
from lib_locon.files.name_patterns import UnknownPattern, matches
from lib_locon.files.peft_config import METADATA_KEY, read_config
from lib_locon.report import AdapterReport

PEFTS = "adapter_model.safetensors"


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

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)  # type: ignore[no-any-return]


def trained(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Saves an adapter as PEFT does; returns every weight of PEFT's own merged model."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["to_q"], **settings})
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
        ({"alpha_pattern": {"(to_q)+": 3}}, "a pattern of module names that is not understood here ((to_q)+)"),
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


def test_a_plain_weight_of_a_file_that_is_not_pefts_stays_out(tmp_path: Path) -> None:
    tensors = {"to_q.lora_A.weight": torch.ones(4, 24), "to_q.lora_B.weight": torch.ones(32, 4)}
    save_file({**tensors, "norm.weight": torch.ones(32), "norm.bias": torch.ones(32)}, tmp_path / "a.safetensors")
    found, report = applied(tmp_path / "a.safetensors")
    assert torch.equal(found["norm.weight"], Net().norm.weight) and report.used == 1
    assert [item.reason for item in report.unmatched] == ["a plain weight, not an adapter's"] * 2


# ---- whose configuration it is


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
    [({"r": 8}, "it is of rank 8, this file has 4"), ({"target_modules": ["to_v"]}, "it is for to_v, this file has")],
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


# ---- patterns

PIECES = ["a", "b", "to_q", ".", r"\.", r"\d+", "[0-9]+", "[^a]", "*", "+", "?", "|", "^", "$", r"\w", "1", ".*"]


@given(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.lists(st.sampled_from(["a", "b", "to_q", ".", "layers", "1", "x"]), max_size=6).map("".join),
)
def test_patterns_fit_the_names_that_pefts_regular_expressions_fit(pattern: str, name: str) -> None:
    try:
        found = matches(pattern, name)
        wanted = bool(re.match(rf"(.*\.)?({pattern})$", name))
    except (UnknownPattern, re.error):
        return
    assert found == wanted


@pytest.mark.parametrize("pattern", ["(a)", "a{3}", r"\1", r"a\b", "[a", "a**", "(?i)a", "x" * 501])
def test_patterns_beyond_that_are_told_apart(pattern: str) -> None:
    with pytest.raises(UnknownPattern):
        matches(pattern, "a")


def test_names_and_patterns_cost_no_more_than_their_length() -> None:
    long = ".".join("a" * 40_000)
    table = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"a.*a.*a.*a.*b": 3, **{f"m{i}.a": 1 for i in range(1000)}}}
    started = time.process_time()
    config = read_config(Path("x"), {METADATA_KEY: json.dumps(table)}, None)
    assert config.scale(long, 4) == 2
    assert time.process_time() - started < 5
