"""The extension's settings on the host's page, and what they change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from extensions_builtin_shim.launch import launch
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.settings import ALLOW_PICKLE, SETTINGS, SIDE_PATH
from tests import random_adapters


@pytest.fixture
def webui(tmp_path: Path) -> Iterator[Any]:
    torch.save(load_file(random_adapters.folder() / "tiny_lora.safetensors"), tmp_path / "old.pt")
    running = launch(lora_dir=tmp_path, make_model=TinySD.random)
    yield running
    running.close()


def comments(webui: Any) -> str:
    return str(webui.generate("a circle <lora:old:1>", seed=1, steps=1).comments)


def test_every_setting_is_on_the_page_with_its_default_in_data(webui: Any) -> None:
    from modules import shared

    for setting in SETTINGS:
        assert shared.opts.data_labels[setting.key].label == setting.label
        assert shared.opts.data[setting.key] == setting.default  # the host restores an overridden one only then


def test_pickled_adapters_are_not_there_until_the_setting_is_on(webui: Any) -> None:
    from modules import shared

    assert "no adapter 'old'" in comments(webui)
    shared.opts.set(ALLOW_PICKLE.key, True)
    assert "old (LoRA) at 1" in comments(webui)
    shared.opts.set(ALLOW_PICKLE.key, False)
    assert "no adapter 'old'" in comments(webui)


def test_the_side_path_gives_the_same_image_and_writes_no_weight(webui: Any, tmp_path: Path) -> None:
    from modules import shared

    def weights() -> dict[str, bytes]:
        return {name: weight.detach().numpy().tobytes() for name, weight in shared.sd_model.named_parameters()}

    def image(prompt: str) -> bytes:
        pixels: bytes = webui.generate(prompt, seed=1, steps=4).image.tobytes()
        return pixels

    (tmp_path / "new.safetensors").write_bytes((random_adapters.folder() / "tiny_locon.safetensors").read_bytes())
    with_adapter = "a circle <lora:new:0.5>"
    plain, base, merged = image("a circle"), weights(), image(with_adapter)
    assert merged != plain
    assert weights() != base
    shared.opts.set(SIDE_PATH.key, True)
    beside = image(with_adapter)
    assert max(abs(a - b) for a, b in zip(merged, beside, strict=True)) <= 1
    assert weights() == base
    assert any(module._forward_hooks for module in shared.sd_model.modules())
    assert image("a circle") == plain
    assert not any(module._forward_hooks for module in shared.sd_model.modules())
