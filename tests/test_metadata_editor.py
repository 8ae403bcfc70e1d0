"""The editor of what a user writes about a file: nothing that stands in the `.json` is ever lost, and nothing runs."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from extensions_builtin_shim.launch import launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.errors import FileError
from lib_locon.user_metadata import MAX_USER_METADATA, changed, read_user_metadata, save_user_metadata

put_modules_on_path()
ATTACK = "<img src=x onerror=attacked()>'\"&"
LONG = f'{{"notes": "{"x" * MAX_USER_METADATA}"}}'
"""The window shows nothing of so long a file, so it must not change it."""
BUILTIN_WROTE = {
    "description": "d", "sd version": "SD1", "activation text": "glow, (red:1.2)", "preferred weight": 0.7,
    "negative text": "ugly", "notes": "a\nb", "civitai": {"id": 5}, "ä": [None, 1.5, "🌟"],
}  # fmt: skip


def beside(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf8"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An adapter with words beside it, as the built-in's editor writes them, and some that it does not know."""
    path = tmp_path / "Lora" / "style.v2.safetensors"
    path.parent.mkdir()
    metadata = {
        "ss_output_name": f'"{ATTACK}', "ss_sd_model_name": ATTACK, "ss_training_started_at": "1700000000.5",
        "ss_tag_frequency": json.dumps({"10_x": {"cat": 3, ATTACK: 9}, "5_y": {"cat": 8, "dog": 2}}),
        "ss_dataset_dirs": json.dumps({"10_x": {"img_count": 40}, "5_y": {"img_count": 2}}),
        "ss_bucket_info": json.dumps({"buckets": {"0": {"resolution": [512, 768], "count": 12}}}),
    }  # fmt: skip
    save_file({"lora_unet_x.alpha": torch.ones(1)}, path, metadata)
    path.with_suffix(".json").write_text(json.dumps(BUILTIN_WROTE, indent=4, ensure_ascii=False), encoding="utf8")
    return path


# ---- the file


def test_a_change_keeps_all_else_and_its_order(path: Path) -> None:
    save_user_metadata(path, {"notes": "new", "fresh": "x"})
    assert beside(path) == {**BUILTIN_WROTE, "notes": "new", "fresh": "x"}
    assert list(beside(path)) == [*BUILTIN_WROTE, "fresh"]
    text = path.with_suffix(".json").read_text(encoding="utf8")
    assert text == json.dumps(beside(path), indent=4, ensure_ascii=False), "as the built-in writes it"


def test_what_others_write_meanwhile_stays(path: Path) -> None:
    opened = read_user_metadata(path).written
    path.with_suffix(".json").write_text(json.dumps({**BUILTIN_WROTE, "description": "theirs", "new": 1}))
    save_user_metadata(path, changed(opened, {**opened, "notes": "mine"}))
    assert beside(path) == {**BUILTIN_WROTE, "description": "theirs", "new": 1, "notes": "mine"}


def test_where_nothing_was_changed_nothing_is_written(path: Path, tmp_path: Path) -> None:
    path.with_suffix(".json").write_text('{"notes": "a\\r\\nb", "preferred weight": 1, "sd version": "Pony"}')
    before = path.with_suffix(".json").read_bytes()
    opened = read_user_metadata(path).written
    shown = {key: value.replace("\r\n", "\n") if isinstance(value, str) else value for key, value in opened.items()}
    assert changed(opened, shown) == {}
    save_user_metadata(path, {})
    assert path.with_suffix(".json").read_bytes() == before
    new = tmp_path / "new.safetensors"
    empty = read_user_metadata(new).written
    assert changed(empty, {**empty, "notes": None, "preferred weight": None}) == {}
    save_user_metadata(new, {})
    assert not new.with_suffix(".json").exists()


def test_what_the_user_changed() -> None:
    opened = read_user_metadata(Path("none")).written
    assert opened["sd version"] == "Unknown"
    assert changed(opened, {"notes": "x", "preferred weight": 1, "sd version": "SDXL", "description": ""}) == {
        "notes": "x", "preferred weight": 1.0, "sd version": "SDXL",
    }  # fmt: skip
    full = {**opened, "notes": "x", "preferred weight": 0.5}
    assert changed(full, {"notes": "", "preferred weight": None}) == {"notes": "", "preferred weight": 0.0}
    for weight in (float("nan"), float("inf"), "much", 10**400):
        with pytest.raises(ValueError, match="must be a number"):
            changed(opened, {"preferred weight": weight})


