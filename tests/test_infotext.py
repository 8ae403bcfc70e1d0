"""What images say of their adapters, and what becomes of it when their text is pasted."""

from __future__ import annotations

import hashlib
import html
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from extensions_builtin_shim.launch import OURS, launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.hosts import addnet, infotext, search
from lib_locon.hosts.infotext import Infotext, written_hashes
from lib_locon.report import Report
from tests import random_adapters

put_modules_on_path()

SWAPPING_SCRIPT = """
from modules import script_callbacks

def infotext_pasted(infotext, fields):
    fields["Prompt"] = "swapped by the built-in"

script_callbacks.on_infotext_pasted(infotext_pasted)
"""


def body_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two adapters, without the names that their trainer gave them: a renamed one must not be found by that."""
    folder = tmp_path / "Lora"
    folder.mkdir()
    for name in ("tiny_lora.safetensors", "tiny_loha.safetensors"):
        save_file(load_file(random_adapters.folder() / name), folder / name)
    return folder


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    running: list[Any] = []

    def run(**options: Any) -> Any:
        running.append(launch(lora_dir=folder, make_model=TinySD.random, data_dir=tmp_path / "data", **options))
        return running[-1]

    yield run
    for webui in running:
        webui.close()


def fields(text: str) -> dict[str, str]:
    from modules import infotext_utils

    return infotext_utils.parse_generation_parameters(text)


def paste(text: str) -> dict[str, str]:
    from modules import infotext_utils

    return infotext_utils.paste_fields(text)


def text_with(prompt: str, hashes: str = "") -> str:
    quoted = f', Lora hashes: "{hashes}"' if hashes else ""
    return f"{prompt}\nSteps: 1, Sampler: DDIM, CFG scale: 5.0, Seed: 1{quoted}"


# ---- what is written


def test_hashes_are_written_as_the_built_in_writes_them(start: Callable[..., Any], folder: Path) -> None:
    run = start().generate("a cat <lora:tiny_lora:0.5><lyco:tiny_loha:1>", steps=1)
    first, second = (body_hash(folder / f"{name}.safetensors")[:12] for name in ("tiny_lora", "tiny_loha"))
    assert f'Lora hashes: "tiny_lora: {first}, tiny_loha: {second}"' in run.infotext
    assert run.infotext.count("Lora hashes") == 1


def test_a_hash_is_computed_and_not_believed(start: Callable[..., Any], folder: Path) -> None:
    path = folder / "liar.safetensors"
    save_file(load_file(folder / "tiny_lora.safetensors"), path, {"sshs_model_hash": "f" * 64})
    run = start().generate("<lora:liar:1>", steps=1)
    assert fields(run.infotext)["Lora hashes"] == f"liar: {body_hash(path)[:12]}"


def test_what_was_applied_is_written(start: Callable[..., Any], folder: Path) -> None:
    run = start().generate("a cat <lora:tiny_lora:te=0.5:unet=1><lora:gone:1><lora:tiny_loha:2>", steps=1)
    (lora, loha) = run.adapters
    assert fields(run.infotext)["Locon"] == (
        f"tiny_lora at te 0.5, unet 1: {lora.used}/{lora.total} layers; tiny_loha at 2: {loha.used}/{loha.total} layers"
    )
    assert "gone" not in run.infotext.splitlines()[-1]


def test_a_name_with_marks_of_the_text_in_it(start: Callable[..., Any], folder: Path) -> None:
    path = shutil.copy(folder / "tiny_lora.safetensors", folder / 'a, "b".safetensors')
    run = start().generate('<lora:a, "b":1>', steps=1)
    assert fields(run.infotext)["Lora hashes"] == f'a "b": {body_hash(path)[:12]}'
    assert paste(run.infotext)["Prompt"] == '<lora:a, "b":1>'


def test_without_adapters_nothing_is_written(start: Callable[..., Any]) -> None:
    webui = start()
    plain = webui.generate("a cat", steps=1).infotext
    webui.generate("a cat <lora:tiny_lora:1>", steps=1)
    assert webui.generate("a cat", steps=1).infotext == plain
    assert "Locon" not in plain and "Lora" not in plain


def test_each_batch_has_its_own(start: Callable[..., Any]) -> None:
    from modules.processing import StableDiffusionProcessingTxt2Img, process_images

    start()
    prompts = ["<lora:tiny_lora:1>", "none", "<lora:tiny_loha:1>"]
    p = StableDiffusionProcessingTxt2Img(prompt=prompts, steps=1, seed=1, n_iter=3)  # type: ignore[arg-type]
    first, second, third = map(fields, process_images(p).infotexts)
    assert first["Lora hashes"].startswith("tiny_lora: ") and first["Locon"].startswith("tiny_lora at 1")
    assert "Lora hashes" not in second and "Locon" not in second
    assert third["Lora hashes"].startswith("tiny_loha: ") and "tiny_lora" not in third["Locon"]


def test_the_options_switch_it_off(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    shared.opts.set("lora_add_hashes_to_infotext", False)
    text = webui.generate("<lora:tiny_lora:1>", steps=1).infotext
    assert "Lora hashes" not in text and "Locon: " in text
    shared.opts.set("locon_infotext", False)
    assert "Locon" not in webui.generate("<lora:tiny_lora:1>", steps=1).infotext


class Job:
    """Of the host's, with a hires pass."""

    def __init__(self) -> None:
        self.extra_generation_params: dict[str, Any] = {"Denoising strength": 0.5}


