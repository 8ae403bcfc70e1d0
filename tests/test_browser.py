"""The page as its user meets it, in a real browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from extensions_builtin_shim import browser
from extensions_builtin_shim.launch import ADAPTERS, CHECKOUT, launch

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ONE, OTHER = sorted(path.stem for path in ADAPTERS.glob("*.safetensors"))[:2]
ATTACK = "<img src=x onerror=attacked()>"
UNUSABLE = ATTACK
STRANGE = "a'b\"c&d \\ (x) [y] <b"
"""A file's name that a tag can hold: no `:` and no `>`."""


def _program() -> str:
    program = browser.find()
    if program is None:
        # a test run that is meant to see the page must not pass without having seen it
        (pytest.fail if os.environ.get("LOCON_BROWSER") == "required" else pytest.skip)(browser.HOW_TO_GET)
    return program


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.started(_program()) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shipped adapters, and two files whose names and words are an attack."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in (ONE, OTHER):
        shutil.copy(ADAPTERS / f"{name}.safetensors", folder)
    attack = {"ss_output_name": f'"{ATTACK}', "ss_tag_frequency": json.dumps({"x": {ATTACK: 3}})}
    words = {"description": ATTACK, "activation text": f"{ATTACK}'\"", "notes": ATTACK, "preferred weight": "1)+alert("}
    for name in (UNUSABLE, STRANGE):
        save_file(load_file(ADAPTERS / f"{ONE}.safetensors"), folder / f"{name}.safetensors", attack)
        (folder / f"{name}.json").write_text(json.dumps(words))
    return folder


@pytest.fixture(scope="module")
def address(chromium: Browser, folder: Path) -> Iterator[str]:
    with launch(lora_dir=folder) as webui:
        from extensions_builtin_shim.page import Server

        server = Server(webui, 0)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        webui.interrupt()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Page]:
    """The page, freshly opened, with few steps. Whatever a script complains about fails the test."""
    page = chromium.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(address)
    page.locator(".card").first.wait_for()
    page.fill("#steps", "2")
    yield page
    page.close()
    # a refusal by the server (400) is logged by the browser itself, and expected where a test provokes it
    assert [text for text in complaints if "400" not in text] == []


def generated(page: Page) -> str:
    """Presses Generate and returns the image."""
    page.click("#generate")
    page.locator("#results[aria-busy=false]").wait_for()
    return shown(page)


def shown(page: Page) -> str:
    return page.locator("#image").get_attribute("src") or ""


def pixels(image: str) -> bytes:
    """Without the text in the file, which tells the prompt."""
    return Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).tobytes()


def card(page: Page, name: str) -> Any:
    return page.locator(f".card[data-name={json.dumps(name)}]")


def comments(page: Page) -> str:
    return "\n".join(page.locator("#comments li").all_text_contents())


def prompt(page: Page) -> str:
    return page.input_value("#prompt")


def test_an_adapter_comes_and_goes(page: Page) -> None:
    page.fill("#prompt", "a red circle")
    first = generated(page)
    assert first.startswith("data:image/png;base64,")
    card(page, ONE).click()
    assert prompt(page) == f"a red circle <lora:{ONE}:1>"
    assert "locon-used" in card(page, ONE).get_attribute("class")
    assert generated(page) != first
    assert re.search(rf"^{ONE} \(.+\) at 1: \d+/\d+ layers", comments(page))
    card(page, ONE).click()
    assert prompt(page) == "a red circle"
    assert "locon-used" not in card(page, ONE).get_attribute("class")
    assert generated(page) == first
    assert comments(page) == ""


@pytest.mark.parametrize("tag", ["-0.5", "0.5:1", "te=0.2:unet=-1", "0.5:1:2", "two"])
def test_a_click_takes_every_form_of_the_tag_away(page: Page, tag: str) -> None:
    page.fill("#prompt", f"cat <lora:{ONE}:{tag}>, dog <lora:{OTHER}:1>")
    card(page, ONE).click()
    assert prompt(page) == f"cat, dog <lora:{OTHER}:1>"