@pytest.mark.parametrize("content", ["{not json", "[1]", "5", "", '{"a": 1', "[" * 100_000, b"\xff\xfe{", LONG])
def test_a_file_of_another_kind_is_never_overwritten(path: Path, content: str | bytes) -> None:
    content = content if isinstance(content, bytes) else content.encode()
    path.with_suffix(".json").write_bytes(content)
    with pytest.raises(FileError, match=r"style\.v2\.json is there and"):
        save_user_metadata(path, {"notes": "new"})
    assert path.with_suffix(".json").read_bytes() == content
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".tmp"] == []


def test_a_write_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.with_suffix(".json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="No space left"):
            save_user_metadata(path, {"notes": "new"})
    with pytest.raises(FileError, match="could not be written"):
        save_user_metadata(path, {"notes": "half of a character: \ud800"})
    assert path.with_suffix(".json").read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.stem}.json"}


def test_a_read_only_file_stays(path: Path) -> None:
    """A rename would ask for no right to the file that it replaces."""
    file = path.with_suffix(".json")
    before = file.read_bytes()
    file.chmod(0o444)
    with pytest.raises(FileError, match="it is read-only"):
        save_user_metadata(path, {"notes": "new"})
    assert file.read_bytes() == before
    file.chmod(0o644)
    save_user_metadata(path, {"notes": "new"})


def test_two_windows_that_save_at_once(path: Path) -> None:
    def save(number: int) -> None:
        save_user_metadata(path, {f"key {number}": number})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(40)))
    assert beside(path) == {**BUILTIN_WROTE, **{f"key {number}": number for number in range(40)}}


@pytest.mark.parametrize("weight", ["1" + "0" * 400, "1e999", "NaN", '"1"', "true"])
def test_a_weight_that_is_none_counts_as_not_there(path: Path, weight: str) -> None:
    path.with_suffix(".json").write_text(f'{{"preferred weight": {weight}, "notes": "n"}}')
    assert read_user_metadata(path).preferred_weight == 0.0
    assert read_user_metadata(path).notes == "n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes, and links need rights")
def test_links_and_modes_stay(path: Path, tmp_path: Path) -> None:
    file, real = path.with_suffix(".json"), tmp_path / "elsewhere.json"
    file.rename(real)
    file.symlink_to(real)
    real.chmod(0o640)
    save_user_metadata(path, {"notes": "new"}, [tmp_path])
    assert file.is_symlink()
    assert json.loads(real.read_text(encoding="utf8"))["notes"] == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    other = tmp_path / "other.safetensors"
    save_user_metadata(other, {"notes": "x"})
    plain = tmp_path / "plain"
    plain.touch()
    assert other.with_suffix(".json").stat().st_mode == plain.stat().st_mode


# ---- what the window shows


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(path: Path) -> Iterator[Any]:
    with launch(lora_dir=path.parent, make_model=TinySD.random) as webui, webui.pages() as (page,):
        page.create_html("txt2img")
        yield page


def test_facts_and_words(page: Any, path: Path) -> None:
    from lib_locon.hosts.metadata_shown import facts_table, words

    card = page.card("style.v2")
    table = Tags(facts_table(card, page.metadata_of(card)))
    assert {tag for tag, _ in table.tags} == {"table", "tr", "th", "td"}
    for part in ("style.v2.safetensors", ATTACK, "2023-11-14", "42", "512 × 768 (12)"):
        assert part in table.text
    shown = Tags(words(page.metadata_of(card)))
    assert {tag for tag, _ in shown.tags} == {"p", "button", "small"}
    buttons = [attributes for tag, attributes in shown.tags if tag == "button"]
    assert [button["data-word"] for button in buttons] == ["cat", ATTACK, "dog"], "the commonest first"
    assert all(set(button) == {"type", "class", "data-word"} for button in buttons)
    assert "cat 11" in shown.text


@pytest.mark.parametrize(
    "value", ["", "5", "[]", "{", "null", '{"a": 5}', '{"a": {"resolution": "5"}}', "1e999", "[NaN]"]
)
def test_odd_metadata_is_left_out(path: Path, value: str) -> None:
    from lib_locon.cards import Cards
    from lib_locon.facts import FileMetadata
    from lib_locon.hosts.metadata_shown import facts_table, words
    from lib_locon.library import Library

    keys = ("ss_tag_frequency", "ss_training_started_at", "ss_dataset_dirs", "ss_bucket_info", "ss_clip_skip")
    save_file({"x.alpha": torch.ones(1)}, path, dict.fromkeys(keys, value))
    (card,) = Cards(Library([path.parent])).all()
    metadata = FileMetadata(card.identity)
    assert "Size" in facts_table(card, metadata)
    assert words(metadata) == ""


