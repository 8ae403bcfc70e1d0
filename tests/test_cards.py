"""What the cards say and insert, and that they stand in the place of the built-in's page."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from extensions_builtin_shim.launch import CHECKOUT, launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.cards import Cards, fits
from lib_locon.errors import UnknownName
from lib_locon.facts import Facts, FactsIndex, FileMetadata, read_facts, training_words
from lib_locon.files.reader import FileIdentity
from lib_locon.library import Library
from lib_locon.prompt.edit import tags
from lib_locon.prompt.grammar import parse_prompt
from lib_locon.user_metadata import UserMetadata, read_user_metadata

put_modules_on_path()

Write = Callable[..., Path]
ATTACK = "<img src=x onerror=alert(1)>'\"&"
CROSS = {"SD1": 768, "SD2": 1024, "SDXL": 2048}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(name, rank=4, width=768, metadata={}, user={}) -> path of a LoRA on one cross-attention."""

    def run(
        name: str, rank: int = 4, width: int = 768, metadata: dict[str, str] | None = None, user: Any = None
    ) -> Path:
        path = tmp_path / "Lora" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
        tensors = {f"{key}.lora_up.weight": torch.zeros(320, rank), f"{key}.lora_down.weight": torch.zeros(rank, width)}
        save_file(tensors, path, metadata)
        if user is not None:
            path.with_suffix(".json").write_text(user if isinstance(user, str) else json.dumps(user))
        return path

    return run


def cards(folder: Path, **options: Any) -> Cards:
    return Cards(Library([folder / "Lora"]), **options)


def test_what_a_card_shows(write: Write, tmp_path: Path) -> None:
    words = {"ss_tag_frequency": json.dumps({"10_x": {"cat": 3, "dog ": 9}, "5_y": {"cat": 8}})}
    path = write("sub/style", rank=16, metadata={"ss_output_name": "my style", **words, "sshs_model_hash": "abc"})
    (path.parent / "style.preview.png").write_bytes(b"x")
    (card,) = cards(tmp_path).all()
    assert (card.name, card.family, card.rank, card.base, card.problem) == ("style", "LoRA", "16", "SD1", "")
    assert card.preview == path.parent / "style.preview.png"
    assert card.facts is not None
    assert card.facts.triggers == ("cat", "dog")
    assert card.names == ("sub/style", "style", "my style")
    assert {"sub/style", "my style", "LoRA", "SD1", "cat", "dog"} <= set(card.search_terms)
    assert card.hash == "" and "abc" not in card.search_terms  # what a file says of its own hash is not shown
    assert card.facts.claimed_hash == "abc"
    (card,) = cards(tmp_path, hash_of=lambda identity: f"computed {identity.size}").all()
    assert card.hash == f"computed {card.identity.size}" and card.hash in card.search_terms
    stat = path.stat()
    dates = {"date_created": int(stat.st_ctime), "date_modified": int(stat.st_mtime)}
    assert card.sort_keys == {**dates, "name": "style", "path": str(path).lower()}
    assert card.identity.size == stat.st_size


@pytest.mark.parametrize(("base", "width"), CROSS.items())
def test_base_is_from_the_tensors(write: Write, tmp_path: Path, base: str, width: int) -> None:
    write("a", width=width, metadata={"ss_base_model_version": "sd_v1", "ss_sd_model_name": "SDXL"})
    assert cards(tmp_path).all()[0].base == base


def test_the_users_word_on_the_base_wins(write: Write, tmp_path: Path) -> None:
    write("a", user={"sd version": "SDXL"})
    write("b", user={"sd version": "Unknown"})
    assert [card.base for card in cards(tmp_path).all()] == ["SDXL", "SD1"]


@pytest.mark.parametrize(
    ("user", "weight", "text"),
    [
        (None, 0, ""),
        ({"preferred weight": 0.5}, 0.5, ""),
        ({"preferred weight": -1}, -1, ""),
        ({"preferred weight": 0, "activation text": "glow, (red:1.2)"}, 0, "glow, (red:1.2)"),
        ({"preferred weight": "1)+alert(", "activation text": ["x"], "description": 5}, 0, ""),
        ("[1]", 0, ""),
        ("{not json", 0, ""),
        ('{"preferred weight": NaN}', 0, ""),
        ("[" * 100_000, 0, ""),
    ],
)
def test_what_a_click_inserts(write: Write, tmp_path: Path, user: Any, weight: float, text: str) -> None:
    write("a", user=user)
    (card,) = cards(tmp_path).all()
    assert (card.tag, card.user.preferred_weight, card.user.activation_text) == ("a", weight, text)


