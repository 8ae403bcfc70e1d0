"""Names → files: which one wins, what is ambiguous, what is noticed without a restart, and what is never found."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from lib_locon.errors import FileError, UnknownName
from lib_locon.files.adapter import Adapter, read_adapter
from lib_locon.files.hashes import hashes_of
from lib_locon.files.reader import FileIdentity
from lib_locon.library import Library, without_folders
from lib_locon.prompt.grammar import parse_prompt
from lib_locon.prompt.request import Strengths
from lib_locon.resolve import AdapterCache, find, resolve

if TYPE_CHECKING:
    from tests.conftest import WriteAdapter


class Shelf:
    """A folder of adapters."""

    def __init__(self, folder: Path, write: WriteAdapter) -> None:
        self.folder, self._write = folder, write
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, alias: str | None = None, value: float = 1.0) -> Path:
        factors = {"lora_up.weight": torch.full((8, 2), value), "lora_down.weight": torch.ones(2, 12)}
        metadata = None if alias is None else {"ss_output_name": alias}
        return self._write(self.folder / f"{name}.safetensors", {"linear": factors}, metadata)


@pytest.fixture
def shelf(tmp_path: Path, write_adapter: WriteAdapter) -> Shelf:
    return Shelf(tmp_path / "loras", write_adapter)


def links(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("this system makes no links")


# ---- which name wins


def test_a_name_is_a_path_else_a_file_name_else_an_alias(shelf: Shelf) -> None:
    by_path = shelf.put("x")
    by_stem = shelf.put("sub/x")
    by_alias = shelf.put("other", alias="x")
    library = Library([shelf.folder])
    assert library.find("x").path == by_path
    assert library.find("sub/x").path == by_stem
    by_path.unlink()
    library.refresh()
    assert library.find("x").path == by_stem
    by_stem.unlink()
    library.refresh()
    assert library.find("x").path == by_alias
    assert library.find("other").path == by_alias


def test_entries_know_their_names(shelf: Shelf) -> None:
    shelf.put("Sub/deep/b.v1.5", alias="trained")
    shelf.put("a", alias="None")
    entries = Library([shelf.folder]).entries
    found = [(entry.name, entry.stem, entry.alias) for entry in entries]
    assert found == [("a", "a", ""), ("Sub/deep/b.v1.5", "b.v1.5", "trained")]


def test_other_files_are_no_adapters(shelf: Shelf) -> None:
    for name in ("a.txt", "b.preview.png", "c.safetensors.part", "d.pt"):
        (shelf.folder / name).write_bytes(b"x")
    shelf.put("e").rename(shelf.folder / "f.SAFETENSORS")
    assert [entry.name for entry in Library([shelf.folder]).entries] == ["f"]


@pytest.mark.parametrize("kind", ["stem", "alias", "name"])
def test_two_that_answer_to_one_name_are_an_error_that_names_both(
    shelf: Shelf, tmp_path: Path, write_adapter: WriteAdapter, kind: str
) -> None:
    other = Shelf(tmp_path / "more", write_adapter)
    if kind == "stem":
        shelf.put("one/x"), shelf.put("two/x")
        names = ["one/x", "two/x"]
    elif kind == "alias":
        shelf.put("a", alias="x"), shelf.put("b", alias="x")
        names = ["a", "b"]
    else:
        shelf.put("x"), other.put("x")
        names = ["x, x"]
    library = Library([shelf.folder, other.folder])
    with pytest.raises(UnknownName, match="'x' could be any of these") as caught:
        library.find("x")
    assert all(name in str(caught.value) for name in names)


def test_names_near_an_unknown_one_are_named(shelf: Shelf) -> None:
    shelf.put("sub/Watercolour_v2"), shelf.put("ink"), shelf.put("oil")
    with pytest.raises(UnknownName) as caught:
        Library([shelf.folder]).find("WATERCOLOR_V2")
    assert "no adapter 'WATERCOLOR_V2'" in str(caught.value)
    assert f"in {shelf.folder.name} (" in str(caught.value), "a folder is named, but not where it lies"
    assert "near it: Watercolour_v2" in str(caught.value)
    assert "ink" not in str(caught.value)
    with pytest.raises(UnknownName) as caught:
        Library([shelf.folder]).find("qqqqqq")
    assert "near it" not in str(caught.value)


def test_names_near_a_trainers_name_and_a_path_are_named_too(shelf: Shelf) -> None:
    shelf.put("v7", alias="Watercolour"), shelf.put("inks/dry_brush")
    for near, name in (("Watercolour", "watercolor"), ("inks/dry_brush", "ink/dry_brush")):
        with pytest.raises(UnknownName, match=f"near it: .*{near}"):
            Library([shelf.folder]).find(name)


# ---- by hash


def body_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def test_a_hash_is_of_the_whole_file_or_of_its_tensors(shelf: Shelf) -> None:
    path = shelf.put("x", alias="a", value=1.0)
    shelf.put("y", alias="a", value=2.0)
    library = Library([shelf.folder])
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert hashes_of(FileIdentity.of(path)) == (whole, body_hash(path))
    for digest in (whole, body_hash(path)):
        for name in (f"#{digest}", f"#{digest[:12]}", f"#{digest[:8]}", f"#{digest[:8].upper()}"):
            assert library.find(name).path == path


def test_what_a_file_says_of_its_own_hash_is_not_believed(shelf: Shelf, write_adapter: WriteAdapter) -> None:
    real = shelf.put("b", value=1.0)
    digest = body_hash(real)
    factors = {"lora_up.weight": torch.zeros(8, 2), "lora_down.weight": torch.ones(2, 12)}
    for name, claimed in (("a", digest), ("c", "f" * 64)):
        write_adapter(shelf.folder / f"{name}.safetensors", {"linear": factors}, {"sshs_model_hash": claimed})
    assert Library([shelf.folder]).find(f"#{digest[:12]}").path == real
    with pytest.raises(UnknownName, match=r"no adapter in .* has the hash #f{12}"):
        Library([shelf.folder]).find("#ffffffffffff")


def test_the_file_that_says_so_is_read_first_and_then_no_other(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = body_hash(shelf.put("z", value=3.0))
    for name in ("a", "b"):
        shelf.put(name)
    write = shelf._write
    factors = {"lora_up.weight": torch.full((8, 2), 3.0), "lora_down.weight": torch.ones(2, 12)}
    path = write(shelf.folder / "z.safetensors", {"linear": factors}, {"sshs_model_hash": digest})
    assert body_hash(path) == digest
    seen: list[str] = []

    def counted(identity: FileIdentity) -> tuple[str, str]:
        seen.append(Path(identity.path).stem)
        return hashes_of(identity)

    monkeypatch.setattr("lib_locon.library.hashes_of", counted)
    assert Library([shelf.folder]).find(f"#{digest[:12]}").path == path
    assert seen == ["z"]
    assert Library([shelf.folder]).find(f"#{digest[:8]}").path == path
    assert seen == ["z", "z", "a", "b"]  # so few digits could be those of two


def test_two_files_of_one_hash_are_an_error_that_names_both(shelf: Shelf) -> None:
    digest = body_hash(shelf.put("x", alias="one"))
    shelf.put("y", alias="two")
    with pytest.raises(UnknownName, match=r"could be any of these: x, y"):
        Library([shelf.folder]).find(f"#{digest[:8]}")


def test_names_come_before_hashes(shelf: Shelf) -> None:
    digest = body_hash(shelf.put("x"))
    named = shelf.put(f"#{digest[:8]}", value=2.0)
    assert Library([shelf.folder]).find(f"#{digest[:8]}").path == named


def test_what_is_no_hash(shelf: Shelf) -> None:
    digest = body_hash(shelf.put("x"))
    with pytest.raises(UnknownName, match="too short for a hash"):
        Library([shelf.folder]).find(f"#{digest[:7]}")
    for name in ("#", "#x", f"#{digest[:7]}g", digest[:12], f" #{digest[:12]}"):
        with pytest.raises(UnknownName, match="no adapter"):
            Library([shelf.folder]).find(name)


def test_a_file_that_cannot_be_read_has_no_hash(shelf: Shelf) -> None:
    path = shelf.put("x")
    digest = hashlib.sha256(b"<html>").hexdigest()
    (shelf.folder / "page.safetensors").write_bytes(b"<html>")
    library = Library([shelf.folder])
    assert library.find(f"#{body_hash(path)[:8]}").path == path
    with pytest.raises(UnknownName):
        library.find(f"#{digest[:8]}")


# ---- what changes on the disk


def test_a_new_a_moved_and_a_removed_file_are_noticed(shelf: Shelf) -> None:
    library = Library([shelf.folder])
    assert library.entries == []
    path = shelf.put("x")
    assert library.find("x").path == path
    (shelf.folder / "sub").mkdir()
    moved = path.rename(shelf.folder / "sub" / "x.safetensors")
    assert library.find("x").path == moved
    moved.unlink()
    with pytest.raises(UnknownName):
        library.find("x")


def test_a_new_alias_is_noticed(shelf: Shelf) -> None:
    library = Library([shelf.folder])
    path = shelf.put("x", alias="old")
    assert library.find("old").path == path
    os.utime(shelf.put("x", alias="renamed"), ns=(1, 1))
    assert library.find("renamed").path == path
    with pytest.raises(UnknownName):
        library.find("old")


def test_one_of_two_that_was_removed_is_no_longer_in_the_way(shelf: Shelf) -> None:
    left, gone = shelf.put("one/x"), shelf.put("two/x")
    library = Library([shelf.folder])
    assert len(library.entries) == 2
    gone.unlink()
    assert library.find("x").path == left


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert Library([tmp_path / "none"]).entries == []
    with pytest.raises(UnknownName, match="in no folder"):
        Library([]).find("x")


# ---- what is never found


@pytest.mark.parametrize("name", ["../secret", "sub/../x", "./x", "x.safetensors", "sub\\x", "*", "%2e%2e/secret", " "])
def test_a_name_is_never_made_into_a_path(shelf: Shelf, write_adapter: WriteAdapter, name: str) -> None:
    Shelf(shelf.folder.parent, write_adapter).put("secret")
    shelf.put("sub/x"), shelf.put("x2")
    with pytest.raises(UnknownName):
        Library([shelf.folder]).find(name)


def test_absolute_names_find_nothing(shelf: Shelf) -> None:
    path = shelf.put("x")
    for name in (str(path), str(path.with_suffix("")), path.with_suffix("").as_posix().lstrip("/")):
        with pytest.raises(UnknownName):
            Library([shelf.folder]).find(name)


def test_an_empty_name_finds_nothing(shelf: Shelf) -> None:
    shelf.put("x")
    with pytest.raises(UnknownName, match="no adapter ''"):
        Library([shelf.folder]).find("")


# ---- links


def test_links_to_folders_and_files_are_followed(shelf: Shelf, tmp_path: Path, write_adapter: WriteAdapter) -> None:
    elsewhere = Shelf(tmp_path / "disk2", write_adapter)
    elsewhere.put("far"), elsewhere.put("single")
    (tmp_path / "disk3").mkdir()
    (tmp_path / "disk2" / "single.safetensors").rename(tmp_path / "disk3" / "single.safetensors")
    links(shelf.folder / "more", elsewhere.folder)
    links(shelf.folder / "one.safetensors", tmp_path / "disk3" / "single.safetensors")
    assert [entry.name for entry in Library([shelf.folder]).entries] == ["more/far", "one"]


@pytest.mark.timeout(60)  # two ways round, walked to the end, are 2 to the power of 40 folders
def test_a_loop_of_links_is_walked_once(shelf: Shelf) -> None:
    shelf.put("sub/x"), shelf.put("top")
    links(shelf.folder / "sub" / "again", shelf.folder)
    links(shelf.folder / "sub" / "and again", shelf.folder)
    links(shelf.folder / "self", shelf.folder / "self")
    assert [entry.name for entry in Library([shelf.folder]).entries] == ["sub/x", "top"]
    assert Library([shelf.folder]).find("x").name == "sub/x"


def test_a_link_to_nothing_is_not_found_and_stops_nothing(shelf: Shelf) -> None:
    links(shelf.folder / "dead.safetensors", shelf.folder / "gone.safetensors")
    path = shelf.put("x", alias="living")
    library = Library([shelf.folder])
    assert library.find("living").path == path
    with pytest.raises(UnknownName):
        library.find("dead")


def test_a_broken_file_is_in_nobody_s_way(shelf: Shelf) -> None:
    for name, content in {"a": b"", "b": b"<html>", "c": b"\xff" * 99, "d": b"version https://git-lfs"}.items():
        (shelf.folder / f"{name}.safetensors").write_bytes(content)
    path = shelf.put("x", alias="good")
    assert Library([shelf.folder]).find("good").path == path


def test_one_folder_twice_is_one_folder(shelf: Shelf) -> None:
    path = shelf.put("sub/x")
    assert Library([shelf.folder, str(shelf.folder)]).find("x").path == path


# ---- from names to adapters


def loaded(cache: AdapterCache, path: Path) -> float:
    return float(cache.read(path).modules[0].layers[0].family.tensors()["lora_up.weight"][0, 0])


def test_a_file_trained_anew_under_the_same_name_is_read_anew(shelf: Shelf) -> None:
    cache = AdapterCache()
    path = shelf.put("x", value=1.0)
    os.utime(path, ns=(1_000_000, 1_000_000))
    first = cache.read(path)
    assert cache.read(path) is first
    shelf.put("x", value=2.0)
    os.utime(path, ns=(2_000_000, 2_000_000))
    assert path.stat().st_size == first.identity.size
    assert cache.read(path) is not first
    assert loaded(cache, path) == 2.0


def test_the_cache_keeps_the_adapters_used_last(shelf: Shelf) -> None:
    cache = AdapterCache(most=2)
    paths = [shelf.put(name) for name in "abc"]
    first, second = (weakref.ref(cache.read(path)) for path in paths[:2])
    cache.read(paths[0])
    cache.read(paths[2])
    assert second() is None
    assert cache.read(paths[0]) is first()
    cache.keep(1)
    assert cache.read(paths[0]) is first()
    cache.keep(0)
    assert first() is None


def test_what_is_in_use_is_not_read_anew_however_few_are_kept(shelf: Shelf) -> None:
    cache, path = AdapterCache(most=0), shelf.put("x")
    used = cache.read(path)
    assert cache.read(path) is used
    gone = weakref.ref(used)
    del used
    assert gone() is None


def test_what_is_known_waits_for_no_file_that_is_read(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, slow, known = AdapterCache(), shelf.put("slow"), shelf.put("known")
    held, reading, go = cache.read(known), threading.Event(), threading.Event()
    read: list[Path] = []

    def slowly(path: Path, *, allow_pickle: bool) -> Adapter:
        read.append(path)
        reading.set()
        assert go.wait(30)
        return read_adapter(path, allow_pickle=allow_pickle)

    monkeypatch.setattr("lib_locon.resolve.read_adapter", slowly)
    with ThreadPoolExecutor(3) as pool:
        both = [pool.submit(cache.read, slow) for _ in range(2)]
        assert reading.wait(30)
        assert pool.submit(lambda: (cache.keep(4), cache.read(known))[1]).result(30) is held
        go.set()
        assert both[0].result(30) is both[1].result(30)
    assert read == [slow]


def test_a_file_that_goes_away_is_an_error_in_spite_of_the_cache(shelf: Shelf) -> None:
    cache = AdapterCache()
    path = shelf.put("x")
    cache.read(path)
    path.unlink()
    with pytest.raises(FileError, match="cannot be read"):
        cache.read(path)


def test_a_tag_that_fails_is_left_out_alone(shelf: Shelf) -> None:
    shelf.put("good")
    (shelf.folder / "broken.safetensors").write_bytes(b"<!DOCTYPE html>")
    requests = parse_prompt("<lora:god:1><lora:good:0.5:0.25:1><lora:broken:1>").requests
    uses, problems = resolve(requests, Library([shelf.folder]), AdapterCache())
    assert [(use.name, use.strengths, use.dyn) for use in uses] == [("good", Strengths(0.5, 0.25), 1)]
    unknown, broken = map(str, problems)
    assert "no adapter 'god'" in unknown
    assert "near it: good" in unknown
    assert "'god' was skipped" in unknown
    assert "is a web page" in broken
    assert "'broken' was skipped" in broken


def test_the_uses_of_any_moment_share_the_adapters_that_were_read_once(shelf: Shelf) -> None:
    path = shelf.put("x")
    requests = parse_prompt("<lora:x:1:0@0,1@1><lora:x:0.5:hr=0.25>").requests
    found, problems = find(requests, Library([shelf.folder]), AdapterCache())
    path.unlink()
    assert not problems
    assert found.scheduled
    first, later, hires = found.at(), found.at(2, 6), found.at(2, 6, hires=True)
    assert [use.strengths.unet for use in first] == [0, 0.5]
    assert [use.strengths.unet for use in later] == [0.5, 0.5]
    assert [use.strengths.unet for use in hires] == [0.5, 0.25]
    assert len({id(use.adapter) for uses in (first, later, hires) for use in uses}) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[Errno 2] No such file or directory: '/home/a user/x/y.bin'", "[Errno 2] No such file or directory: 'y.bin'"),
        ("C:\\Users\\me\\x.pt is bad", "x.pt is bad"),
        ("in 'C:\\\\Users\\\\me\\\\x.pt'", "in 'x.pt'"),
        ("d:/a/b.pt is bad", "b.pt is bad"),
        ("\\\\server\\share\\b c\\x.bin is bad", "x.bin is bad"),
        ("'/a/b' (/mnt/d/e)", "'b' (e)"),
        ("~/x/y", "y"),
        (
            "sub/x.safetensors: 264/264 layers, te/unet, and/or 1/2",
            "sub/x.safetensors: 264/264 layers, te/unet, and/or 1/2",
        ),
        ("see https://a.example/b/c", "see https://a.example/b/c"),
        ("", ""),
    ],
)
def test_full_paths_in_what_others_wrote_are_cut_down(text: str, shown: str) -> None:
    assert without_folders(text) == shown