def test_the_hires_pass_adds_to_the_first(start: Callable[..., Any], folder: Path) -> None:
    webui = start()
    from lib_locon.hosts import a1111

    used = {}
    for name in ("tiny_lora", "tiny_loha"):
        report_of = webui.generate(f"<lora:{name}:1>", steps=1)
        used[name] = (a1111._webui.used, a1111.last_report(), report_of)
    writer = Infotext(lambda: a1111._services.hashes().bodies)

    def write(p: Any, name: str, *, hires: bool) -> None:
        uses, report, _ = used[name]
        writer.write(p, uses, report, hires=hires, hashes=True, applied=True)

    both = {body_hash(folder / f"{name}.safetensors")[:12] for name in used}
    for order in ((False, True), (True, False)):  # with little memory the host activates the second pass's tags first
        p = Job()
        for hires in order:
            write(p, "tiny_loha" if hires else "tiny_lora", hires=hires)
        said = p.extra_generation_params
        assert {part.rpartition(": ")[2] for part in said["Lora hashes"].split(", ")} == both
        assert said["Locon"].startswith("tiny_lora") and said["Locon hires"].startswith("tiny_loha")
        write(p, "tiny_lora", hires=True)
        assert "Locon hires" not in said and "tiny_loha" not in said["Lora hashes"]
        assert said["Denoising strength"] == 0.5
        writer.write(p, (), Report(), hires=True, hashes=True, applied=True)
        assert said["Locon hires"] == "no adapter" and said["Locon"].startswith("tiny_lora")


# ---- a hash that takes long


