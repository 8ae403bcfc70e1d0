"""Files and texts that strangers made: opened, written and printed without harm."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lib_locon.__main__ import _signals_interrupt
from lib_locon.cards import Cards, check_place
from lib_locon.errors import FileError
from lib_locon.files.pristine import CheckpointSource
from lib_locon.files.reader import Entry, SafetensorsFile
from lib_locon.files.writer import write_safetensors
from lib_locon.hosts import _escape
from lib_locon.library import Library
from lib_locon.prompt.request import Problem, Strengths
from lib_locon.report import AdapterReport
from lib_locon.terminal import printable
from lib_locon.user_metadata import MAX_USER_METADATA, read_user_metadata, save_user_metadata

EVIL = "style\x1b]0;title\x07\u202egnp.\r\nfake line\ud800"
FACTORS = {"lora_unet_a.lora_up.weight": torch.ones(4, 1), "lora_unet_a.lora_down.weight": torch.ones(1, 4)}

# ---- what lies beside an adapter

STRANGE: dict[str, Callable[[Path], object]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere.json"),
    "too long": lambda path: path.write_text(json.dumps({"notes": "x" * MAX_USER_METADATA})),
    "too deep": lambda path: path.write_text('{"a":' * 5000),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{\x00}\x00"),
    "no object": lambda path: path.write_text("[1]"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices with names are not there")
@pytest.mark.parametrize("kind", STRANGE)
def test_whatever_is_in_the_place_of_notes_holds_nobody_up_and_is_not_written_over(kind: str, tmp_path: Path) -> None:
    save_file(FACTORS, tmp_path / "x.safetensors")
    STRANGE[kind](tmp_path / "x.json")
    STRANGE[kind](tmp_path / "adapter_config.json")
    started = time.monotonic()
    (card,) = Cards(Library([tmp_path]), patience=20).all()
    assert card.facts is not None and card.facts.families == ("LoRA",)
    assert card.user.raw == ({} if kind != "no object" else card.user.raw)
    if kind == "a link to nothing":  # inside the folder: it is made
        save_user_metadata(tmp_path / "x.safetensors", {"notes": "n"})
        assert read_user_metadata(tmp_path / "x.safetensors").notes == "n"
    else:
        with pytest.raises(FileError, match=r"x\.json is"):
            save_user_metadata(tmp_path / "x.safetensors", {"notes": "n"})
    assert time.monotonic() - started < 15


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are not there")
def test_a_picture_is_a_file(tmp_path: Path) -> None:
    save_file(FACTORS, tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "x.preview.png").mkdir()
    (tmp_path / "x.webp").write_bytes(b"RIFF")
    (card,) = Cards(Library([tmp_path]), patience=20).all()
    assert card.preview == tmp_path / "x.webp"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are not there")
def test_a_checkpoint_in_whose_place_a_pipe_is_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_file({"a": torch.ones(4)}, path)
    source = CheckpointSource(SafetensorsFile(path), {"a": "a"}, hold=False)
    path.unlink()
    os.mkfifo(path)
    assert not source.unchanged()
    with pytest.raises(FileError, match="it is no file but a pipe"):
        source.read("a", torch.empty(4))


def test_notes_with_the_mark_of_windows_editors_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"notes": "n", "own": 1}).encode())
    save_user_metadata(tmp_path / "x.safetensors", {"description": "d"})
    read = read_user_metadata(tmp_path / "x.safetensors")
    assert (read.notes, read.description, read.raw["own"]) == ("n", "d", 1)


def test_notes_that_could_not_be_read_again_are_not_saved(tmp_path: Path) -> None:
    save_user_metadata(tmp_path / "x.safetensors", {"activation text": "a cat"})
    with pytest.raises(FileError, match=f"it would have .* bytes, and {MAX_USER_METADATA} are the most"):
        save_user_metadata(tmp_path / "x.safetensors", {"notes": "x" * MAX_USER_METADATA})
    assert read_user_metadata(tmp_path / "x.safetensors").activation_text == "a cat"


@pytest.mark.parametrize("there", [True, False])
def test_no_link_leads_a_save_out_of_the_adapter_folders(there: bool, tmp_path: Path) -> None:
    folder, outside = tmp_path / "Lora", tmp_path / "config.json"
    folder.mkdir()
    if there:
        outside.write_text("{}")
    (folder / "x.json").symlink_to(outside)
    with pytest.raises(FileError, match=r"x\.json is a link that leads out of the adapter folder"):
        save_user_metadata(folder / "x.safetensors", {"notes": "n"})
    assert outside.exists() == there and (not there or outside.read_text() == "{}")


def test_links_inside_the_adapter_folders_are_followed(tmp_path: Path) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "Lora"
    (disk / "sub").mkdir(parents=True)
    folder.symlink_to(disk)  # the folder itself is on another disk
    (disk / "notes.json").write_text("{}")
    (disk / "sub" / "x.json").symlink_to(disk / "notes.json")
    save_user_metadata(folder / "sub" / "x.safetensors", {"notes": "n"}, [folder])
    assert json.loads((disk / "notes.json").read_text()) == {"notes": "n"}
    with pytest.raises(FileError, match="leads out"):
        save_user_metadata(folder / "sub" / "x.safetensors", {"notes": "m"})


def test_a_picture_is_written_over_pictures_alone(tmp_path: Path) -> None:
    folder, picture = tmp_path / "Lora", tmp_path / "Lora" / "x.png"
    folder.mkdir()
    save_file(FACTORS, folder / "x.safetensors")
    (folder / "other.png").write_bytes(b"")
    check_place(picture, [folder])
    for there, said in (("other.png", ""), ("x.safetensors", "is a link to x.safetensors"), ("../y.png", "leads out")):
        picture.symlink_to(there)
        with pytest.raises(FileError, match=said) if said else nullcontext():
            check_place(picture, [folder])
        picture.unlink()
    picture.mkdir()
    with pytest.raises(FileError, match="is no file but a folder, a pipe or a device"):
        check_place(picture, [folder])


def test_halves_of_letters_that_others_wrote_stay(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"own": "\\ud83d", "notes": "é"}', encoding="utf8")
    save_user_metadata(tmp_path / "x.safetensors", {"notes": "ü"})
    assert json.loads(file.read_text("utf8")) == {"own": "\ud83d", "notes": "ü"}


def test_a_key_that_is_there_twice_is_not_made_one(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"notes": "long", "own": {"a": 1, "a": 2}}')
    assert read_user_metadata(tmp_path / "x.safetensors").notes == "long"
    with pytest.raises(FileError, match="it has 'a' more than once"):
        save_user_metadata(tmp_path / "x.safetensors", {"notes": "n"})
    assert file.read_text() == '{"notes": "long", "own": {"a": 1, "a": 2}}'


# ---- terminals


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable(EVIL) == "style\\x1b]0;title\\x07\\u202egnp.\\r\\nfake line\\ud800"
    assert printable("a\nb\x1b", lines=True) == "a\nb\\x1b"
    assert printable("naïve 名前 🎨") == "naïve 名前 🎨"


def test_log_lines_are_escaped() -> None:
    record = logging.LogRecord("lib_locon", logging.INFO, "", 1, "%s is here", (EVIL,), None)
    assert _escape(record)
    assert record.getMessage() == f"{printable(EVIL)} is here"


def test_a_logged_error_is_escaped_too() -> None:
    try:
        raise RuntimeError(EVIL)
    except RuntimeError:
        record = logging.LogRecord("lib_locon", logging.ERROR, "", 1, "failed", (), sys.exc_info())
    _escape(record)
    text = logging.Formatter().format(record)
    assert "Traceback" in text and "style\\x1b]0;title" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_a_name_begins_no_line_of_its_own() -> None:
    problem = Problem(f"no {EVIL}", f"<lora:{EVIL}:x>", len(EVIL) + 7)
    first, tag, caret = str(problem).split("\n")
    assert (first, tag) == (f"no {printable(EVIL)}", f"  <lora:{printable(EVIL)}:x>")
    assert tag[caret.index("^")] == "x", "the caret is under the place"
    record = logging.LogRecord("lib_locon", logging.INFO, "", 1, "%s", (problem,), None)
    assert _escape(record) and record.getMessage() == str(problem)
    assert "\n" not in str(AdapterReport(EVIL, Strengths.both(1), {}, 0, 1, (), (EVIL,)))


@pytest.mark.parametrize("encoding", ["utf8", "ascii"])
def test_the_command_line_prints_no_control_characters(encoding: str, tmp_path: Path) -> None:
    name = EVIL.replace("\ud800", "é名")
    try:
        save_file(FACTORS, tmp_path / f"{name}.safetensors", {"ss_output_name": name})
    except OSError:
        pytest.skip("this file system has no such names")
    save_file({**FACTORS, name: torch.ones(1)}, tmp_path / "k.safetensors", {"ss_output_name": name})
    (tmp_path / f"b{name}.safetensors").write_bytes(b"12")
    save_file({"w": torch.ones(1)}, tmp_path / "base.ckpt.safetensors")
    bake = ["bake", str(tmp_path / "base.ckpt.safetensors"), "--prompt", "<lora:style:1>", "--lora-dir", str(tmp_path)]
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    commands = (
        ["inspect", *files],
        ["inspect", "--json", *files],
        [*bake, "-o", str(tmp_path / "o.safetensors")],
        ["inspect", "x", f"--{name.replace(' ', '')}"],  # as `inspect *` would give it
        [name],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "lib_locon", *command], capture_output=True, check=False,
            env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        )  # fmt: skip
        assert done.returncode in (0, 2) and b"Traceback" not in done.stderr
        for output in (done.stdout, done.stderr):
            text = output.decode(encoding)
            assert all(char.isprintable() or char == "\n" for char in text), text
            assert "\nfake line" not in text


def test_the_headless_webui_prints_no_control_characters(tmp_path: Path) -> None:
    save_file({"x.alpha": torch.ones(1)}, tmp_path / "a.safetensors")
    evil = EVIL.replace("\ud800", "é")
    commands = (
        ["--prompt", f"cat <lora:{evil}:x>", "--steps", "1", "--json", "--lora-dir", str(tmp_path)],
        [f"--{evil.replace(' ', '')}"],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "extensions_builtin_shim", *command], capture_output=True, check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        )  # fmt: skip
        text = (done.stdout + done.stderr).decode("ascii")
        assert printable("\x1b]0;title") in text and "Traceback" not in text
        assert all(char.isprintable() or char == "\n" for char in text), text
        assert "\nfake" not in text and done.stderr.count(b"title") == 1, "it is said once"


# ---- a bake that is stopped

ENTRY = {"a": Entry("F32", (4,), 0, 16)}


def written(path: Path) -> None:
    write_safetensors(path, ENTRY, {"mark": "x"}, lambda key: [b"\0" * 16], "mark")


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    out, part = tmp_path / "o.safetensors", tmp_path / "o.safetensors.part"
    written(out)
    for left in (out.read_bytes()[:-3], b""):
        part.write_bytes(left)
        written(out)
        assert not part.exists() and out.stat().st_size > 16


@pytest.mark.parametrize("content", [b"somebody's download", b"\x10\0\0\0\0\0\0\0{}              "])
def test_somebody_elses_file_of_that_name_is_kept(content: bytes, tmp_path: Path) -> None:
    part = tmp_path / "o.safetensors.part"
    part.write_bytes(content)
    with pytest.raises(FileError, match="and not from such a run: remove it first"):
        written(tmp_path / "o.safetensors")
    assert part.read_bytes() == content


def test_no_link_leads_a_partial_file_elsewhere(tmp_path: Path) -> None:
    """An empty file, or one that was baked, would be taken for what a killed run left, and emptied."""
    precious, part = tmp_path / "precious.safetensors", tmp_path / "o.safetensors.part"
    written(precious)
    before = precious.read_bytes()
    part.symlink_to(precious)
    with pytest.raises(FileError, match="and is no file: remove it first"):
        written(tmp_path / "o.safetensors")
    assert precious.read_bytes() == before and part.is_symlink()


def test_where_a_drive_has_no_locks_a_partial_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    written(tmp_path / "o.safetensors")
    part = tmp_path / "o.safetensors.part"
    part.write_bytes((tmp_path / "o.safetensors").read_bytes()[:-3])  # of another run, for all that can be told
    with pytest.raises(FileError, match="does not tell if another run is writing it: remove it if none is"):
        written(tmp_path / "o.safetensors")
    assert part.exists()


def test_a_partial_file_is_read_through_the_handle_that_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows a locked file can be read through no other handle."""
    part, opened = tmp_path / "o.safetensors.part", []
    part.write_bytes(b"")
    open_ = Path.open

    def counting(path: Path, *arguments: Any, **named: Any) -> Any:
        file = open_(path, *arguments, **named)
        opened.append(path)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", counting)
        written(tmp_path / "o.safetensors")
    assert opened == [part]


