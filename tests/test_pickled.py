"""Pickled adapters: off unless asked for; with the option on, tensors and nothing else, and never a program."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.errors import FileError
from lib_locon.files import pickled, reader
from lib_locon.library import Library
from tests.conftest import TORCH
from tests.fuzz.limits import limited, peak

if TYPE_CHECKING:
    from tests.conftest import Zoo

UP, DOWN = "lora_unet_linear.lora_up.weight", "lora_unet_linear.lora_down.weight"


def factors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {UP: torch.randn(8, 2, generator=generator), DOWN: torch.randn(2, 12, generator=generator)}
    return {**made, "lora_unet_linear.alpha": torch.tensor(1.0)}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def refused(path: Path, says: str) -> None:
    for header_only in (False, True):
        with pytest.raises(FileError) as caught, limited(path.stat().st_size):
            lib_locon.load(path, allow_pickle=True, header_only=header_only)
        assert says in str(caught.value)
        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable()
        assert "weights_only" not in str(caught.value), "torch's advice to switch it off is not passed on"


class Mark:
    """What a pickle can do: writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


# ---- off


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.PT"])
def test_off_it_is_not_even_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / name, factors())
    monkeypatch.setattr(torch, "load", None)
    for header_only in (False, True):
        with pytest.raises(FileError, match=r"can hold a program, and the option .*allow_pickle.* is off") as caught:
            lib_locon.load(path, header_only=header_only)
        assert str(path) in str(caught.value)


def test_another_ending_is_never_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", factors())
    with pytest.raises(FileError, match="a zip or a pickled"):
        lib_locon.load(path, allow_pickle=True)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_safetensors_by_the_name_of_pt(allow_pickle: bool, tmp_path: Path) -> None:
    save_file(factors(), tmp_path / "a.pt")
    assert len(lib_locon.load(tmp_path / "a.pt", allow_pickle=allow_pickle).modules) == 1


def test_what_is_no_pickle_is_named_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"<!doctype html><html>")
    refused(path, "is a web page")
    path.write_bytes(b"")
    refused(path, "is empty")


# ---- on


def with_parameters() -> dict[str, Any]:
    return {key: nn.Parameter(tensor) for key, tensor in factors().items()}


def not_contiguous() -> dict[str, Any]:
    wide = torch.zeros(8, 50)
    wide[:, 7:9] = factors()[UP]
    return {**factors(), UP: wide[:, 7:9], DOWN: factors()[DOWN].T.contiguous().T}


@pytest.mark.parametrize(
    "content",
    [
        factors(),
        {"state_dict": factors(), "epoch": 3, "global_step": 100},
        collections.OrderedDict(factors()),
        with_parameters(),
        not_contiguous(),
    ],
    ids=["plain", "state_dict", "ordered", "parameters", "not contiguous"],
)
def test_a_table_of_tensors_is_what_safetensors_would_be(content: Any, tmp_path: Path, zoo: Zoo) -> None:
    save_file(factors(), tmp_path / "a.safetensors")
    save(tmp_path / "a.pt", content)
    models = []
    for name in ("a.safetensors", "a.pt"):
        models.append(zoo())
        adapter = lib_locon.load(tmp_path / name, allow_pickle=True)
        report = lib_locon.Session(models[-1]).apply([lib_locon.Use(adapter)]).adapters[0]
        assert (report.used, report.unmatched) == (1, ())
    assert torch.equal(models[0].linear.weight, models[1].linear.weight)
    assert not torch.equal(models[0].linear.weight, zoo().linear.weight)


