"""Files that are not what their name says: each kind gets a sentence of its own, and only FileError comes out."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import lib_locon
from lib_locon.errors import FileError
from lib_locon.files.reader import SafetensorsFile

if TYPE_CHECKING:
    from tests.conftest import WriteAdapter, WriteRaw

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
UP, DOWN = "lora_unet_linear.lora_up.weight", "lora_unet_linear.lora_down.weight"


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path, says: str) -> None:
    """Both the reader and whoever loads an adapter say so, with the file's name."""
    for read in (SafetensorsFile, lib_locon.load):
        with pytest.raises(FileError) as caught:
            read(path)
        assert says in str(caught.value)
        assert str(path) in str(caught.value)


# ---- not safetensors at all


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><title>Sign in</title></html>", "web page"),
        (b"<!doctype html>", "web page"),
        (b"\r\n  <html lang='en'>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"\x80\x02}q\x00.", "pickled"),
        (b"abc", "cut short"),
        (b"Entry not found, and more of such text", "is a text, not a model (it begins with 'Entry not found"),
        (b"\x00" * 8, "header is no JSON"),
    ],
)
def test_what_people_download_instead(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(path, says)


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save({"x": torch.ones(3)}, path)
    refused(path, "zip or a pickled")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")
    refused(path, "zip or a pickled")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_pickle_of_a_newer_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes([0x80, protocol]) + b"\x95\x0b" + b"\x00" * 50)
    with pytest.raises(FileError):
        SafetensorsFile(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    path.chmod(0)
    refused(path, "cannot be read: Permission denied")


# ---- headers


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "no JSON object"),
        ("text", "no JSON object"),
        (3, "no JSON object"),
        (b"{", "header is no JSON"),
        (b"", "header is no JSON"),
        (b"\xff\xfe{}", "header is no JSON"),
        (b'{"a":' * 100_000, "header is no JSON"),
        (b'{"x":' + json.dumps(F32).encode() + b',"x":' + json.dumps(F32).encode() + b"}", "'x' twice"),
        (b'{"x":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', "'dtype' twice"),
        ({"__metadata__": ["a"], "x": F32}, "__metadata__"),
        ({"__metadata__": "a", "x": F32}, "__metadata__"),
        ({"x": 3}, "'x' is not dtype, shape and data_offsets"),
        ({"x": None}, "'x' is not dtype, shape and data_offsets"),
        ({"x": []}, "'x' is not dtype, shape and data_offsets"),
        ({"x": "F32"}, "'x' is not dtype, shape and data_offsets"),
        ({"x": {"dtype": "F32", "shape": [1]}}, "'x' is not dtype, shape and data_offsets"),
        ({"x": entry(shape=None)}, "'x' is not dtype, shape and data_offsets"),
        ({"x": entry(offsets=[0])}, "'x' is not dtype, shape and data_offsets"),
        ({"x": entry(offsets=[0, 4, 8])}, "'x' is not dtype, shape and data_offsets"),
        ({"x": entry(offsets=None)}, "'x' is not dtype, shape and data_offsets"),
        ({"x": entry(offsets=[-4, 0])}, "negative or broken"),
        ({"x": entry(offsets=[0.0, 4.0])}, "negative or broken"),
        ({"x": entry(offsets=["0", "4"])}, "negative or broken"),
        ({"x": entry(shape=[-1])}, "negative or broken"),
        ({"x": entry(shape=[-1, -1])}, "negative or broken"),
        ({"x": entry(shape="1")}, "negative or broken"),
        ({"x": entry(shape=[1.5])}, "negative or broken"),
        ({"x": entry(dtype="F4")}, "dtype 'F4', which this version does not read"),
        ({"x": entry(dtype=None)}, "dtype None, which this version does not read"),
        ({"x": entry(shape=[2])}, "4 bytes of data for the shape [2] of F32"),
        ({"x": entry(shape=[])}, ""),
        ({"x": entry(dtype="F16")}, "4 bytes of data for the shape [1] of F16"),
        ({"x": entry(offsets=[4, 0], shape=[0])}, "-4 bytes of data"),
        ({"x": entry(offsets=[0, 400], shape=[100])}, "is cut short: 'x' ends at byte"),
        ({"x": entry(offsets=[2**70, 2**70 + 4])}, "is cut short"),
    ],
)
def test_a_header_that_is_not_sound(tmp_path: Path, write_raw: WriteRaw, header: Any, says: str) -> None:
    path = write_raw(tmp_path / "a.safetensors", header, b"\x00" * 4)
    if says:
        refused(path, says)
    else:
        assert SafetensorsFile(path).entries["x"].shape == ()


