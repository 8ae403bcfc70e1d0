"""Our part of the host's page, with a real gradio and over the web. `tests/test_gradio_versions.py` runs this."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio
import pydantic
import pytest
from safetensors.torch import load_file, save_file

from extensions_builtin_shim.launch import launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from tests import random_adapters
from tests.gradio_host import TAB, Page, until

put_modules_on_path()
LOGIN = ("somebody", "a word")
ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Lora"
    folder.mkdir()
    shutil.copy(random_adapters.folder() / "tiny_lora.safetensors", folder)
    tensors = load_file(random_adapters.folder() / "tiny_locon.safetensors")
    metadata = {"ss_output_name": ATTACK, "ss_tag_frequency": json.dumps({"a": {"zorp": 3, ATTACK: 2}})}
    save_file(tensors, folder / "conv.safetensors", metadata)
    return folder


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., tuple[Any, Page]]]:
    running: list[tuple[Any, Page]] = []

    def run(**options: Any) -> tuple[Any, Page]:
        page = Page(**options)
        running.append((launch(lora_dir=folder, make_model=TinySD.random, make_app=page), page))
        return running[-1]

    yield run
    for webui, page in running:
        page.close()
        webui.close()


def ask(url: str, body: Any = None, opener: Any = urllib.request) -> tuple[int, Any]:
    """(status, text or what its JSON says)."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    open_ = opener.urlopen if opener is urllib.request else opener.open
    try:
        with open_(urllib.request.Request(url, data), timeout=30) as answer:
            status, kind, text = answer.status, answer.headers.get_content_type(), answer.read()
    except urllib.error.HTTPError as error:
        status, kind, text = error.code, error.headers.get_content_type(), error.read()
    return status, json.loads(text) if kind == "application/json" else text.decode()


def test_it_is_the_gradio_that_was_asked_for() -> None:
    found = f"gradio {gradio.__version__}, pydantic {pydantic.VERSION.partition('.')[0]}"
    assert found == os.environ["LOCON_EXPECTED"]


# ---- the page


def test_the_page_comes_up_with_our_parts_in_it(start: Callable[..., Any]) -> None:
    _, page = start()
    status, html = ask(page.url)
    assert status == 200
    _, config = ask(f"{page.url}config")
    ids = {part.get("props", {}).get("elem_id") for part in config["components"]}
    window = f"{TAB}_lora_edit_user_metadata"
    assert {f"{TAB}_lora_cards_html", window, f"{window}_name", f"{window}_button", "setting_locon_side_path"} <= ids
    assert "gradio" in html


def test_the_cards_come_over_the_web(start: Callable[..., Any]) -> None:
    _, page = start()
    assert until(lambda: "being read" not in page.call("refresh"))
    html = page.call("refresh")
    assert html.count("data-locon-names") == 2
    assert "LoCon" in html
    assert ATTACK not in html


def test_after_reload_ui_the_new_page_has_them(start: Callable[..., Any], folder: Path) -> None:
    webui, page = start()
    old = page.demo
    webui.reload_ui()
    assert page.demo is not old
    assert page.call("refresh").count("data-locon-names") == 2
    assert ask(f"{page.url}locon/v1/loaded")[0] == 200


# ---- the settings


def test_every_setting_of_ours_has_its_part_on_the_page_and_takes_its_value(start: Callable[..., Any]) -> None:
    from modules import shared

    from lib_locon.settings import BUILTIN_SETTINGS, SETTINGS

    _, page = start()
    ours = [setting.key for setting in (*SETTINGS, *BUILTIN_SETTINGS)]
    assert set(ours) <= set(page.settings)
    kinds = {key: type(page.settings[key]).__name__ for key in ours}
    assert kinds["sd_lora"] == "Dropdown"
    assert kinds["locon_side_path"] in ("Checkbox", "Radio")
    assert kinds["lora_hide_unknown_for_versions"] == "CheckboxGroup"
    before = {key: getattr(shared.opts, key) for key in page.settings}
    assert page.call("apply_settings", *before.values()) == ""  # what the page shows is what they are
    changed = {**before, "sd_lora": "conv", "lora_in_memory_limit": 3, "lora_hide_unknown_for_versions": ["SD1"]}
    page.call("apply_settings", *changed.values())
    assert {key: getattr(shared.opts, key) for key in changed} == changed
    assert type(shared.opts.lora_in_memory_limit) is int