def test_a_misspelt_name(page: Page) -> None:
    first = generated(page)
    page.fill("#prompt", f"{prompt(page)} <lora:{ONE}x:1>")
    generated(page)
    assert f"there is no adapter '{ONE}x'" in comments(page)
    assert re.search(rf"\(near it: .*{ONE}", comments(page))
    page.fill("#prompt", prompt(page).replace(f" <lora:{ONE}x:1>", ""))
    assert generated(page) == first


def test_a_strength_that_is_no_number(page: Page) -> None:
    tag = f"<lora:{ONE}:1.o>"
    page.fill("#prompt", f"cat {tag}")
    generated(page)
    (comment,) = page.locator("#comments li").all()
    assert "'1.o'" in comment.inner_text()
    quoted, caret = (comment.locator("pre").text_content() or "").split("\n")
    assert quoted.strip() == tag
    assert quoted[len(caret.rstrip()) - 1 :].startswith("1.o"), "the caret stands under the wrong place"
    assert "monospace" in comment.locator("pre").evaluate("element => getComputedStyle(element).fontFamily")
    assert comment.locator("pre").evaluate("element => getComputedStyle(element).whiteSpace") == "pre"


def test_wrong_fields_are_sentences_on_the_page(page: Page) -> None:
    page.fill("#steps", "0")
    page.click("#generate")
    status = page.locator("#status.error")
    assert "Steps" in status.inner_text()
    page.fill("#steps", "2")
    page.evaluate("document.getElementById('prompt').removeAttribute('maxlength')")
    page.fill("#prompt", "x" * 10_001)
    generated(page)
    assert "may have 10000 characters" in status.inner_text()
    page.fill("#prompt", "x")
    generated(page)
    assert status.count() == 0


def test_interrupt_and_progress(page: Page) -> None:
    page.fill("#steps", "200")
    page.fill("#count", "3")
    page.click("#generate")
    page.locator("#status", has_text=re.compile(r"step [1-9]\d* of 200")).wait_for()
    assert 0 < page.locator("#progress").evaluate("bar => bar.value") < 1
    page.click("#interrupt")
    page.locator("#results[aria-busy=false]").wait_for()
    assert page.inner_text("#status").startswith("Interrupted")
    assert shown(page)
    assert page.locator("#interrupt").is_hidden()


def test_gallery(page: Page) -> None:
    page.fill("#count", "3")
    first = generated(page)
    thumbs = page.locator("#gallery .thumb")
    assert thumbs.count() == 3
    thumbs.nth(2).click()
    assert shown(page) != first
    assert "Seed: 3" in page.inner_text("#infotext")
    page.click("#again")
    assert page.input_value("#seed") == "3"


def test_infotext_makes_the_image_again(page: Page) -> None:
    page.fill("#prompt", f"a blue square <lora:{ONE}:0.7>\nsecond line")
    page.fill("#negative", 'red, "dark"')
    page.fill("#guidance", "3.5")
    page.click("#dice")
    assert page.input_value("#seed") == "-1"
    image, text = generated(page), page.inner_text("#infotext")
    page.reload()
    page.locator(".card").first.wait_for()
    page.fill("#prompt", text)
    page.click("#read")
    page.locator("#status", has_text="The fields are those").wait_for()
    assert prompt(page) == f"a blue square <lora:{ONE}:0.7>\nsecond line"
    assert page.input_value("#negative") == 'red, "dark"'
    assert "locon-used" in card(page, ONE).get_attribute("class")
    assert generated(page) == image
    page.click("#read")
    assert "no image's text" in page.locator("#status.error").inner_text()