def test_user_metadata_keeps_what_it_does_not_know(write: Write) -> None:
    user = {"description": "d", "notes": "n", "negative text": "no", "sd version": "SD2", "civitai": {"id": 5}}
    found = read_user_metadata(write("a", user=user))
    assert (found.description, found.notes, found.negative_text, found.sd_version) == ("d", "n", "no", "SD2")
    assert found.raw == user


def test_tags_lead_back_to_their_files(write: Write, tmp_path: Path) -> None:
    """Whatever a card inserts, the library finds that very file by it."""
    named = {"x": "unique", "sub/x": "twice", "other/y": "twice", "y z": "", "q": "x", "w": "bad:name", "a'b&c": ATTACK}
    for name, alias in named.items():
        write(name, metadata={"ss_output_name": alias} if alias else None)
    for prefer_alias in (True, False):
        shown = cards(tmp_path).all(prefer_alias=prefer_alias)
        library = Library([tmp_path / "Lora"])
        assert len({card.name for card in shown}) == len(named)
        for card in shown:
            assert not set(":>") & set(card.tag)
            assert library.find(card.tag).path == card.path
        tags = {str(card.path.relative_to(tmp_path / "Lora").with_suffix("")): card.tag for card in shown}
        assert tags["sub/x"] == "sub/x"
        assert tags["other/y"] == "y"
        assert tags["x"] == ("unique" if prefer_alias else "x")


def test_a_name_that_no_tag_can_hold_is_quoted(write: Write, tmp_path: Path) -> None:
    write("a>b")
    write("c:d", metadata={"ss_output_name": "fine"})
    quoted, aliased = cards(tmp_path).all()
    assert (quoted.tag, quoted.problem) == ("a%3Eb", "")
    assert "a%3Eb" in quoted.names, "the page knows its tag in a prompt by that"
    assert aliased.tag == "fine"


ODD = (
    " blanks ", "blanks", "folder /x", "folder/x ", "x", "sub/a:b", "sub/a>b", "a%3Ab", "sub/a%3Ab", "100%", "100%25",
    "#0123456789ab", "a=b", "te=1", "te,st", "[x] (y) {z|w}", "a<b", "<lora", "<lora:x:1>", "line\nend", "tab\tx", "  ",
    "nai\u0308ve", "na\u00efve", "half \udcff letter", "*", "\u65e5\u672c\u8a9e",
)  # fmt: skip


def test_every_card_has_a_tag_that_leads_to_its_file(write: Write, tmp_path: Path) -> None:
    for name in ODD:
        write(name)
    library = Library([tmp_path / "Lora"])
    shown = cards(tmp_path).all()
    assert {card.names[0] for card in shown} == set(ODD)
    for card in shown:
        before, (tag,), after = "cat ", tags(f"cat <lora:{card.tag}:1> dog"), " dog"
        assert tag.stop - tag.start == len(f"<lora:{card.tag}:1>")
        assert library.find(tag.items[0]).path == card.path
        parsed = parse_prompt(f"{before}<lora:{card.tag}:1>{after}")
        assert parsed.text == before + after
        assert library.find(parsed.requests[0].called).path == card.path
        assert "\n" not in card.tag
        card.tag.encode()  # a browser takes whole letters only


def test_no_tag_leads_to_another_file_whose_own_name_is_that_tag(write: Write, tmp_path: Path) -> None:
    """Every spelling of the one name is a file of its own: what is left is the hash."""
    name = "a:b"
    plain, full = "a%3Ab", "%61%3A%62"
    for each in (name, plain, full):
        write(each)
    by_name = {card.names[0]: card.tag for card in cards(tmp_path, hash_of=lambda _: "0123456789abcdef").all()}
    assert by_name == {name: "#0123456789ab", plain: plain, full: full}


def test_an_unreadable_file_has_a_card_that_says_why(write: Write, tmp_path: Path) -> None:
    write("a").write_text("version https://git-lfs.github.com/spec/v1")
    (card,) = cards(tmp_path).all()
    assert "git-lfs" in card.problem
    assert card.family == card.rank == card.base == ""