# ---- the window behind a card's edit button


def test_the_window_shows_and_saves(start: Callable[..., Any], folder: Path) -> None:
    from lib_locon.hosts.metadata_editor import FIELDS

    _, page = start()
    browser = page.session()
    fields = dict(zip(FIELDS, page.call("shown", "conv", session=browser)[4:], strict=False))
    assert fields["description"] == ""
    assert fields["preferred weight"] == 0
    assert fields["sd version"] == "Unknown"
    fields |= {"description": "a <b>", "preferred weight": 0.7, "sd version": "SDXL", "activation text": "zorp, x"}
    given = [fields[key] for key in FIELDS]
    status, saved = page.call("save", "conv", *given, session=browser)
    assert (status, saved) == ("", "conv")
    written = json.loads((folder / "conv.json").read_text())
    assert written == {key: fields[key] for key in ("description", "preferred weight", "sd version", "activation text")}
    again = page.call("shown", "conv", session=page.session())
    assert dict(zip(FIELDS, again[4:], strict=False)) == fields
    assert all(ATTACK not in part for part in again[:4])


def test_another_browser_cannot_save_what_it_does_not_show(start: Callable[..., Any], folder: Path) -> None:
    _, page = start()
    page.call("shown", "conv", session=page.session())
    status, saved = page.call("save", "conv", "x", "", "", 0, "Unknown", "", session=page.session())
    assert "Not saved" in status
    assert saved == ""
    assert not (folder / "conv.json").exists()


# ---- messages on the page


@pytest.mark.parametrize("kind", ["Warning", "Info"])
def test_a_message_outside_the_page_is_no_error(kind: str) -> None:
    """A run that came in by the API has no page to say anything on."""
    from lib_locon.hosts import services

    services._pop_up(kind, "no adapter 'gone'")


# ---- the addresses


def test_the_addresses_answer_and_refuse_in_json(start: Callable[..., Any]) -> None:
    _, page = start()
    status, listed = ask(f"{page.url}sdapi/v1/loras")
    assert status == 200
    assert [set(item) for item in listed] == [{"name", "alias", "path", "metadata"}] * 2
    assert ask(f"{page.url}sdapi/v1/refresh-loras", b"") == (200, None)
    status, found = ask(f"{page.url}locon/v1/adapters?per_page=1")
    assert (status, found["total"], len(found["adapters"])) == (200, 2, 1)
    assert ask(f"{page.url}locon/v1/adapters/conv")[1]["name"] == "conv"
    status, dry = ask(f"{page.url}locon/v1/dry-run", {"prompt": "<lora:conv:1>"})
    assert status == 200
    assert dry["written"] > 0
    for path, body, expected in (
        ("adapters?page=x", None, 400),
        ("adapters/gone", None, 404),
        ("dry-run", {"prompt": 1}, 400),
        ("dry-run", b"{", 400),
    ):
        status, answer = ask(f"{page.url}locon/v1/{path}", body)
        assert status == expected
        assert list(answer) == ["error"]


def test_a_page_with_a_login_asks_for_it_at_our_addresses(start: Callable[..., Any]) -> None:
    _, page = start(auth=LOGIN)
    status, answer = ask(f"{page.url}locon/v1/loaded")
    assert (status, list(answer)) == (401, ["error"])
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    wrong = urlencode({"username": LOGIN[0], "password": "another"}).encode()
    assert ask(f"{page.url}login", wrong, browser)[0] == 400
    assert ask(f"{page.url}locon/v1/loaded", opener=browser)[0] == 401
    form = urlencode({"username": LOGIN[0], "password": LOGIN[1]}).encode()
    assert ask(f"{page.url}login", form, browser)[0] == 200
    assert ask(f"{page.url}locon/v1/loaded", opener=browser)[0] == 200


def test_the_host_can_still_describe_its_own_addresses(start: Callable[..., Any]) -> None:
    """FastAPI makes the description of all routes; ours are none of its kind."""
    webui, _ = start()
    described = webui.app.openapi()
    assert "paths" in described
    assert not [path for path in described["paths"] if path.startswith("/locon")]
