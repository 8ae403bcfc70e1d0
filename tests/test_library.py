"""Names → files: which one wins, what is ambiguous, what is noticed without a restart, and what is never found."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
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


NFD, NFC = "nai\u0308ve", "na\u00efve"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("LumaTune ", "LumaTune "), ("LumaTune ", "LumaTune"), (" lead", " lead"), (" lead", "lead "),
        ("plain", " plain "), ("plain", "\tplain\n"), ("my folder /x", "my folder/x"), ("sub/ x", "sub / x"),
        (NFD, NFC), (NFC, NFD), (f"{NFD} /x", f"{NFC}/ x"), ("a:b", "a%3Ab"), ("a:b", "a%3ab"), ("a>b", " a%3Eb "),
        ("#12345678", "#12345678"), ("#zz", " #zz "), ("50%25", "50%25"), ("50%", "50%25"), ("half \udcff", "half %FF"),
        ("\xa0x\u3000", "x"), ("a=b", "a=b"), ("[x] (y)|z, {w}", "[x] (y)|z, {w}"), ("te=1", "te=1"),
    ],
)  # fmt: skip
def test_a_name_is_found_in_other_spellings(shelf: Shelf, file: str, name: str) -> None:
    (shelf.folder / file).parent.mkdir(parents=True, exist_ok=True)
    path = shelf.put(file)
    shelf.put("another")
    assert Library([shelf.folder]).find(name).path == path
    (request,) = parse_prompt(f"<lora:{name}:0.5>").requests
    assert Library([shelf.folder]).find(request.called).path == path
    assert request.name == name.strip()
    assert parse_prompt(str(request)).requests == [request]


def test_the_exact_name_wins_over_other_spellings(shelf: Shelf) -> None:
    names = ("x", "x ", " x", NFD, NFC, "a:b", "a%3Ab")
    paths = [shelf.put(name) for name in names]
    library = Library([shelf.folder])
    assert [library.find(name).path for name in names] == paths
    with pytest.raises(UnknownName, match=r"could be any of these: ' x', 'x', 'x '"):
        library.find("  x  ")


def test_the_exact_alias_wins_over_another_spelling_of_a_file(shelf: Shelf) -> None:
    shelf.put(NFD)
    path = shelf.put("v7", alias=NFC)
    shelf.put("v8", alias=" Some Style ")
    library = Library([shelf.folder])
    assert library.find(NFC).path == path
    assert library.find("Some Style").name == library.find(" Some Style ").name == "v8"


def test_names_that_look_alike_are_shown_with_their_difference(shelf: Shelf) -> None:
    one, other = "e\u0301\u00e9", "\u00e9e\u0301"
    shelf.put(one), shelf.put(other)
    with pytest.raises(UnknownName) as caught:
        Library([shelf.folder]).find("\u00e9\u00e9")
    assert r"'e\u0301\xe9'" in str(caught.value)
    assert r"'\xe9e\u0301'" in str(caught.value)


def test_no_header_is_read_for_a_file_that_is_named_with_blanks(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shelf.put("plain")
    monkeypatch.setattr("lib_locon.library._written", None)
    assert Library([shelf.folder]).find(" plain ").path == path


# ---- what is there in the place of an adapter


@pytest.mark.parametrize(
    ("file", "name", "says"),
    [
        ("old.pt", "old", ": old.pt is there, but it is a pickled file, which can hold a program"),
        ("sub/old.CKPT", "old", ": sub/old.CKPT is there, but it is a pickled file"),
        ("sub/old.bin", "sub/old", "pickled file"),
        ("old.pth", "old", "of the pickled files only those that end in .pt, .ckpt or .bin"),
        ("big.gguf", "big", "GGUF files are not read here"),
        ("x.zip", "x", "is an archive: unpack it"),
        ("x.safetensors.part", "x", "a download that has not finished"),
        ("x.crdownload", " x ", "a download that has not finished"),
        ("x.safetensors.txt", "x", "take the .txt off"),
        ("x.onnx", "x", "is for another program"),
        ("x.json", "x", "the weights that it is about are not"),
        ("x.preview.png", "x", "the weights that it is about are not"),
        (f"{NFD}.pt", NFC, "pickled file"),
        ("peft/x.safetensors", "peft", ": that is a folder; name the file in it, such as 'peft/x'"),
    ],
)  # fmt: skip
def test_what_is_there_of_that_name_and_cannot_be_used(shelf: Shelf, file: str, name: str, says: str) -> None:
    (shelf.folder / file).parent.mkdir(exist_ok=True)
    (shelf.folder / file).write_bytes(b"x")
    library = Library([shelf.folder])
    with pytest.raises(UnknownName) as caught:
        library.find(name)
    assert f"no adapter {name.strip()!r} in {shelf.folder.name}: " in str(caught.value)
    assert says in str(caught.value)
    with pytest.raises(UnknownName) as caught:
        library.find("quite another")
    assert str(caught.value) == f"there is no adapter 'quite another' in {shelf.folder.name}"


def test_the_most_telling_of_several_files_is_named(shelf: Shelf) -> None:
    for name in ("x.png", "x.json", "x.pt", "x.safetensors.part"):
        (shelf.folder / name).write_bytes(b"x")
    with pytest.raises(UnknownName, match=r"x\.pt is there, but it is a pickled file"):
        Library([shelf.folder]).find("x")


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
    for name in ("#", "#x", f"#{digest[:7]}g", digest[:12], f"# {digest[:12]}"):
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


def test_folders_deeper_than_calls_may_nest(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """1500 folders in each other, with short names and with long ones: some of their paths no system takes."""
    shelf.put("top")
    for name, found in (("d", "d/" * 1500 + "x"), ("long" * 20, None)):
        with monkeypatch.context() as patched:
            patched.chdir(shelf.folder)
            for depth in range(1500):
                Path(name).mkdir()
                os.chdir(name)
                if depth == 9:
                    shutil.copy(shelf.folder / "top.safetensors", "ten.safetensors")
            shutil.copy(shelf.folder / "top.safetensors", "x.safetensors")
        started = time.process_time()
        library = Library([shelf.folder])
        names = [entry.name for entry in library.entries]
        assert time.process_time() - started < 5
        assert {"top", f"{name}/" * 10 + "ten"} <= set(names)
        assert found is None or found in names
        assert library.find("top").path == shelf.folder / "top.safetensors"
        with pytest.raises(UnknownName):
            library.find("nothing")
        subprocess.run(["rm", "-rf", shelf.folder / name], check=True)  # shutil recurses


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="who may do all is kept out of nothing")
def test_a_folder_that_nobody_may_look_into(shelf: Shelf) -> None:
    shelf.put("x"), shelf.put("closed/y")
    (shelf.folder / "closed").chmod(0)
    try:
        assert [entry.name for entry in Library([shelf.folder]).entries] == ["x"]
    finally:
        (shelf.folder / "closed").chmod(0o700)


@pytest.mark.parametrize("when", ["opened", "listed"])
def test_a_folder_that_fails_hides_no_other(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    shelf.put("a/x"), shelf.put("b/y"), shelf.put("z")
    scandir = os.scandir

    class Failing:
        def __init__(self, path: str) -> None:
            self.found = scandir(path)

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            self.found.close()

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            yield from self.found
            raise OSError("the disk went away")

    def failing(path: str) -> object:
        if not str(path).endswith("a"):
            return scandir(path)
        if when == "opened":
            raise PermissionError(path)
        return Failing(path)

    monkeypatch.setattr(os, "scandir", failing)
    names = [entry.name for entry in Library([shelf.folder]).entries]
    assert names == (["a/x"] if when == "listed" else []) + ["b/y", "z"]


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
