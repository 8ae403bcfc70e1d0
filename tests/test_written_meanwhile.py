"""Adapter files that are written, cut or replaced while they are read: one content or the other, or a sentence.

What is read is never of two contents, and never ends the process, as a file that is mapped into memory does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

import lib_locon
from lib_locon.bake import bake
from lib_locon.errors import FileChanged, FileError
from lib_locon.facts import FactsIndex, FileMetadata, read_facts
from lib_locon.files import handles
from lib_locon.files.adapter import Adapter, read_adapter
from lib_locon.files.hashes import body_hash, hashes_of
from lib_locon.files.reader import FileIdentity, SafetensorsFile
from lib_locon.fitting import Fits
from lib_locon.library import Library
from lib_locon.resolve import AdapterCache
from lib_locon.session import Session, Use
from tests.conftest import ZooModel

MODULES = 4
Event = Callable[[Path, bytes], None]


def content(value: float) -> dict[str, Tensor]:
    """An adapter in which each number is `value`. Its file has the same size for all of them."""
    made: dict[str, Tensor] = {}
    for number in range(MODULES):
        made[f"lora_unet_linear{number}.lora_up.weight"] = torch.full((8, 2), value)
        made[f"lora_unet_linear{number}.lora_down.weight"] = torch.full((2, 12), value)
        made[f"lora_unet_linear{number}.alpha"] = torch.tensor(value)
    return made


OLD, NEW = content(1.0), content(2.0)


def aged(path: Path) -> Path:
    """Written an hour ago, so that a write from now on has another time."""
    then = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(then, then))
    return path


def old_file(path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(OLD, path)
    else:
        save_file(OLD, path)
    return aged(path)


def new_bytes(path: Path) -> bytes:
    if path.suffix == ".safetensors":
        return save(NEW)
    other = path.with_name("new.pt")
    torch.save(NEW, other)
    return other.read_bytes()


def values(adapter: Adapter) -> set[float]:
    """All numbers in it."""
    layers = [layer for module in adapter.modules for layer in module.layers]
    found = {float(layer.alpha or 0) for layer in layers}
    tensors = [tensor for layer in layers for tensor in layer.tensors().values() if not tensor.is_meta]
    return found | {value for tensor in tensors for value in tensor.flatten().tolist()}


# ---- what happens to files


def emptied(path: Path, new: bytes) -> None:
    os.truncate(path, 0)


def cut(path: Path, new: bytes) -> None:
    os.truncate(path, path.stat().st_size // 2)


def written_in_place(path: Path, new: bytes) -> None:
    with path.open("r+b") as file:
        file.write(new)


def replaced(path: Path, new: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(new)
    other.replace(path)


def deleted(path: Path, new: bytes) -> None:
    path.unlink(missing_ok=True)


def made_a_pipe(path: Path, new: bytes) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


EVENTS = [emptied, cut, written_in_place, replaced, deleted]
if hasattr(os, "mkfifo"):
    EVENTS.append(made_a_pipe)
each_event = pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
each_kind = pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])


class Moments:
    """Lets something happen once, at one of the moments at which a file is opened, looked at, or read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.wanted = 0, -1
        self.happens: Callable[[], None] = lambda: None
        for name in ("open", "fstat", "preadv"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.wanted:
                self.happens()
            return function(*arguments, **options)

        return watched

    def start(self, wanted: int, happens: Callable[[], None]) -> None:
        self.count, self.wanted, self.happens = 0, wanted, happens


@each_event
@each_kind
@pytest.mark.parametrize("header_only", [False, True])
def test_an_adapter_is_of_one_content_whenever_its_file_changes(
    name: str, header_only: bool, event: Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each moment of the reading in turn."""
    path, moments = tmp_path / name, Moments(monkeypatch)
    outcomes: set[object] = set()
    moment = 0
    while True:
        moment += 1
        path.unlink(missing_ok=True)
        new = new_bytes(old_file(path))

        moments.start(moment, lambda new=new: event(path, new))  # type: ignore[misc]
        try:
            found = values(read_adapter(path, header_only=header_only, allow_pickle=True))
        except FileError as error:
            assert str(path) in str(error)
            outcomes.add("refused")
        else:
            assert found in ({1.0}, {2.0}), f"numbers of both contents, at moment {moment}"
            outcomes |= found
        if moments.count < moment:
            break
    assert moment > 6
    expected = {1.0, 2.0} if event in (written_in_place, replaced) else {1.0, "refused"}
    assert outcomes == expected


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
@each_kind
def test_no_file_is_mapped(name: str, tmp_path: Path) -> None:
    from lib_locon.files.pickled import open_adapter

    path = old_file(tmp_path / name)
    with open_adapter(path, allow_pickle=True).tensors() as data:
        tensors = [data.get_tensor(key) for key in OLD]
        assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf8")
    assert all(torch.equal(tensor, OLD[key]) for tensor, key in zip(tensors, OLD, strict=True))


def test_what_is_read_stays_what_it_was(tmp_path: Path) -> None:
    path = old_file(tmp_path / "a.safetensors")
    adapter = read_adapter(path)
    written_in_place(path, save(NEW))
    os.truncate(path, 0)
    assert values(adapter) == {1.0}


def test_a_file_that_never_rests_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_file(tmp_path / "a.safetensors")
    fill, turns = handles.fill, [OLD, NEW]

    def writing(*arguments: Any) -> None:
        fill(*arguments)
        turns.reverse()
        written_in_place(path, save(turns[0]))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))

    monkeypatch.setattr("lib_locon.files.reader.fill", writing)
    with pytest.raises(FileChanged, match="was written while it was read; try again"):
        read_adapter(path)


def test_a_program_that_saves_over_and_over(tmp_path: Path) -> None:
    """For real, without knowing the moments: a thread writes the file in each way, and another reads it."""
    path, whole, stop = tmp_path / "a.safetensors", [save(OLD), save(NEW)], threading.Event()
    path.write_bytes(whole[0])

    def keep_saving() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            data = whole[turn % 2]
            if turn % 3 == 0:
                replaced(path, data)
            else:
                with path.open("wb", buffering=0) as file:  # as `open(…, "wb")` of a trainer: first it is empty
                    file.write(data[: len(data) // 2])
                    file.write(data[len(data) // 2 :])
            time.sleep(0.004 * (turn % 2))

    saver = threading.Thread(target=keep_saving)
    saver.start()
    read, until = 0, time.monotonic() + 2
    try:
        while time.monotonic() < until or not read:
            try:
                found = values(read_adapter(path, header_only=read % 2 == 0))
            except FileError:
                continue
            read += 1
            assert found <= {1.0, 2.0}
    finally:
        stop.set()
        saver.join()


# ---- what is kept of files


def identity_then(monkeypatch: pytest.MonkeyPatch, module: str, happens: Callable[[], None]) -> None:
    """Something happens right after somebody there has taken a file's identity."""
    of = FileIdentity.of

    class Later(FileIdentity):
        @classmethod
        def of(cls, path: Path) -> FileIdentity:
            found = of(path)
            happens()
            return found

    monkeypatch.setattr(f"{module}.FileIdentity", Later)


def test_an_adapter_is_kept_under_its_own_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = old_file(tmp_path / "a.safetensors"), AdapterCache()
    before = path.stat().st_mtime_ns
    with monkeypatch.context() as patched:
        identity_then(patched, "lib_locon.resolve", lambda: replaced(path, save(NEW)))
        assert values(cache.read(path)) == {2.0}
    path.write_bytes(save(OLD))
    os.utime(path, ns=(before, before))  # the first one is back, as after `mv`
    assert values(cache.read(path)) == {1.0}


def test_a_fit_is_kept_under_its_own_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model, fits = old_file(tmp_path / "a.safetensors"), ZooModel(), Fits()
    before, session = path.stat(), Session(ZooModel())
    more = save({**NEW, "lora_unet_linear.lora_up.weight": torch.ones(8, 2)})
    with monkeypatch.context() as patched:
        identity_then(patched, "lib_locon.fitting", lambda: replaced(path, more))
        first = fits.of(path, model, session)
    save_file(OLD, path)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    again = fits.of(path, model, session)
    assert first is not None and again is not None
    assert again.why != first.why


def swapped(path: Path) -> FileIdentity:
    """The identity of a file whose place another has taken."""
    identity = FileIdentity.of(old_file(path))
    replaced(path, save(NEW, {"ss_output_name": "another"}))
    return identity


def test_no_hash_of_another_file(tmp_path: Path) -> None:
    identity = swapped(tmp_path / "a.safetensors")
    for of in (hashes_of, body_hash):
        with pytest.raises(FileChanged, match="has changed meanwhile"):
            of(identity)


def test_no_facts_of_another_file(tmp_path: Path) -> None:
    identity = swapped(tmp_path / "a.safetensors")
    index = FactsIndex()
    index.read([identity], 30)
    facts = index.known(identity)
    assert facts is not None and "has changed meanwhile" in facts.problem
    assert read_facts(Path(identity.path)).alias == "another"
    assert dict(FileMetadata(identity)) == {}


def test_no_alias_of_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_file(tmp_path / "a.safetensors")
    entry = Library([tmp_path]).entries[0]
    identity_then(monkeypatch, "lib_locon.library", lambda: replaced(path, save(NEW, {"ss_output_name": "another"})))
    assert entry.alias == ""
    monkeypatch.undo()
    assert entry.alias == "another"


def test_a_hash_is_of_one_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_file(tmp_path / "a.safetensors")
    identity = FileIdentity.of(path)
    monkeypatch.setattr("lib_locon.files.hashes.CHUNK", 64)
    update = handles.read_exactly

    def written_after_the_header(*arguments: Any) -> bytes:
        found = update(*arguments)
        written_in_place(path, save(NEW))
        return found

    monkeypatch.setattr("lib_locon.files.hashes.read_exactly", written_after_the_header)
    with pytest.raises(FileChanged, match="was written while it was read"):
        hashes_of(identity)


@pytest.mark.parametrize("patched", [True, False], ids=["a tensor that is changed", "one that is copied"])
@pytest.mark.parametrize("event", [emptied, cut, written_in_place, replaced], ids=lambda event: event.__name__)
def test_a_checkpoint_that_changes_while_it_is_baked(event: Event, patched: bool, tmp_path: Path) -> None:
    path, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    target = "model.diffusion_model.middle_block.1.proj_in.weight"
    base = {target: torch.ones(8, 12), "zz": torch.ones(5)}
    save_file(base, path)
    aged(path)
    module = target.removesuffix(".weight")
    made = {f"{module}.lora_up.weight": torch.ones(8, 2), f"{module}.lora_down.weight": torch.ones(2, 12)}
    save_file(made, tmp_path / "a.safetensors")
    use = Use(lib_locon.load(tmp_path / "a.safetensors"))
    checkpoint = SafetensorsFile(path)
    at = 8 * 12 * 4 if not patched else 0

    def progress(done: int, total: int) -> None:
        if done == at:
            event(path, save({key: 2 * tensor for key, tensor in base.items()}))

    if patched:
        event(path, save({key: 2 * tensor for key, tensor in base.items()}))
    with pytest.raises(FileError):
        bake(checkpoint, [use], out, "", progress)
    assert list(tmp_path.glob("out*")) == []


def test_a_recipe_has_no_hash_of_another_adapter(tmp_path: Path) -> None:
    target = "model.diffusion_model.middle_block.1.proj_in"
    save_file({f"{target}.weight": torch.ones(8, 12)}, tmp_path / "base.safetensors")
    path = tmp_path / "a.safetensors"
    save_file({f"{target}.lora_up.weight": torch.ones(8, 2), f"{target}.lora_down.weight": torch.ones(2, 12)}, path)
    use = Use(lib_locon.load(aged(path)))
    aged(path)
    written_in_place(path, path.read_bytes())
    with pytest.raises(FileChanged):
        bake(SafetensorsFile(tmp_path / "base.safetensors"), [use], tmp_path / "out.safetensors", "", lambda *_: None)
    assert list(tmp_path.glob("out*")) == []
