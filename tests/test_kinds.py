"""Files that are no adapters: each is named as what it is, and the sentence says what to do with it."""

from __future__ import annotations

import collections
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import lib_locon
from lib_locon.errors import FileError
from lib_locon.facts import read_facts
from lib_locon.files import kinds
from lib_locon.matching import match
from lib_locon.models.table import TargetTable

if TYPE_CHECKING:
    from tests.conftest import Zoo

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
MOTION = "down_blocks.0.motion_modules.0.temporal_transformer"
NAMES = {
    "LoRA in cloneofsimo's first format": ["unet:0:up", "unet:0:down", "text_encoder:0:up", "<s1>"],
    "Control-LoRA": ["lora_controlnet", "input_blocks.1.1.proj_in.up", "input_hint_block.0.weight"],
    "ControlNet-LLLite": ["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"],
    "ControlNet,": ["control_model.zero_convs.0.0.weight", "control_model.input_blocks.0.0.weight"],
    "a ControlNet, not": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "PuLID": ["pulid_ca.0.to_q.weight", "pulid_encoder.proj_out"],
    "IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "EasyControl": ["double_blocks.0.processor.q_loras.0.down.weight", "double_blocks.0.processor.q_loras.0.up.weight"],
    "SparseCtrl": [f"{MOTION}.norm.weight", "controlnet_cond_embedding.weight"],
    "motion module": [f"{MOTION}.proj_in.weight"],
    "whole checkpoint": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
    "VAE": ["encoder.conv_in.weight", "decoder.conv_in.weight"],
    "a VAE": ["first_stage_model.decoder.conv_in.weight"],
    "textual inversion": ["emb_params"],
    "textual inversion (": ["clip_l", "clip_g"],
    "a textual inversion": ["<cat-toy>"],
    "T2I-Adapter": ["body.0.block1.weight", "conv_in.weight"],
    "upscaler": ["conv_first.weight", "body.0.rdb1.conv1.weight"],
    "an upscaler": ["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"],
    "UNet or a transformer": ["conv_in.weight", f"{UNET}.to_q.weight"],
    "UNet or a transformer)": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "CLIP for images": ["vision_model.encoder.layers.0.self_attn.q_proj.weight"],
    "text encoder": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "a text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
}


def written(path: Path, names: list[str]) -> Path:
    save_file({name: torch.ones(2, 2) for name in names}, path)
    return path


@pytest.mark.parametrize("kind", NAMES)
def test_a_kind_by_the_names_of_its_tensors(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", NAMES[kind])
    for header_only in (False, True):
        with pytest.raises(FileError) as caught:
            lib_locon.load(path, header_only=header_only)
        sentence = str(caught.value)
        assert sentence.startswith(f"{path} is ")
        assert kind in sentence
        assert ": " in sentence.removeprefix(str(path)), "it says what to do"
    assert kind in read_facts(path).problem


def test_every_kind_has_a_file_in_these_tests() -> None:
    said = {kinds.of_names(names) for names in NAMES.values()}
    only_beside_layers = ("motion LoRA", "language model", "video model", "hypernetwork")
    assert [
        k.sentence
        for k in kinds.KINDS
        if k.sentence not in said and not any(o in k.sentence for o in only_beside_layers)
    ] == []


@pytest.mark.parametrize("kind", NAMES)
def test_an_adapter_beside_such_names_is_read(kind: str, tmp_path: Path) -> None:
    """Odd names never make a file unusable that has an adapter's layers in it."""
    tensors = {name: torch.ones(2, 2) for name in NAMES[kind]}
    tensors |= {
        "lora_unet_linear.lora_up.weight": torch.ones(8, 2),
        "lora_unet_linear.lora_down.weight": torch.ones(2, 12),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = lib_locon.load(tmp_path / "a.safetensors")
    assert "lora_unet_linear" in [module.name.written for module in adapter.modules if module.layers]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([f"{MOTION}.attention_blocks.0.processor.to_q_lora.{s}.weight" for s in ("up", "down")], "a motion LoRA"),
        ([f"ip_adapter.0.to_q_lora.{s}.weight" for s in ("up", "down")], "an IP-Adapter"),
        ([f"base_model.model.model.layers.0.self_attn.q_proj.lora_{s}.weight" for s in "AB"], "a language model"),
        ([f"diffusion_model.blocks.0.self_attn.q.lora_{s}.weight" for s in "AB"], "a video model"),
        ([f"lora_unet_double_blocks_0_img_attn_qkv.lora_{s}.weight" for s in ("up", "down")], ""),
        ([*(f"lora_unet_x.lora_{s}.weight" for s in ("up", "down")), "down_blocks.0.conv.weight"], ""),
    ],
)  # fmt: skip
def test_layers_of_which_none_fits_say_what_they_are_for(names: list[str], says: str, tmp_path: Path, zoo: Zoo) -> None:
    adapter = lib_locon.load(written(tmp_path / "a.safetensors", names))
    (report,) = lib_locon.Session(zoo()).apply([lib_locon.Use(adapter)]).adapters
    assert report.used == 0
    assert ("the file is" in str(report)) == bool(says)
    assert says in str(report)
    found = match(adapter, TargetTable.of_model(zoo()))
    assert any(says in note for note in found.notes) or not says