def test_the_header_only(tmp_path: Path) -> None:
    adapter = lib_locon.load(save(tmp_path / "a.ckpt", factors()), allow_pickle=True, header_only=True)
    (layer,) = adapter.modules[0].layers
    assert all(tensor.is_meta for tensor in layer.tensors().values())
    assert (layer.alpha, adapter.name, adapter.metadata) == (1.0, "a", {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype.itemsize == 1 and dtype.is_floating_point and TORCH < (2, 2):
        pytest.skip("torch before 2.2 writes no fp8")
    path = save(tmp_path / "a.pt", {key: tensor.to(dtype) for key, tensor in factors().items()})
    (layer,) = lib_locon.load(path, allow_pickle=True).modules[0].layers
    assert [tensor.dtype for tensor in layer.tensors().values()] == [dtype, dtype]


def raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten().clone()
    return bytes(flat.untyped_storage())[: flat.nbytes]


DTYPES = [dtype for dtype in reader.DTYPES.values() if TORCH >= (2, 2) or "float8" not in str(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_those_that_torch_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    wide = (torch.arange(-30.0, 30.0).reshape(5, 12) * 1.25).to(dtype)
    content = {
        "plain": wide.clone(),
        "a scalar": wide[2, 7].clone(),
        "empty": torch.empty((3, 0), dtype=dtype),
        "whole": wide,
        "rows": wide[1:3],
        "columns": wide[:, 2:4],
        "steps": wide[::2, 1::3],
        "turned": wide.T,
        "turned part": wide[2:, 3:].T,
        "repeated": wide[0, :1].expand(3, 2),
    }
    path = save(tmp_path / "a.pt", {**content, "much": torch.zeros(999)})  # views of one part share its bytes
    known = torch.load(path, weights_only=True)
    file = pickled.PickledFile(path)
    with file.tensors() as data:
        for key in content:
            read = data.get_tensor(key)
            assert (read.dtype, read.shape) == (dtype, known[key].shape)
            assert raw(read) == raw(known[key]), key
            assert file.meta(key).shape == read.shape


def test_nothing_of_torch_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.pt", factors())
    monkeypatch.setattr(torch, "load", None)
    assert len(lib_locon.load(path, allow_pickle=True).modules) == 1


def test_the_header_only_of_a_large_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {**factors(), "x.diff": torch.zeros(30_000_000)})
    before = peak(reset=True)
    lib_locon.load(path, allow_pickle=True, header_only=True)
    assert peak() - before < 60_000_000, "half of the file"


def test_numbers_in_the_other_order(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", factors())
    refused(rezipped(path, lambda name, part: b"big" if name.endswith("byteorder") else part), "the other way round")


@pytest.mark.parametrize(
    "program",
    [
        b".",
        b"}",
        b"0.",
        b"}}.",
        b"h\x05.",
        b"]K\x01K\x02s.",
        b"})K\x01s.",
        b"}K\x01a.",
        b"ccollections\nOrderedDict\nK\x01R.",
        b"ctorch\nFloatStorage\n)R.",
        b"K\x01Q.",
        b"]b.",
        b"r\xff\xff\xff\xff.",
        b"(" * 100_000 + b"t" * 100_000 + b".",
    ],
)
def test_a_list_of_tensors_that_makes_no_sense(program: bytes, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", factors())
    change = lambda name, part: b"\x80\x02" + program if name.endswith("data.pkl") else part  # noqa: E731
    refused(rezipped(path, change), str(path))


def test_a_file_that_changed(tmp_path: Path) -> None:
    file = pickled.PickledFile(save(tmp_path / "a.pt", factors()))
    save(tmp_path / "a.pt", {**factors(), "x": torch.ones(99)})
    with pytest.raises(FileError, match="has changed"), file.tensors():
        pass


# ---- what is in it that should not be


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_program_is_not_run(wrapped: bool, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    path = save(tmp_path / "a.pt", {"state_dict": {**factors(), "x": Mark(mark)}} if wrapped else Mark(mark))
    refused(path, "holds more than tensors ('posix mkdir')")
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file is what the test takes it for"


def test_nor_is_one_that_torch_would_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second lock: torch's own reader had holes, and must not see such a file at all."""
    monkeypatch.setattr(torch, "load", None)
    refused(save(tmp_path / "a.pt", {"x": bytearray(3)}), "holds more than tensors")
    refused(save(tmp_path / "b.pt", {"x": torch.ones(2).to_sparse()}), "_rebuild_sparse_tensor")
    refused(save(tmp_path / "c.pt", {"x": torch.ones(2, device="meta")}), "_rebuild_meta_tensor")
    refused(save(tmp_path / "d.pt", {"x": {1, 2}}), "holds more than tensors")
    refused(save(tmp_path / "e.pt", nn.Linear(2, 2)), "torch.nn.modules.linear Linear")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(8, 2), torch.ones(2, 12)] * 3, "a list of tensors without names (cloneofsimo"),
        ([], "no table of tensors but a list"),
        (torch.ones(3), "no table of tensors but a Tensor"),
        ("text", "no table of tensors but a str"),
        ({**factors(), "epoch": 3}, "more than tensors with names: 'epoch' is a int"),
        ({"state_dict": {"a": {"b": torch.ones(1)}}}, "'a' is a dict"),
        ({3: torch.ones(1)}, "more than tensors with names: 3 is a Tensor"),
        ({"x\ud800": torch.ones(1)}, "no Unicode text"),
        ({"\x1b[2J": 3}, "'\\x1b[2J' is a int"),
        ({}, "no tensors at all"),
        ({"emb": torch.ones(8)}, "no adapter that is known here"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, "'torch ComplexFloatStorage'"),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_other_things_that_torch_saves(content: Any, says: str, tmp_path: Path) -> None:
    refused(save(tmp_path / "a.pt", content), says)


def test_formats_of_old(tmp_path: Path) -> None:
    torch.save(factors(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "a.pt", "one of before 2020")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"x": 1}))
    refused(tmp_path / "b.pt", "one of before 2020")


def test_a_torchscript_program(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl", "a/code/x.py"):
            archive.writestr(name, b"\x80\x02}q\x00.")
    refused(path, "TorchScript")


# ---- more than the file's size


def test_a_tensor_of_steps_of_nothing(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.pt", {**factors(), UP: torch.ones(1).expand(200_000, 200_000)}), "larger than the file")


def test_many_tensors_on_one_storage(tmp_path: Path) -> None:
    one = torch.ones(10_000)
    refused(save(tmp_path / "a.pt", {f"x{i}.diff": one for i in range(1000)}), "larger than the file")


def rezipped(source: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with its parts changed."""
    with zipfile.ZipFile(source) as archive:
        parts = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return source


def test_compressed_parts(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {**factors(), "x.diff": torch.zeros(20_000_000)})
    rezipped(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    refused(path, "is compressed")


@pytest.mark.parametrize("times", [2, 10**5])
def test_a_storage_that_claims_more_than_it_has(times: int, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"x.diff": torch.zeros(100, 100)})
    lib_locon.load(path, allow_pickle=True)
    numel, shape = b"M" + (10_000).to_bytes(2, "little"), b"K\x64K\x64"
    claims = {
        numel: b"J" + (10_000 * times).to_bytes(4, "little"),
        shape: b"J" + (100 * times).to_bytes(4, "little") + b"Kd",
    }

    def change(name: str, content: bytes) -> bytes:
        for true, claim in claims.items():
            assert true in content or not name.endswith("data.pkl")
            content = content.replace(true, claim)
        return content

    refused(rezipped(path, change), "is larger than the part that holds it")


def test_the_same_list_twice_in_other_letters(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", factors())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/DATA.PKL", b"x")
    refused(path, "no table of tensors")


# ---- any bytes

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole() -> bytes:
    buffer = io.BytesIO()
    torch.save(factors(), buffer)
    return buffer.getvalue()


WHOLE = whole()


def only_file_errors(path: Path) -> None:
    try:
        with limited(path.stat().st_size):
            adapter = lib_locon.load(path, allow_pickle=True)
    except FileError as error:
        assert str(path) in str(error)
    else:
        assert adapter.modules


@fuzz
@given(data=st.data())
def test_an_archive_with_some_bytes_changed(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.pt"
    path.write_bytes(bytes(content[: data.draw(st.integers(len(content) // 2, 2 * len(content)))]))
    only_file_errors(path)


@fuzz
@given(data=st.data())
def test_a_list_with_some_bytes_changed(tmp_path: Path, data: st.DataObject) -> None:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            changed[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(list(b"}](tqKMJXcRQsue."))))
        return bytes(changed)

    path = tmp_path / "a.pt"
    path.write_bytes(WHOLE)
    only_file_errors(rezipped(path, change))


# ---- the library


def test_the_library_lists_them_with_the_option_only(tmp_path: Path) -> None:
    for name in ("a.pt", "b.ckpt", "both.pt", "sub/both.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, factors())
    save_file(factors(), tmp_path / "both.safetensors")
    assert [entry.path.name for entry in Library([tmp_path]).entries] == ["both.safetensors"]
    library = Library([tmp_path], allow_pickle=True)
    found = [entry.path.relative_to(tmp_path).as_posix() for entry in library.entries]
    assert found == ["a.pt", "b.ckpt", "both.safetensors", "sub/both.pt"]
    assert library.find("a").path == tmp_path / "a.pt"
    assert library.find("both").path == tmp_path / "both.safetensors", "beside a safer file it is not used"
    assert library.find("sub/both").alias == ""
