"""JSON of strangers: how it is read, and that one strange file never hides another one or breaks a list."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from extensions_builtin_shim.launch import launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.cards import Cards
from lib_locon.facts import MOST_LETTERS, Facts, FactsIndex, FileMetadata, read_facts, training_words
from lib_locon.files.reader import FileIdentity
from lib_locon.index import facts_table
from lib_locon.library import Library
from lib_locon.untrusted_json import MOST_DEEP, MOST_DIGITS, parse, parse_readable
from tests import random_adapters
from tests.asgi import Client

put_modules_on_path()

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet='ab"\\[]{}:,/né\ud800'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='a"\\[{'), inner),
    max_leaves=20,
)


@given(values, st.booleans())
def test_what_json_writes_is_read(value: Any, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only)) == value


def nested(depth: int, opening: str = "[", closing: str = "]", inside: str = "1") -> str:
    return opening * depth + inside + closing * depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"\\"]": ', "}]")])
def test_the_depth_has_a_limit(opening: str, closing: str) -> None:
    times = MOST_DEEP // (opening.count("[") + opening.count("{"))
    parse(nested(times, opening, closing))
    for text in (nested(times + 1, opening, closing), nested(100_000, opening, closing), opening * 100_000):
        with pytest.raises(ValueError, match="brackets lie more than 100 deep"):
            parse(text)


@pytest.mark.parametrize(
    "inside", ['"' + "[" * 500 + '"', '"' + '\\"[' * 500 + '"', '"\\\\' + "{" * 500 + '"', '"\\""']
)
def test_brackets_inside_of_texts_are_none(inside: str) -> None:
    parse(nested(MOST_DEEP, inside=inside))
    with pytest.raises(ValueError, match="brackets"):
        parse(nested(MOST_DEEP + 1, inside=inside))


def test_the_limit_is_ours_not_that_of_python() -> None:
    """An extension that wants more may raise Python's, and the C stack then ends the process."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        with pytest.raises(ValueError, match="brackets"):
            parse("[" * 10_000_000)
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="this Python has no limit of its own")
def test_a_number_has_a_limit_whatever_python_was_told() -> None:
    assert parse("[-" + "9" * MOST_DIGITS + "]") == [-int("9" * MOST_DIGITS)]
    assert parse('"' + "9" * 10_000 + '"') == "9" * 10_000
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        for text in ("9" * (MOST_DIGITS + 1), '{"a": [' + "9" * 3_000_000 + "]}"):
            with pytest.raises(ValueError, match=r"a number of [0-9]+ digits"):
                parse(text)
    finally:
        sys.set_int_max_str_digits(limit)


def test_half_letters_are_marked() -> None:
    assert parse('"\\ud800"') == "\ud800"
    found = parse_readable('{"a\\udce9": ["\\ud83d\\ude00", "\\uD800x", NaN], "b": "\\\\ud800"}')
    assert list(found) == ["a?", "b"]
    assert found["a?"][:2] == ["\U0001f600", "?x"] and math.isnan(found["a?"][2])
    assert found["b"] == "\\ud800"


def test_the_time_grows_with_the_length() -> None:
    for text in ("[" * 2_000_000, "[]" * 1_000_000, '["' * 1_000_000, "\\" * 2_000_000, '"[' * 1_000_000):
        start = time.perf_counter()
        with pytest.raises(ValueError):
            parse(text)
        assert time.perf_counter() - start < 3


# ---- metadata