def test_search_and_sort(page: Page) -> None:
    def names() -> list[str]:
        return list(page.locator(".card:visible .name").all_text_contents())

    all_names = names()
    assert {ONE, OTHER, STRANGE, UNUSABLE} == set(all_names)
    page.fill(".search", OTHER.upper())
    assert names() == [name for name in all_names if OTHER in name]
    page.fill(".search", "")
    page.select_option(".sort", "name")
    upward = names()
    assert upward.index(ONE) < upward.index(OTHER)
    page.click(".direction")
    assert names() == upward[::-1]


def test_names_and_words_of_files_stay_text(page: Page) -> None:
    assert page.locator("img[src='x']").count() == 0
    assert card(page, UNUSABLE).locator(".name").inner_text() == UNUSABLE
    assert card(page, UNUSABLE).locator(".description").inner_text() == ATTACK
    assert card(page, UNUSABLE).is_disabled()
    assert "rename the file" in card(page, UNUSABLE).get_attribute("title")
    page.fill("#prompt", "cat")
    card(page, STRANGE).click()
    assert prompt(page) == f"cat <lora:{STRANGE}:1> {ATTACK}'\""
    generated(page)
    assert f"{STRANGE} (" in comments(page)
    assert page.locator("img[src='x']").count() == 0
    card(page, STRANGE).click()
    assert prompt(page) == "cat"


def test_grid(page: Page) -> None:
    page.fill("#prompt", f"a red circle <lora:{ONE}:1>")
    page.fill("#seed", "5")
    page.click("#grid-open")
    assert page.locator("#grid-adapters input:checked").count() == 1
    page.locator("#grid-adapters .chip", has_text=OTHER).first.locator("input").check()
    page.fill("#grid-strengths", "0, -1")
    page.click("#grid")
    page.locator("#status", has_text="A grid of 4 images").wait_for()
    images = page.locator("#grid-result .thumb img").evaluate_all("images => images.map((image) => image.src)")
    page.fill("#prompt", "a red circle")
    base = pixels(generated(page))
    assert [pixels(image) == base for image in images] == [True, False, True, False]
    assert pixels(images[1]) != pixels(images[3])
    page.fill("#grid-strengths", "0, much")
    page.click("#grid")
    assert '"much" is no strength' in page.locator("#status.error").inner_text()


def test_the_html_that_the_host_would_show(chromium: Browser, address: str, folder: Path) -> None:
    """The registered page's own HTML, with its inline scripts allowed as the webui allows them, and our script."""
    from modules import ui_extra_networks

    cards = ui_extra_networks.extra_pages[0].create_html("txt2img")
    parts = {path.name: path.read_text() for path in (CHECKOUT / "javascript").glob("*.mjs")}
    host = (
        "<body><div id=txt2img_prompt><label><textarea>cat</textarea></label></div><div id=txt2img_neg_prompt><label>"
        "<textarea></textarea></label></div>" + cards + "<script>opts = {extra_networks_default_multiplier: 0.8, "
        "extra_networks_add_text_separator: ', '}; function gradioApp() { return document } function updateInput() {} "
        "function cardClicked() { attacked() } function attacked() { window.wrong = true }</script>"
        "<script type=module src='file=x/javascript/locon.mjs'></script>"
    )
    page = chromium.new_page()
    page.route("http://host.test/**", lambda route: route.fulfill(
        body=parts.get(route.request.url.rpartition("/")[2], host),
        content_type="text/javascript" if route.request.url.endswith(".mjs") else "text/html",
    ))  # fmt: skip
    page.goto("http://host.test/")
    area = page.locator("textarea").first
    for name, inserted in {ONE: f"<lora:{ONE}:0.8>", STRANGE: f"<lora:{STRANGE}:0.8> {ATTACK}'\""}.items():
        shown = card(page, name)
        shown.click()
        assert area.input_value() == f"cat, {inserted}"
        shown.click()
        assert area.input_value() == "cat"
    assert page.locator("img[src='x']").count() == 0
    assert page.evaluate("window.wrong") is None
    assert unescape(cards).count(str(folder / f"{UNUSABLE}.safetensors")) >= 1
    page.close()
