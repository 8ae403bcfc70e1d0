"""Textual inversions inside an adapter file: in the host's table exactly while their adapter is in use.

The stand-in keeps the table and does not read it; that the image changes was seen in a real webui (docs/compatibility).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lib_locon
from extensions_builtin_shim.launch import launch
from extensions_builtin_shim.tiny_sd import TinySD
from tests import random_adapters

WORD = "bundle_emb.zorp.string_to_param.*"


@pytest.fixture
def webui(tmp_path: Path) -> Iterator[Any]:
    running = launch(lora_dir=tmp_path, make_model=TinySD.random)
    yield running
    running.close()


def table() -> Any:
    from modules import sd_hijack

    return sd_hijack.model_hijack.embedding_db


def write(path: Path, extra: dict[str, Tensor], with_layers: bool = True) -> None:
    layers = load_file(random_adapters.folder() / "tiny_lora.safetensors") if with_layers else {}
    save_file({**layers, **extra}, path)


def generate(webui: Any, prompt: str) -> str:
    return str(webui.generate(prompt, seed=1, steps=1).comments)


@pytest.mark.parametrize("with_layers", [True, False])
def test_in_the_table_while_in_use(webui: Any, tmp_path: Path, with_layers: bool) -> None:
    write(tmp_path / "x.safetensors", {WORD: torch.ones(2, 64)}, with_layers)
    generate(webui, "a zorp <lora:x:1>")
    assert table().word_embeddings["zorp"].vec.shape == (2, 64)
    generate(webui, "a zorp <lora:x:0.5>")
    assert "zorp" in table().word_embeddings
    generate(webui, "a zorp")
    assert "zorp" not in table().word_embeddings


def test_both_encoders_of_sdxl(webui: Any, tmp_path: Path) -> None:
    parts = {"bundle_emb.a.b.clip_l": torch.ones(1, 4), "bundle_emb.a.b.clip_g": torch.ones(1, 6)}
    write(tmp_path / "x.safetensors", parts)
    generate(webui, "<lora:x:1>")
    assert table().word_embeddings["a.b"].shape == 10


def test_the_users_own_embedding_stays(webui: Any, tmp_path: Path) -> None:
    from modules.textual_inversion.textual_inversion import Embedding

    own = Embedding(torch.zeros(1, 64), "zorp")
    table().register_embedding(own, None)
    write(tmp_path / "x.safetensors", {WORD: torch.ones(2, 64)})
    assert "the embeddings folder has one of that name" in generate(webui, "<lora:x:1>")
    generate(webui, "")
    assert table().word_embeddings.pop("zorp") is own


def test_a_width_for_another_model_is_said(webui: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table(), "expected_shape", 768)
    write(tmp_path / "x.safetensors", {WORD: torch.ones(2, 64)})
    assert "it is 64 wide, the model 768" in generate(webui, "<lora:x:1>")
    assert "zorp" not in table().word_embeddings


def test_what_has_no_place_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"bundle_emb.w.clip_l_out": torch.ones(1, 4), "bundle_emb.w.clip_l": torch.ones(4)})
    adapter = lib_locon.load(path)
    assert [item.key for item in adapter.unknown] == ["bundle_emb.w.clip_l_out"]
    assert adapter.embeddings[0].vectors["clip_l"].shape == (1, 4)