STARTS = {
    "GGUF file": b"GGUF\x03\0\0\0" + b"\0" * 99,
    "zip or a pickled": b"PK\x03\x04" + b"x" * 99,
    "archive": b"Rar!\x1a\x07\x01\x00" + b"x" * 99,
    "an archive": b"7z\xbc\xaf\x27\x1c" + b"x" * 99,
    "a picture": b"\x89PNG\r\n\x1a\n" + b"x" * 99,
    "picture, not": b"\xff\xd8\xff\xe0" + b"x" * 99,
    "picture": b"RIFF\xff\xff\0\0WEBPVP8 " + b"\0" * 99,
    "ONNX": b"\x08\x08\x12\x07pytorch" + b"\0" * 99,
    "program for Windows": b"MZ\x90\0\x03\0\0\0" + b"\0" * 99,
    "nothing but zeros": b"\0" * 99,
    'a text, not a model (it begins with \'{"error":': b'{"error":"Unauthorized","message":"sign in"}',
    "a text, not a model (it begins with 'Access denied')": b"Access denied",
    "a text": "Zugriff verweigert: bitte melde dich an, für größere Dateien gilt überall äöü".encode(),
    "web page": b"\n<!DOCTYPE html><html>",
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_kind_by_its_first_bytes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(STARTS[kind])
    with pytest.raises(FileError) as caught:
        lib_locon.load(path)
    assert str(caught.value).startswith(f"{path} ")
    assert kind in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("magic", [magic[:8].ljust(8, b"\0") for magic, _ in kinds.STARTS])
def test_a_header_of_any_length_is_no_other_kind(magic: bytes) -> None:
    """The first eight bytes of safetensors are a number; what follows decides."""
    assert kinds.of_start((2**20).to_bytes(8, "little") + b'{"a":{"dtype":"F32"') == ""
    assert kinds.of_start(magic) != "" or magic[:1] == b"\0"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4)}, "name": "x"}, "textual inversion"),
        ({"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 4))})}, "textual inversion"),
        ({"<cat>": torch.ones(4)}, "textual inversion"),
        ({768: ({"linear.0.weight": torch.ones(2, 2)},), "activate_output": True, "step": 1}, "hypernetwork"),
        ({"image_proj": {"proj.weight": torch.ones(2)}, "ip_adapter": {"1.to_k_ip": torch.ones(2)}}, "IP-Adapter"),
        ({"state_dict": {"model.diffusion_model.out.0.weight": torch.ones(2)}, "epoch": 3}, "whole checkpoint"),
        ({"x": collections.deque(), "state_dict": {"first_stage_model.a.weight": torch.ones(2)}}, "whole checkpoint"),
    ],
)  # fmt: skip
def test_a_kind_of_pickled_file(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FileError, match=says) as caught:
        lib_locon.load(tmp_path / "a.pt", allow_pickle=True)
    assert str(caught.value).startswith(f"{tmp_path / 'a.pt'} is a ") or " is an " in str(caught.value)


def test_names_of_strangers_take_no_second() -> None:
    many = [f"motion_{number}.controlnet" for number in range(200_000)]
    long = ["motion_modules." * 100_000, "." * 1_000_000, "a_loras" * 100_000, "down_blocks.0" + ".weigh" * 100_000]
    started = time.process_time()
    assert kinds.of_names(long[1:]) == ""
    kinds.of_names(long[:1])
    kinds.of_names(many)
    assert time.process_time() - started < 1