STRANGE = {
    "deep": nested(5000, '{"a":', "}"),
    "deep list": nested(5000),
    "nan": '{"a": {"b": NaN, "c": Infinity, "d": -1e999}}',
    "digits": '{"a": {"b": ' + "9" * 4300 + ', "c": 9e999}, "d": {"b": ' + "9" * 4300 + "}}",
    "more digits": '{"a": {"b": ' + "9" * 10_000 + "}}",
    "half letters": '{"\\ud800": {"\\udce9": 3}, "buckets": {"\\ud800": {"resolution": [1, 2], "count": 1}}}',
    "not a table": '[{"a": 5}]',
    "other types": '{"a": {"b": [3], "c": {"d": 1}, "e": null}, "buckets": [1]}',
    "a long word": '{"a": {"' + "w" * 1_000_000 + '": 3}}',
    "no text": "\x00\x1b[2J\u202e<script>",
    "open": '{"a": {"b": 3',
    "empty": "",
}
KEYS = (
    "ss_output_name", "ss_tag_frequency", "ss_network_args", "ss_bucket_info", "ss_dataset_dirs", "ss_clip_skip",
    "ss_training_started_at", "ss_sd_model_name", "sshs_model_hash", "ssmd_cover_images", "modelspec.title", "other",
    "lora_adapter_metadata",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter for the small model, and one for each strange text, which is in all of its metadata."""
    for number, text in enumerate(STRANGE.values()):
        tensors = {"lora_unet_a.lora_up.weight": torch.ones(4, 1), "lora_unet_a.lora_down.weight": torch.ones(1, 4)}
        save_file(tensors, tmp_path / f"strange{number}.safetensors", dict.fromkeys(KEYS, text))
    shutil.copy(random_adapters.folder() / "tiny_lora.safetensors", tmp_path / "good.safetensors")
    return tmp_path


def test_the_cards_of_strange_files(folder: Path) -> None:
    from lib_locon.hosts.metadata_shown import facts_table as shown_facts
    from lib_locon.hosts.metadata_shown import words

    cards = Cards(Library([folder])).all()
    assert len(cards) == len(STRANGE) + 1
    for card in cards:
        assert card.facts is not None and not card.facts.problem, card.name
        html = shown_facts(card, FileMetadata(card.identity)) + words(FileMetadata(card.identity))
        texts = (*card.search_terms, *card.names, card.tag, html)
        assert all(len(text.encode()) < 100_000 for text in texts), card.name


@pytest.fixture
def webui(folder: Path) -> Iterator[Any]:
    with launch(lora_dir=folder, make_model=TinySD.random, make_app=FastAPI) as running:
        yield running


def test_lists_and_answers_with_strange_files(webui: Any, folder: Path) -> None:
    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    client = Client(webui.app)
    names = {path.stem for path in folder.glob("*.safetensors")}
    for address, body in (
        ("/sdapi/v1/loras", None),
        ("/locon/v1/adapters", None),
        *((f"/locon/v1/adapters/{name}", None) for name in sorted(names)),
        ("/locon/v1/fit", {"names": sorted(names)}),
        ("/locon/v1/dry-run", {"prompt": "".join(f"<lora:{name}:1>" for name in sorted(names))}),
    ):
        answer = client.get(address) if body is None else client.post(address, body)
        assert answer.status == 200, (address, answer.text[:300])
        found = json.loads(answer.text, parse_constant=strict)
        if address == "/sdapi/v1/loras":
            assert {item["name"] for item in found} == names
        if address == "/locon/v1/adapters":
            assert {item["name"] for item in found["adapters"]} == names
    image = webui.generate(
        "a <lora:good:1> " + "".join(f"<lora:{name}:1>" for name in sorted(names - {"good"})), steps=1
    )
    alone = webui.generate("a <lora:good:1>", steps=1)
    assert image.image.tobytes() == alone.image.tobytes()
    assert any(line.startswith("strange0 changes nothing") for line in image.comments)


def test_the_page_with_strange_files(webui: Any) -> None:
    from modules import ui_extra_networks

    (page,) = (page for page in ui_extra_networks.extra_pages if page.title == "Lora")
    html = page.create_html("txt2img")
    assert len(html.encode()) < 1_000_000
    assert all(f"strange{number}" in html for number in range(len(STRANGE))) and "good" in html


def test_words_and_names_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    long = "w" * (MOST_LETTERS + 1)
    metadata = {"ss_output_name": long, "ss_tag_frequency": json.dumps({"a": {long: 9, long[1:]: 3}})}
    tensors = {"lora_unet_a.lora_up.weight": torch.ones(4, 1), "lora_unet_a.lora_down.weight": torch.ones(1, 4)}
    save_file(tensors, path, metadata)
    facts = read_facts(path)
    assert (facts.alias, facts.triggers) == ("", (long[1:],))


def test_counts_that_cannot_be_printed_are_none() -> None:
    many = "9" * 4300
    assert training_words({"ss_tag_frequency": f'{{"a": {{"x": {many}, "y": 2}}, "b": {{"x": {many}, "y": 1}}}}'}) == [
        ("y", 3)
    ]


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, '{"alias": "\\ud800"}', '{"unread": ' + "9" * 4000 + "}", "9" * 9000, "{}\x00"],
    ids=["deep", "half a letter", "a long number", "a longer one", "not JSON"],
)
def test_a_strange_value_in_the_index(text: str, tmp_path: Path) -> None:
    adapter, index = tmp_path / "x.safetensors", tmp_path / "index.sqlite3"
    adapter.write_bytes(b"12")
    table = facts_table(index, allow_pickle=False)
    table[FileIdentity.of(adapter)] = Facts(alias="a")
    table.close()
    with sqlite3.connect(index) as database:
        database.execute("UPDATE facts SET value = ?", (text,))
    cards = Cards(Library([tmp_path]), FactsIndex(facts_table(index, allow_pickle=False)))
    (card,) = cards.all()
    assert card.facts is not None
    assert json.dumps(card.search_terms, ensure_ascii=False).encode()