@pytest.mark.parametrize("dtype", [[], {}], ids=str)
def test_a_dtype_that_is_no_text(tmp_path: Path, write_raw: WriteRaw, dtype: Any) -> None:
    refused(write_raw(tmp_path / "a.safetensors", {"x": entry(dtype=dtype)}, b"\x00" * 4), "does not read")


def test_an_offset_of_thousands_of_digits(tmp_path: Path, write_raw: WriteRaw) -> None:
    nines = b"9" * 4300
    header = b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[%s,%s]}}' % (nines, nines)
    refused(write_raw(tmp_path / "a.safetensors", header), "is cut short")


@pytest.mark.parametrize("header_only", [False, True])
def test_a_size_beyond_what_torch_can_count(tmp_path: Path, write_raw: WriteRaw, header_only: bool) -> None:
    factors = {UP: entry(shape=[0, 2**63], offsets=[0, 0]), DOWN: entry(shape=[1, 0], offsets=[0, 0])}
    path = write_raw(tmp_path / "a.safetensors", factors)
    with pytest.raises(FileError):
        lib_locon.load(path, header_only=header_only)


@pytest.mark.parametrize(
    ("second", "size"), [([0, 4], 4), ([2, 6], 6), ([8, 12], 12)], ids=["the same", "overlapping", "with a hole"]
)
def test_tensors_that_do_not_lie_side_by_side(
    tmp_path: Path, write_raw: WriteRaw, second: list[int], size: int
) -> None:
    header = {UP: entry(), DOWN: entry(offsets=second)}
    path = write_raw(tmp_path / "a.safetensors", header, b"\x00" * size)
    with pytest.raises(FileError):
        lib_locon.load(path)
    with pytest.raises(FileError):  # a checkpoint to bake into is read by this class alone
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [9, 10**6, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(tmp_path: Path, write_raw: WriteRaw, length: int) -> None:
    refused(write_raw(tmp_path / "a.safetensors", {}, length=length), "cut short")


def test_a_header_longer_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:  # a sparse file: takes no room
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    refused(path, "a header of 200000000 bytes")


@pytest.mark.parametrize("keep", [1, 7, 8, 20, 0.5, -1])
def test_a_file_cut_short_anywhere(tmp_path: Path, keep: float) -> None:
    whole = save({UP: torch.ones(8, 2), DOWN: torch.ones(2, 12)})
    count = int(len(whole) * keep) if isinstance(keep, float) else keep
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole[:count])
    refused(path, "cut short")


@pytest.mark.parametrize("length", [640, 640 + 65536], ids=str)
def test_a_header_of_any_length_is_a_header(tmp_path: Path, write_raw: WriteRaw, length: int) -> None:
    text = json.dumps({"x": F32}).encode().ljust(length)
    path = write_raw(tmp_path / "a.safetensors", text, b"\x00" * 4)
    assert load_file(path)["x"].shape == (1,)  # the library that made the format reads it
    assert SafetensorsFile(path).entries["x"].shape == (1,)


# ---- what is sound


def test_a_sound_file_is_described_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"b": torch.ones(2, 3, dtype=torch.float16), "a": torch.ones(())}, path, {"who": "me"})
    file = SafetensorsFile(path)
    raw = path.read_bytes()
    assert file.metadata == {"who": "me"}
    assert {key: (e.dtype, e.shape) for key, e in file.entries.items()} == {"a": ("F32", ()), "b": ("F16", (2, 3))}
    found = {key: raw[e.start : e.end] for key, e in file.entries.items()}
    assert found == {"a": torch.ones(()).numpy().tobytes(), "b": torch.ones(6).half().numpy().tobytes()}
    assert file.meta("b").is_meta
    assert (file.meta("b").shape, file.meta("b").dtype) == ((2, 3), torch.float16)


DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "uint8", "bool")


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3).to(dtype)}, path)
    assert SafetensorsFile(path).entries["x"].torch_dtype == dtype


def test_metadata_that_is_not_text_becomes_text(tmp_path: Path, write_raw: WriteRaw) -> None:
    header = {"__metadata__": {"n": 3, "t": "a", "l": [1]}, "x": F32}
    file = SafetensorsFile(write_raw(tmp_path / "a.safetensors", header, b"\x00" * 4))
    assert file.metadata == {"n": "3", "t": "a", "l": "[1]"}
    assert SafetensorsFile(write_raw(tmp_path / "b.safetensors", {"__metadata__": None})).metadata == {}


def test_a_file_that_changed_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3)}, path)
    file = SafetensorsFile(path)
    save_file({"x": torch.ones(4)}, path)
    with pytest.raises(FileError, match="has changed"), file.tensors():
        pass
    path.unlink()
    with pytest.raises(FileError, match="cannot be read"), file.tensors():
        pass