def test_an_image_does_not_wait_long_for_a_hash(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from modules import script_callbacks

    may_end, read = threading.Event(), []
    compute = search.body_hash
    monkeypatch.setattr(search, "body_hash", lambda file: (may_end.wait(60), read.append(file), compute(file))[2])
    monkeypatch.setattr(infotext, "PATIENCE", 0.05)
    webui = start()
    began = time.monotonic()
    first = webui.generate("<lora:tiny_lora:1>", steps=2)
    assert time.monotonic() - began < 30
    assert "Lora hashes" not in first.infotext and "Locon: " in first.infotext

    def at_a_step(_: Any) -> None:
        may_end.set()
        time.sleep(0.3)

    script_callbacks.on_cfg_denoiser(at_a_step)
    assert "Lora hashes" in webui.generate("<lora:tiny_lora:1>", steps=3).infotext
    webui.generate("<lora:tiny_lora:1>", steps=1)
    assert len(read) == 1


def test_a_hash_is_kept_on_disk(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    webui = start()
    before = webui.generate("<lora:tiny_lora:1>", steps=1).infotext
    webui.close()
    monkeypatch.setattr(search, "body_hash", lambda file: 1 / 0)
    assert start().generate("<lora:tiny_lora:1>", steps=1).infotext == before


# ---- what is pasted


def test_pasting_restores(start: Callable[..., Any]) -> None:
    webui = start()
    prompt = "a cat <lora:tiny_lora:0.5> and <lora:tiny_loha:te=0:unet=1:stop=3>"
    run = webui.generate(prompt, seed=7, steps=4)
    pasted = paste(run.infotext)
    assert pasted["Prompt"] == prompt
    again = webui.generate(pasted["Prompt"], seed=int(pasted["Seed"]), steps=int(pasted["Steps"]))
    assert again.image.tobytes() == run.image.tobytes()
    assert again.infotext == run.infotext


def test_a_renamed_file_is_found_by_its_hash_and_said(
    start: Callable[..., Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    webui = start()
    text = webui.generate("<lora:tiny_lora:0.5:stop=3> x <lyco:tiny_lora:1> <lora:tiny_loha:1>", steps=1).infotext
    (folder / "sub").mkdir()
    (folder / "tiny_lora.safetensors").rename(folder / "sub" / "renamed.safetensors")
    with caplog.at_level("INFO", "lib_locon"):
        assert paste(text)["Prompt"] == "<lora:renamed:0.5:stop=3> x <lyco:renamed:1> <lora:tiny_loha:1>"
    assert caplog.text.count("'tiny_lora' is not here; the file with the same hash is 'renamed'") == 1


def test_a_renamed_file_whose_name_is_not_its_own_is_written_with_its_folder(
    start: Callable[..., Any], folder: Path
) -> None:
    webui = start()
    text = webui.generate("<lora:tiny_lora:1>", steps=1).infotext
    (folder / "sub").mkdir()
    (folder / "tiny_lora.safetensors").rename(folder / "sub" / "tiny_loha.safetensors")
    assert paste(text)["Prompt"] == "<lora:sub/tiny_loha:1>"


def test_several_files_with_the_hash_swap_nothing(
    start: Callable[..., Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    webui = start()
    text = webui.generate("<lora:tiny_lora:1>", steps=1).infotext
    save_file(load_file(folder / "tiny_lora.safetensors"), folder / "one.safetensors", {"a": "1"})
    save_file(load_file(folder / "tiny_lora.safetensors"), folder / "two.safetensors", {"a": "2"})
    (folder / "tiny_lora.safetensors").unlink()
    assert body_hash(folder / "one.safetensors") == body_hash(folder / "two.safetensors")
    with caplog.at_level("INFO", "lib_locon"):
        assert paste(text)["Prompt"] == "<lora:tiny_lora:1>"
    assert "several files have its hash: one, two" in caplog.text


def test_a_file_that_claims_the_hash_is_not_taken(
    start: Callable[..., Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    webui = start()
    text = webui.generate("<lora:tiny_lora:1>", steps=1).infotext
    claim = {"sshs_model_hash": body_hash(folder / "tiny_lora.safetensors")}
    save_file(load_file(folder / "tiny_loha.safetensors"), folder / "liar.safetensors", claim)
    (folder / "tiny_lora.safetensors").unlink()
    with caplog.at_level("INFO", "lib_locon"):
        assert paste(text)["Prompt"] == "<lora:tiny_lora:1>"
    assert "'tiny_lora' is not here, and no file has its hash" in caplog.text


def test_another_file_of_the_same_name_gives_way_to_the_one_that_made_the_image(
    start: Callable[..., Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    webui = start()
    first = webui.generate("<lora:tiny_lora:1>", steps=1)
    shutil.copy(folder / "tiny_lora.safetensors", folder / "old.safetensors")
    shutil.copy(folder / "tiny_loha.safetensors", folder / "tiny_lora.safetensors")
    with caplog.at_level("INFO", "lib_locon"):
        pasted = paste(first.infotext)["Prompt"]
    assert pasted == "<lora:old:1>"
    assert "'tiny_lora' here is another file" in caplog.text
    assert webui.generate(pasted, steps=1).image.tobytes() == first.image.tobytes()


def test_another_file_of_the_same_name_stays_where_the_right_one_is_gone(
    start: Callable[..., Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    webui = start()
    text = webui.generate("<lora:tiny_lora:1>", steps=1).infotext
    shutil.copy(folder / "tiny_loha.safetensors", folder / "tiny_lora.safetensors")
    with caplog.at_level("INFO", "lib_locon"):
        assert paste(text)["Prompt"] == "<lora:tiny_lora:1>"
    assert "'tiny_lora' here is another file than the one that made the image, and no file has its hash" in caplog.text


def test_a_name_of_several_files_is_settled_by_the_hash(start: Callable[..., Any], folder: Path) -> None:
    webui = start()
    text = webui.generate("<lora:tiny_lora:1>", steps=1).infotext
    for sub, source in {"a": "tiny_loha", "b": "tiny_lora"}.items():
        (folder / sub).mkdir()
        shutil.copy(folder / f"{source}.safetensors", folder / sub / "tiny_lora.safetensors")
    (folder / "tiny_lora.safetensors").unlink()
    assert paste(text)["Prompt"] == "<lora:b/tiny_lora:1>"


def test_names_that_are_one_without_their_marks_swap_nothing(start: Callable[..., Any], folder: Path) -> None:
    """`Lora hashes` leaves commas out, as the built-in's does: then nobody can tell whose hash stands there."""
    (folder / "tiny_lora.safetensors").rename(folder / "a,b.safetensors")
    (folder / "tiny_loha.safetensors").rename(folder / "ab.safetensors")
    webui = start()
    text = webui.generate("<lora:a,b:1><lora:ab:0.5>", steps=1).infotext
    assert fields(text)["Lora hashes"].count("ab: ") == 2
    assert paste(text)["Prompt"] == "<lora:a,b:1><lora:ab:0.5>"
    (folder / "a,b.safetensors").unlink()
    assert paste(text)["Prompt"] == "<lora:a,b:1><lora:ab:0.5>"


def test_a_tag_by_hash_reads_no_whole_collection(
    start: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a tag of a pasted text may name a file that is not here: all would be read for it."""
    start()
    may_end, begun = threading.Event(), []
    monkeypatch.setattr(search, "hashes_of", lambda file: (begun.append(file), may_end.wait(60), 1 / 0))
    monkeypatch.setattr(search, "SECONDS", 0.05)
    text = text_with("<lora:#0123456789ab:1>", "#0123456789ab: 0123456789ab")
    began = time.monotonic()
    assert paste(text)["Prompt"] == "<lora:#0123456789ab:1>"
    assert time.monotonic() - began < 20
    assert len(begun) == 1
    may_end.set()


def test_the_same_adapter_twice_is_named_once_among_the_hashes(start: Callable[..., Any]) -> None:
    run = start().generate("<lora:tiny_lora:0.5><lora:tiny_lora:0.25>", steps=1)
    assert fields(run.infotext)["Lora hashes"].count("tiny_lora") == 1
    assert fields(run.infotext)["Locon"].startswith("tiny_lora at 0.5: ")
    assert "; tiny_lora at 0.25: " in fields(run.infotext)["Locon"]


def test_the_adapter_for_every_prompt_is_written_too(start: Callable[..., Any], folder: Path) -> None:
    from modules import shared

    webui = start()
    shared.opts.set("sd_lora", "tiny_lora")
    run = webui.generate("a cat", steps=1)
    assert run.infotext.splitlines()[0] == "a cat<lora:tiny_lora:1.0>"
    assert fields(run.infotext)["Lora hashes"] == f"tiny_lora: {body_hash(folder / 'tiny_lora.safetensors')[:12]}"
    shared.opts.set("sd_lora", "None")
    again = webui.generate(paste(run.infotext)["Prompt"], steps=1)
    assert again.image.tobytes() == run.image.tobytes()


def test_no_path_stands_in_an_image(start: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    (folder / "broken.safetensors").write_bytes(b"<!DOCTYPE html>")
    (folder / "short.safetensors").write_bytes((folder / "tiny_lora.safetensors").read_bytes()[:-100])
    run = start().generate("<lora:tiny_lora:1><lora:broken:1><lora:short:1><lora:gone:1><lora:../x:1>", steps=1)
    assert len(run.comments) == 5
    assert str(tmp_path) not in "".join(run.comments) + run.infotext


@pytest.mark.parametrize("version", ["3.41.2", "4.40.0", "6.0.1"])
def test_a_name_with_html_pops_up_as_text(
    start: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Version 3 of gradio shows a text as it is, later ones take it for HTML."""
    shown: list[str] = []
    gradio = ModuleType("gradio")
    vars(gradio).update(__version__=version, Info=shown.append)
    start()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    (folder / "tiny_lora.safetensors").rename(folder / "<b>&.safetensors")
    digest = body_hash(folder / "<b>&.safetensors")[:12]
    assert paste(text_with("<lora:<img src=x onerror=y:1>", f"<img src=x onerror=y: {digest}"))["Prompt"]
    (sentence,) = shown
    assert ("<img" in sentence) == (version[0] == "3")
    said = "'<img src=x onerror=y' is not here; the file with the same hash is '<b%3E&'"
    assert html.unescape(sentence).startswith(said)


# ---- any name

NAMES = st.text(
    st.one_of(
        st.sampled_from(",\"'\\\t;()[]{}|=#&%$@!?<»“”.-_ \u2028\u200b\u0301\xa0é日🐱"),
        st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/:>\n\r"),
    ),
    min_size=1,
    max_size=12,
).filter(lambda name: name.strip() == name and len(name.encode()) < 200 and not name.startswith((".", "#")))


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(names=st.lists(NAMES, min_size=1, max_size=3, unique_by=lambda name: name.translate({58: None, 44: None})))
def test_any_name_comes_back_from_an_image(running: Any, names: list[str]) -> None:
    webui, folder = running
    shutil.rmtree(folder)
    folder.mkdir()
    for number, name in enumerate(names):
        tensors = {key: tensor + number for key, tensor in running_tensors().items()}
        save_file(tensors, folder / f"{name}.safetensors")
    prompt = "a cat" + "".join(f"<lora:{name}:0.25>" for name in names)
    run = webui.generate(prompt, steps=1)
    assert len(run.adapters) == len(names), run.comments
    read = fields(run.infotext)
    known = {name: body_hash(folder / f"{name}.safetensors")[:12] for name in names}
    written = {name.translate(str.maketrans("", "", ":,")): digest for name, digest in known.items()}
    assert written_hashes(read.get("Lora hashes", "")) == {  # none where no name is left of it
        key.strip(): digest for key, digest in written.items() if key.strip()
    }
    assert [part.partition(" at 0.25: ")[0] for part in re.split(r"(?<=layers); ", read["Locon"])] == names
    shown = "\n".join(line.strip() for line in prompt.strip().split("\n"))  # the host strips lines
    assert paste(run.infotext)["Prompt"] == shown
    for name in names:
        (folder / f"{name}.safetensors").rename(folder / f"new {names.index(name)}.safetensors")
    renamed = paste(run.infotext)["Prompt"]
    for number, name in enumerate(names):
        if name.translate(str.maketrans("", "", ":,")).strip():
            assert f"<lora:new {number}:0.25>" in renamed


@cache
def running_tensors() -> dict[str, Any]:
    tensors = load_file(random_adapters.folder() / "tiny_lora.safetensors")
    kept = sorted({key.split(".")[0] for key in tensors})[:2]
    return {key: tensor for key, tensor in tensors.items() if key.split(".")[0] in kept}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("any") / "Lora"
    folder.mkdir()
    with launch(lora_dir=folder, make_model=TinySD.random) as webui:
        yield webui, folder


@settings(max_examples=200)
@given(text=st.one_of(st.none(), st.integers(), st.text(), st.text(alphabet='ab0123456789cdef:, "')))
def test_any_text_of_hashes_is_read(text: object) -> None:
    found = written_hashes(text)
    assert all(name == name.strip() and name and re.fullmatch("[0-9a-f]{12,64}", found[name]) for name in found)


def test_the_hires_prompt_is_restored_too(start: Callable[..., Any], folder: Path) -> None:
    start()
    digest = body_hash(folder / "tiny_lora.safetensors")[:12]
    text = f'cat\nSteps: 1, Seed: 1, Size: 1x1, Hires prompt: "<lora:gone:1>", Lora hashes: "gone: {digest}"'
    assert paste(text)["Hires prompt"] == "<lora:tiny_lora:1>"


def test_a_search_ends_in_time(
    start: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start()
    digest = body_hash(folder / "tiny_lora.safetensors")[:12]
    may_end, begun = threading.Event(), []
    monkeypatch.setattr(search, "body_hash", lambda file: (begun.append(file), may_end.wait(60))[0] or "0" * 64)
    monkeypatch.setattr(search, "SECONDS", 0.05)
    with caplog.at_level("INFO", "lib_locon"):
        assert paste(text_with("<lora:gone:1>", f"gone: {digest}"))["Prompt"] == "<lora:gone:1>"
    assert "not all files could be searched" in caplog.text
    may_end.set()
    assert len(begun) == 1, "one click must not begin to read a whole collection"


def test_the_built_ins_own_swap_is_set_aside_and_given_back(start: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "builtin" / "Lora" / "scripts" / "lora_script.py"
    script.parent.mkdir(parents=True)
    script.write_text(SWAPPING_SCRIPT)
    builtin = {"Lora": script.parents[1]}
    alone = start(extensions={}, builtin=builtin)
    assert paste(text_with("<lora:x:1>"))["Prompt"] == "swapped by the built-in"
    alone.close()
    webui = start(extensions=OURS, builtin=builtin)
    for _ in range(2):
        assert paste(text_with("<lora:tiny_lora:1>"))["Prompt"] == "<lora:tiny_lora:1>"
        webui.reload_ui()
    from modules import script_callbacks

    script_callbacks.script_unloaded_callback()
    assert paste(text_with("<lora:x:1>"))["Prompt"] == "swapped by the built-in"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 0123456789ab", {"a": "0123456789ab"}),
        ("a: 0123456789AB, b c:  abcdefabcdef ", {"a": "0123456789ab", "b c": "abcdefabcdef"}),
        ("a: 0123456789ab, a: 0123456789ab", {"a": "0123456789ab"}), ("a: 0123456789ab, a: abcdefabcdef", {}),
        ("a: 01234567", {}), ("", {}), (None, {}), (7, {}), ("a", {}), (":", {}), ("a: xyz, : 0123456789ab", {}),
        ("a: 0123", {}),
        ("a:b: 0123456789ab,,", {"a:b": "0123456789ab"}),
    ],
)  # fmt: skip
def test_written_hashes_are_read(text: object, found: dict[str, str]) -> None:
    assert written_hashes(text) == found


# ---- images of the additional-networks extension


def test_its_fields_become_tags(start: Callable[..., Any]) -> None:
    start()
    text = (
        "a cat\nSteps: 1, Sampler: DDIM, CFG scale: 5.0, Seed: 1, AddNet Enabled: True, AddNet Module 1: LoRA, "
        "AddNet Model 1: tiny_lora(0123456789ab), AddNet Weight A 1: 0.7, AddNet Weight B 1: 0.5, "
        "AddNet Module 2: LoRA, AddNet Model 2: some name (abc), AddNet Weight A 2: 1, AddNet Module 3: Other, "
        "AddNet Model 3: x(abc), AddNet Module 4: LoRA, AddNet Model 4: tiny_loha(ff), AddNet Weight A 4: <lora:y:1>, "
        "AddNet Module 5: LoRA, AddNet Model 5: an(add)on(abc)"
    )
    tags = "<lora:tiny_lora:0.5:0.7><lora:some name:1><lora:tiny_loha:1.0><lora:an(add)on:1.0>"
    assert paste(text)["Prompt"] == f"a cat\n{tags}"


@pytest.mark.timeout(20)
def test_a_long_name_takes_no_time() -> None:
    for name in ("x" * 200_000, " " * 200_000 + "x", "(" * 200_000, "(a" * 100_000):
        assert addnet.tags({"AddNet Module 1": "LoRA", "AddNet Model 1": name}) == f"<lora:{name.strip()}:1.0>"


@pytest.mark.parametrize("name", ["a>b(ff)", "<lora:x:1>(ff)", "(ff)", " (ff)", "a:b(ff)"])
def test_a_name_that_no_tag_can_hold_becomes_none(name: str) -> None:
    assert addnet.tags({"AddNet Module 1": "LoRA", "AddNet Model 1": name}) == ""


def test_the_built_in_sees_to_them_where_it_is_on(start: Callable[..., Any]) -> None:
    from modules import script_callbacks

    start()

    def infotext_pasted(_: str, fields: dict[str, Any]) -> None:
        fields["Prompt"] += "<lora:theirs:1>"

    infotext_pasted.__module__ = "networks"
    script_callbacks.on_infotext_pasted(infotext_pasted)
    text = text_with("cat") + ", AddNet Module 1: LoRA, AddNet Model 1: tiny_lora(ff)"
    assert paste(text)["Prompt"] == "cat<lora:theirs:1>"