def test_families_in_a_word(tmp_path: Path) -> None:
    from lib_locon.cards import Card

    def family(*labels: str) -> str:
        card = Card("a", "a", tmp_path, FileIdentity("a", 1, 1), 0, Facts(families=labels), UserMetadata(), None, ())
        return card.family

    assert family("LoRA", "LoCon") == "LoCon"
    assert family("LoRA", "LoCon Tucker") == "LoCon Tucker"
    assert family("LoHa", "LoHa Tucker") == "LoHa Tucker"
    assert family("DoRA LoRA", "DoRA LoCon") == "DoRA LoCon"
    assert family("LoRA", "Norm") == "LoRA + Norm"
    assert family("LoRA") == "LoRA"


def test_fit() -> None:
    tiny = "unknown (cross-attention of width 64)"
    assert fits("SD1", "SD1")
    assert fits(tiny, tiny)
    assert fits("SDXL", "SD1") is False
    assert fits("SD1", tiny) is False
    assert fits("unknown (no cross-attention in it)", "SD1") is None
    assert fits("", "SD1") is None
    assert fits("SD1", "") is None


def test_a_file_is_read_once_while_it_does_not_change(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib_locon import facts

    read: list[str] = []
    monkeypatch.setattr(facts, "read_facts", lambda path, **_: read.append(path.stem) or Facts())
    write("a")
    write("b")
    index = FactsIndex()
    for _ in range(2):
        cards(tmp_path, index=index).all()
    assert read == ["a", "b"]
    write("a", rank=8)
    cards(tmp_path, index=index).all()
    assert read == ["a", "b", "a"]


def test_a_store_outlives_the_index(write: Write, tmp_path: Path) -> None:
    write("a")
    store: dict[FileIdentity, Facts] = {}
    cards(tmp_path, index=FactsIndex(store)).all()
    (card,) = cards(tmp_path, index=FactsIndex(dict(store)), patience=0).all()
    assert card.rank == "4"


def test_many_files_are_read_in_the_background(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write(f"a{number}", metadata={"ss_output_name": f"alias{number}"})
    from lib_locon import facts

    may_read = threading.Event()
    read_one = facts.read_facts
    monkeypatch.setattr(facts, "read_facts", lambda path, **options: may_read.wait(30) and read_one(path, **options))
    index = FactsIndex()
    first = cards(tmp_path, index=index, patience=0.01).all()
    assert [card.facts for card in first] == [None] * 20
    assert {card.tag for card in first} == {card.name for card in first}, "an alias is not sure before all are read"
    may_read.set()
    shown = cards(tmp_path, index=index, patience=30).all()
    assert {card.tag for card in shown} == {f"alias{number}" for number in range(20)}


def test_reading_stops_when_it_is_closed(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_locon import facts

    may_read, read = threading.Event(), []
    monkeypatch.setattr(facts, "read_facts", lambda path, **_: (may_read.wait(30) and read.append(path)) or Facts())
    index = FactsIndex()
    index.read(FileIdentity.of(write(name)) for name in "abc")
    index.close()
    may_read.set()
    index.read([FileIdentity.of(write("d"))], 30)
    assert [path.stem for path in read] in (["a", "d"], ["d"])


def test_an_error_of_ours_is_one_cards_problem(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_locon import facts

    monkeypatch.setattr(facts, "base_family", lambda adapter: 1 / (adapter.name != "a"))
    write("a")
    write("b")
    bad, good = cards(tmp_path).all()
    assert "ZeroDivisionError" in bad.problem
    assert good.problem == ""


def test_metadata_is_read_when_it_is_asked_for(write: Write) -> None:
    path = write("a", metadata={"ss_datasets": '[{"a": 1}]', "broken": "{", "ssmd_cover_images": '["x"]', "n": "1"})
    metadata = FileMetadata(FileIdentity.of(path))
    assert dict(metadata) == {"ss_datasets": [{"a": 1}], "broken": "{", "ssmd_cover_images": '["x"]', "n": "1"}
    assert read_facts(path).has_cover
    path.unlink()
    assert metadata


def test_training_words_of_odd_metadata() -> None:
    for text in ("", "5", "[]", '{"a": 5}', '{"a": {"b": "c"}}', "{" * 9999):
        assert training_words({"ss_tag_frequency": text}) == []


# the page in the host

BUILTIN = """
from modules import script_callbacks, ui_extra_networks
class Page(ui_extra_networks.ExtraNetworksPage):
    builtin = True
    def __init__(self, title):
        super().__init__(title)
    def list_items(self):
        return []
def before_ui():
    for title in ("Before", "Lora", "After"):
        ui_extra_networks.register_page(Page(title))
script_callbacks.on_before_ui(before_ui)
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """host(builtin=False) -> the list of pages, in a stand-in whose adapters are in tmp_path/Lora.

    Its model is the narrow one, whose cross-attention reads a text of width 64.
    """
    running = []

    def run(builtin: bool = False) -> Any:
        script = tmp_path / "builtin" / "Lora" / "scripts" / "lora_script.py"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(BUILTIN)
        (tmp_path / "Lora").mkdir(exist_ok=True)
        roots = {"Lora": tmp_path / "builtin" / "Lora"} if builtin else {}
        running.append(launch(lora_dir=tmp_path / "Lora", builtin=roots, make_model=TinySD.random))
        from modules import ui_extra_networks

        return ui_extra_networks.extra_pages

    yield run
    for webui in running:
        webui.close()


def kinds(pages: Any) -> list[str]:
    return [f"{page.title}{' (built-in)' if hasattr(page, 'builtin') else ''}" for page in pages]


def test_our_page_stands_where_the_builtins_stood(host: Any) -> None:
    from modules import initialize

    pages = host(builtin=True)
    ours = ["Before (built-in)", "Lora", "After (built-in)"]
    assert kinds(pages) == ours
    for _ in range(3):
        initialize.reload_ui()
        assert kinds(pages) == ours


def test_without_the_builtin_there_is_one_page_too(host: Any) -> None:
    from modules import initialize

    pages = host()
    for _ in range(2):
        assert kinds(pages) == ["Lora"]
        initialize.reload_ui()


def test_the_builtins_page_is_given_back(host: Any) -> None:
    from modules import script_callbacks

    pages = host(builtin=True)
    script_callbacks.script_unloaded_callback()
    assert kinds(pages) == ["Before (built-in)", "Lora (built-in)", "After (built-in)"]
    pages = host()
    script_callbacks.script_unloaded_callback()
    assert kinds(pages) == []


class Parsed(HTMLParser):
    """Every tag of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_everything_from_files_is_escaped(host: Any, write: Write, tmp_path: Path) -> None:
    """Fact: "Escaped throughout: a file's name or metadata can hold HTML." The host escapes neither paths nor search
    terms, and in its tree nothing.
    """
    words = {"ss_output_name": ATTACK, "ss_tag_frequency": json.dumps({"x": {ATTACK: 1}}), "sshs_model_hash": ATTACK}
    user = dict.fromkeys(["description", "activation text", "negative text", "notes", "sd version"], ATTACK)
    for name in (ATTACK.replace("/", ""), f"folder {ATTACK}/a'b"):
        write(name, metadata=words, user=user)
    (page,) = host()
    html = page.create_html("txt2img")
    html += "".join(page.create_tree_file_item_html("txt2img", f"/x/{ATTACK}", item) for item in page.items.values())
    assert len(page.items) == 2
    tags = Parsed(html).tags
    assert {tag for tag, _ in tags} <= {"div", "span", "p", "button"}
    clicks = {attributes["onclick"] for _, attributes in tags if "onclick" in attributes}
    assert {key for _, attributes in tags for key in attributes if key.startswith("on")} == {"onclick"}
    string = r'"(?:\\.|[^"\\])*"'
    text = rf"{string}(?: \+ (?:{string}|[\d.]+|opts\.\w+))*"
    for click in clicks:
        assert re.fullmatch(rf"cardClicked\('txt2img', {text}, {text}, false\);", str(click)), click


def test_a_name_that_is_no_unicode_text_keeps_no_page_back(host: Any, write: Write) -> None:
    """Linux allows any bytes in a name; addresses and what a browser is sent do not."""
    picture = {"ss_output_name": "x", "ssmd_cover_images": '["x"]'}
    for name in ("half \udcff", "inner \udcff"):
        write(name, metadata=picture)
    write("half \udcff").with_suffix(".preview.png").write_bytes(b"x")
    write("good")
    (page,) = host()
    html = page.create_html("txt2img")
    html.encode()
    assert len(page.items) == 3
    assert "half ?" in html and "&lt;lora:half %FF:" in html
    page.create_item_html("txt2img", page.items["half \udcff"], page.card_tpl).encode()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices with names are not there")
def test_whatever_is_in_the_place_of_a_description_holds_nobody_up(host: Any, write: Write) -> None:
    os.mkfifo(write("pipe").with_suffix(".txt"))
    write("endless").with_suffix(".txt").symlink_to("/dev/zero")
    path = write("other")
    path.with_suffix(".txt").mkdir()
    path.with_suffix(".description.txt").write_bytes(b"words \xff")
    (page,) = host()
    page.create_html("txt2img")
    found = {name: item["description"] for name, item in page.items.items()}
    assert found == {"pipe": None, "endless": None, "other": "words \ufffd"}


def test_adapters_for_other_models_are_hidden_and_told(host: Any, write: Write) -> None:
    from modules import shared

    for name, width in {"mine": 64, "sd1": 768, "xl": 2048}.items():
        write(name, width=width)
    (page,) = host()
    html = page.create_html("txt2img")
    abouts = {name: item["locon"] for name, item in page.items.items()}
    assert {name: about["hidden"] for name, about in abouts.items()} == {"mine": False, "sd1": True, "xl": True}
    assert (abouts["mine"]["base"], abouts["mine"]["fits"]) == ("this model", True)
    assert html.count("data-locon-hidden") == 2
    assert page.items["mine"]["sd_version"] == "Unknown"
    assert "2 adapters for other models are hidden" in html
    assert "It was made for another model: SD1." in html
    shared.opts.set("lora_show_all", True)
    html = page.create_html("txt2img")
    assert "data-locon-hidden" not in html
    assert "does not fit" in html


def test_items_are_what_the_host_wants(host: Any, write: Write) -> None:
    path = write(
        "a", metadata={"ss_output_name": "alias"}, user={"activation text": 'say "hi"\n', "negative text": "no"}
    )
    (page,) = host()
    (item,) = page.list_items()
    assert item["filename"] == str(path)
    assert item["prompt"] == r'"<lora:alias:" + opts.extra_networks_default_multiplier + ">" + " say \"hi\"\n"'
    assert item["negative_prompt"] == '"(no:1)"'
    assert item["sd_version"] == "SD1"  # the built-in's editor writes it into the file: its own words, or "Unknown"
    assert item["search_terms"][0] == "Lora/a.safetensors"
    assert item["local_preview"] == str(path.with_suffix(".png"))
    assert dict(item["metadata"]) == {"ss_output_name": "alias"}
    path.with_suffix(".json").write_text('{"description": "new"}')
    again = page.create_item("a")
    page.read_user_metadata(again, use_cache=False)
    assert again["description"] == "new"
    assert page.create_item("none") is None


def test_the_names_of_cards_can_be_used(host: Any, write: Write, tmp_path: Path) -> None:
    """The page and the tags look into one library."""
    write("a")
    (page,) = host()
    library = page._library()
    assert library.find("a").path == tmp_path / "Lora" / "a.safetensors"
    write("b")
    page.refresh()
    assert page._library() is library
    assert [item["name"] for item in page.list_items()] == ["a", "b"]
    with pytest.raises(UnknownName):
        library.find("c")


def test_checkout_has_one_file_that_touches_the_dom() -> None:
    """`javascript/locon.mjs` alone; the helpers beside it are pure."""
    scripts = {path.name: path.read_text() for path in (CHECKOUT / "javascript").iterdir()}
    helpers = set(scripts) - {"locon.mjs"}
    assert helpers == {"locon_completion.mjs", "locon_tags.mjs", "locon_texts.mjs"}
    for name in helpers:
        code = re.sub(r"//.*|/\*.*?\*/", "", scripts[name], flags=re.DOTALL if "/*" in scripts[name] else 0)
        assert not re.search(r"\b(document|window|gradioApp)\b", code), name
    assert not re.search(r"innerHTML|insertAdjacentHTML|outerHTML|\beval\b", scripts["locon.mjs"])