def test_many_words(path: Path) -> None:
    from lib_locon.hosts.metadata_shown import words

    html = words({"ss_tag_frequency": {"x": {f"w{number}": number for number in range(250)}}})
    assert html.count("<button") == 100
    assert "and 150 more" in html
    assert html.index("w249") < html.index("w150")


def test_the_size_and_the_words_are_on_the_card(page: Any, path: Path) -> None:
    from lib_locon.hosts.cards_shown import badges

    about = {**page.items["style.v2"]["locon"], "triggers": ["cat", ATTACK, "dog"]}
    _, attributes = Tags(badges(about)).tags[0]
    assert attributes["title"] == f"{path.stat().st_size / 1000:.1f} kB\ntrained on: cat, {ATTACK}, dog"


def test_a_card_after_an_edit(page: Any, path: Path) -> None:
    item = page.items["style.v2"]
    item["sort_keys"]["default"] = 7
    save_user_metadata(path, {"description": ATTACK})
    again = page.create_item("style.v2", enable_filter=False)
    assert again["description"] == ATTACK
    assert again["sort_keys"]["default"] == 7, "it keeps its place"
    assert again["locon"] == item["locon"]


# ---- the window itself, where there is a gradio


@pytest.fixture
def editor(page: Any) -> Any:
    gradio = pytest.importorskip("gradio")
    made = page.create_user_metadata_editor(None, "txt2img")
    with gradio.Blocks() as blocks:
        made.create_ui()
        made.setup_ui(gradio.Gallery())
    made.blocks = blocks
    return made


def values(updates: Any) -> list[Any]:
    return [update["value"] if isinstance(update, dict) and "value" in update else update for update in updates]


def test_the_host_finds_its_names(editor: Any) -> None:
    """Fact: the host's script looks for the window, the text box in it and the button by these ids."""
    config = json.dumps(editor.blocks.get_config_file(), default=str)
    for name in ("", "_name", "_button"):
        assert f'"txt2img_lora_edit_user_metadata{name}"' in config
    assert "loconSaved" in config


def test_open_and_save(editor: Any, path: Path) -> None:
    *_, title, facts, preview, words, description, activation, negative, weight, version, notes, opened, status = (
        values(editor.shown("style.v2"))
    )
    assert "style.v2" in title
    assert "<table" in facts
    assert "preview" in preview
    assert "locon-word" in words
    fields = [description, activation, negative, weight, version, notes]
    assert fields == ["d", "glow, (red:1.2)", "ugly", 0.7, "SD1", "a\nb"]
    assert status == ""
    assert editor.save("style.v2", opened, *fields) == ("", "style.v2")
    assert beside(path) == BUILTIN_WROTE
    fields[-1] = "new"
    assert editor.save("style.v2", opened, *fields) == ("", "style.v2")
    assert beside(path) == {**BUILTIN_WROTE, "notes": "new"}


def test_the_words_of_one_card_never_go_into_another(editor: Any, path: Path) -> None:
    opened = editor.shown("style.v2")[-2]
    for name, state in (("other", opened), ("style.v2", None), ("../style.v2", opened)):
        status, saved = editor.save(name, state, "x", "x", "x", 1, "SD1", "x")
        assert "Not saved" in status
        assert saved == ""
    assert beside(path) == BUILTIN_WROTE


def test_what_cannot_be_saved_is_said(editor: Any, path: Path) -> None:
    opened = editor.shown("style.v2")[-2]
    path.with_suffix(".json").write_text("[]")
    status, saved = editor.save("style.v2", opened, f"{ATTACK}", "", "", 0, "SD1", "")
    assert "style.v2.json is there and holds something else" in status
    assert saved == ""
    assert {tag for tag, _ in Tags(status).tags} == {"span"}


def test_a_version_that_others_know(editor: Any, path: Path) -> None:
    path.with_suffix(".json").write_text('{"sd version": "Pony"}')
    shown = editor.shown("style.v2")
    update = next(each for each in shown if isinstance(each, dict) and "choices" in each)
    assert update["value"] == "Pony"
    assert "Pony" in [choice[0] if isinstance(choice, (tuple, list)) else choice for choice in update["choices"]]


def test_a_card_that_is_gone(editor: Any, path: Path) -> None:
    path.unlink()
    shown = editor.shown("style.v2")
    assert "is gone" in shown[0]
    assert shown[-2] is None
    assert len(shown) == len(editor.shown("none"))