def test_two_runs_never_write_one_file(tmp_path: Path) -> None:
    said = []

    def data(key: str) -> list[bytes]:
        with pytest.raises(FileError, match="another run is writing") as caught:
            written(tmp_path / "o.safetensors")
        said.append(caught.value)
        return [b"\1" * 16]

    write_safetensors(tmp_path / "o.safetensors", ENTRY, {"mark": "x"}, data, "mark")
    assert said and (tmp_path / "o.safetensors").read_bytes().endswith(b"\1" * 16)
    assert not (tmp_path / "o.safetensors.part").exists()


SLOW_BAKE = """
import sys, time
from lib_locon import bake
bake.patched = lambda *_: time.sleep(120)  # in the middle of the file, for as long as it takes to be told to end
from lib_locon.__main__ import main
sys.exit(main(["bake", "base.safetensors", "--prompt", "<lora:b:1>", "--lora-dir", "L", "-o", "o.safetensors"]))
"""


@pytest.mark.parametrize("again", ["SIGINT", "SIGTERM"])
def test_only_the_first_signal_interrupts(again: str) -> None:
    """A second one would come into the removal of the partial file."""
    before, removed = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(KeyboardInterrupt), _signals_interrupt():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(getattr(signal, again))
            removed.append(True)
    assert removed and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_bake_that_is_told_to_end_leaves_no_partial_file(name: str, tmp_path: Path) -> None:
    save_file({"model.diffusion_model.a.weight": torch.zeros(4, 4)}, tmp_path / "base.safetensors")
    (tmp_path / "L").mkdir()
    save_file(FACTORS, tmp_path / "L" / "b.safetensors")
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW_BAKE], cwd=tmp_path, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    part = tmp_path / "o.safetensors.part"
    while running.poll() is None and not part.exists():
        time.sleep(0.01)
    time.sleep(0.3)  # it is written, and the sum is waited for
    running.send_signal(getattr(signal, name))
    _, error = running.communicate(timeout=60)
    assert (running.returncode, b"interrupted" in error) == (2, True), error
    assert not part.exists() and not (tmp_path / "o.safetensors").exists()