# ---- sound files that are no adapters


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "no tensors at all"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (4, 4), "first_stage_model.x": (4,)},
            "is a whole checkpoint, not an adapter",
        ),
        ({"some.thing": (8, 768)}, "no adapter that is known here (its first name is 'some.thing')"),
        ({UP: (8, 2)}, "incomplete LoRA: lora_down.weight missing"),
        ({UP: (8, 2), DOWN: (3, 12)}, "wrong shapes"),
        ({UP: (8, 0), DOWN: (0, 12)}, "wrong shapes"),
        ({UP: (8,), DOWN: (8, 12)}, "wrong shapes"),
        ({"lora_unet_linear.alpha": ()}, "an alpha without factors"),
    ],
)
def test_a_file_without_an_adapter_in_it(tmp_path: Path, tensors: dict[str, tuple[int, ...]], says: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, path)
    for header_only in (False, True):
        with pytest.raises(FileError) as caught:
            lib_locon.load(path, header_only=header_only)
        assert says in str(caught.value)
        assert str(path) in str(caught.value)


def test_one_sound_module_is_enough_and_the_rest_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors: dict[str, Tensor] = {
        UP: torch.ones(8, 2),
        DOWN: torch.ones(2, 12),
        "lora_unet_other.lora_up.weight": torch.ones(8, 2),
        "lora_unet_third.lora_up.weight": torch.ones(8, 2),
        "lora_unet_third.lora_down.weight": torch.ones(3, 12),
        "lora_unet_fourth.alpha": torch.ones(2, 2),
        "what.is.this": torch.ones(1),
    }
    save_file(tensors, path)
    adapter = lib_locon.load(path)
    said = [*adapter.unknown, *(unread for module in adapter.modules for unread in module.unread)]
    assert {item.key for item in said} == set(tensors) - {UP, DOWN}
    assert all(item.reason for item in said)
    assert sum(len(module.layers) for module in adapter.modules) == 1


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float64", "bfloat16"])
def test_an_adapter_of_an_unusual_dtype_is_used(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({UP: torch.ones(8, 2).to(getattr(torch, name)), DOWN: torch.ones(2, 12)}, path)
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(12, 8)})
    base = model["linear"].weight.detach().clone()
    report = lib_locon.Session(model).apply([lib_locon.Use(lib_locon.load(path))])
    assert report.adapters[0].used == 1
    assert torch.equal(model["linear"].weight, base + 2)


# ---- any bytes


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, write_adapter: WriteAdapter) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    factors = {"lora_up.weight": torch.ones(8, 2), "lora_down.weight": torch.ones(2, 12), "alpha": torch.tensor(1.0)}
    return write_adapter(path, {"linear": factors}, {"ss_output_name": "fuzz"}).read_bytes()


def only_file_errors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for header_only in (True, False):
        try:
            adapter = lib_locon.load(path, header_only=header_only)
        except FileError as error:
            assert str(path) in str(error)
        else:
            assert any(module.layers for module in adapter.modules)


fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(data=st.data())
def test_a_file_with_some_bytes_changed(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    content = bytearray(sound)
    header_end = 8 + int.from_bytes(sound[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header_end))] = data.draw(
            st.one_of(st.integers(0, 255), st.sampled_from(list(b'0123456789-"[]{},:.eE ')))
        )
    only_file_errors(tmp_path / "a.safetensors", bytes(content))


@fuzz
@given(cut=st.integers(0, 700), more=st.binary(max_size=40))
def test_a_file_cut_and_continued_with_anything(tmp_path: Path, sound: bytes, cut: int, more: bytes) -> None:
    only_file_errors(tmp_path / "a.safetensors", sound[:cut] + more)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@fuzz
@given(
    up=st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "I8", "F8_E4M3", "?", 3, None]),
            "shape": st.one_of(VALUES, st.lists(st.integers(0, 9), max_size=4)),
            "data_offsets": st.one_of(VALUES, st.lists(st.integers(0, 64), min_size=2, max_size=2)),
        }
    ),
    metadata=st.one_of(st.none(), VALUES, st.dictionaries(st.text(max_size=3), VALUES, max_size=2)),
)
def test_a_header_with_anything_in_its_places(tmp_path: Path, write_raw: WriteRaw, up: Any, metadata: Any) -> None:
    header = {"__metadata__": metadata, UP: up, DOWN: entry(shape=[1, 1])}
    path = write_raw(tmp_path / "a.safetensors", header, b"\x00" * 64)
    only_file_errors(path, path.read_bytes())
