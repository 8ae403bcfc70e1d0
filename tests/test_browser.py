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
from html import escape, unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from extensions_builtin_shim import browser
from extensions_builtin_shim.app import App
from extensions_builtin_shim.launch import ADAPTERS, CHECKOUT, launch

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ONE, OTHER = sorted(path.stem for path in ADAPTERS.glob("*.safetensors"))[:2]
ATTACK = "<img src=x onerror=attacked()>"
MARKED = ATTACK
MARKED_TAG = ATTACK.replace(">", "%3E")
"""No tag can hold that name as it is."""
PARTLY = "partly"
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
    """Two shipped adapters, one that fits in part, and two files whose names and words are an attack."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in (ONE, OTHER):
        shutil.copy(ADAPTERS / f"{name}.safetensors", folder)
    attack = {"ss_output_name": f'"{ATTACK}', "ss_tag_frequency": json.dumps({"x": {ATTACK: 3}})}
    words = {"description": ATTACK, "activation text": f"{ATTACK}'\"", "notes": ATTACK, "preferred weight": "1)+alert("}
    tensors = load_file(ADAPTERS / f"{OTHER}.safetensors")
    module = next(iter(tensors)).partition(".")[0]
    moved = {
        key.replace(f"{module}.", "lora_te2_text_model_encoder_layers_0_mlp_fc1."): tensors[key] for key in tensors
    }
    save_file(moved, folder / f"{PARTLY}.safetensors")
    for name in (MARKED, STRANGE):
        save_file(load_file(ADAPTERS / f"{ONE}.safetensors"), folder / f"{name}.safetensors", attack)
        (folder / f"{name}.json").write_text(json.dumps(words))
    return folder


@pytest.fixture(scope="module")
def address(chromium: Browser, folder: Path) -> Iterator[str]:
    with launch(lora_dir=folder, make_app=App) as webui:
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
    assert {ONE, OTHER, PARTLY, STRANGE, MARKED} == set(all_names)
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
    assert card(page, MARKED).locator(".name").inner_text() == MARKED
    assert card(page, MARKED).locator(".description").inner_text() == ATTACK
    page.fill("#prompt", "cat")
    card(page, MARKED).click()
    assert prompt(page).startswith(f"cat <lora:{MARKED_TAG}:1> ")
    card(page, MARKED).click()
    assert prompt(page) == "cat"
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
        + "".join(f"<script type=module src='file=x\\javascript/{name}?17.5'></script>" for name in sorted(parts))
    )
    page = chromium.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.route("http://host.test/**", lambda route: route.fulfill(
        body=parts.get(route.request.url.rpartition("/")[2].partition("?")[0], host),
        content_type="text/javascript" if ".mjs" in route.request.url else "text/html",
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
    fetched = [url.rpartition("/")[2] for url in asked if ".mjs" in url]
    assert sorted(fetched) == [f"{name}?17.5" for name in sorted(parts)], "each once, none from an older version"
    assert unescape(cards).count(str(folder / f"{MARKED}.safetensors")) >= 1
    page.close()


# ---- the prompt box


@pytest.fixture
def box(page: Page) -> Any:
    """The prompt, empty and with the caret in it."""
    area = page.locator("#prompt")
    area.fill("")
    area.focus()
    return area


def offers(page: Page) -> list[str]:
    """What the open list offers."""
    page.locator(".locon-list").wait_for()
    return list(page.locator(".locon-offer-text").all_text_contents())


def chosen(page: Page) -> str:
    return page.locator(".locon-offer[aria-selected=true] .locon-offer-text").text_content() or ""


def closed(page: Page) -> bool:
    """Whether no list is open, and none comes."""
    page.wait_for_timeout(500)
    return page.locator(".locon-list").count() == 0


@pytest.mark.parametrize("kind", ["lora", "lyco"])
def test_a_name_is_completed(page: Page, box: Any, kind: str) -> None:
    box.press_sequentially(f"cat <{kind}:")
    assert {ONE, OTHER, PARTLY, STRANGE, MARKED_TAG} == set(offers(page))
    box.press_sequentially(ONE[1:4].upper())
    page.locator(".locon-offer").nth(1).wait_for(state="detached")
    assert offers(page) == [ONE]
    box.press("Enter")
    assert re.fullmatch(rf"cat <{kind}:{ONE}:[\d.]+>", prompt(page))
    assert closed(page)
    box.press_sequentially(":")
    assert offers(page)[:2] == ["te=", "te1="]
    box.press_sequentially("hrun")
    page.locator(".locon-offer").nth(1).wait_for(state="detached")
    box.press("Tab")
    box.press_sequentially("0.5")
    assert re.fullmatch(rf"cat <{kind}:{ONE}:[\d.]+:hrunet=0.5>", prompt(page))
    assert box.evaluate("element => element === document.activeElement")


def test_presets_follow_their_key(page: Page, box: Any) -> None:
    box.press_sequentially(f"<lora:{ONE}:1:lbw")
    page.locator(".locon-offer", has_text="lbwe=").wait_for()  # the list of names may still be open
    assert offers(page) == ["lbw=", "lbwe="]
    box.press("Enter")
    page.locator(".locon-offer", has_text="OUTALL").wait_for()
    box.press_sequentially("outa")
    page.locator(".locon-offer").nth(1).wait_for(state="detached")
    box.press("Enter")
    assert prompt(page) == f"<lora:{ONE}:1:lbw=OUTALL"


def test_keys_of_an_open_list(page: Page, box: Any) -> None:
    box.press_sequentially("<lora:")
    names = offers(page)
    assert chosen(page) == names[0]
    box.press("ArrowDown")
    assert chosen(page) == names[1]
    box.press("ArrowUp")
    box.press("ArrowUp")
    assert chosen(page) == names[-1]
    box.press("Escape")
    assert closed(page)
    assert prompt(page) == "<lora:"
    box.press_sequentially("x")
    box.press("Backspace")
    page.locator(".locon-list").wait_for()
    page.locator(".locon-offer", has_text=OTHER).click()
    assert prompt(page).startswith(f"<lora:{OTHER}:")
    assert box.evaluate("element => element === document.activeElement")


def test_while_an_answer_is_on_its_way(page: Page, box: Any) -> None:
    """The open list is still the one for fewer letters: a choice takes the place of all that was written."""
    box.press_sequentially("<lora:")
    name = offers(page)[0]
    page.route("**/locon/v1/complete?*", lambda route: None)
    box.press_sequentially("xyz")
    box.press("Tab")
    assert re.fullmatch(rf"<lora:{re.escape(name)}:[\d.]+>", prompt(page))
    page.unroute("**/locon/v1/complete?*")
    box.press_sequentially("<lora:")
    offers(page)
    box.press_sequentially(ONE[0])
    box.press("Escape")
    assert closed(page), "what comes after Escape opens no list"


def test_no_key_is_taken_from_a_closed_list(page: Page, box: Any) -> None:
    box.press_sequentially("one")
    box.press("Enter")
    box.press_sequentially("<lora:none at all")
    assert closed(page)
    box.press("Enter")
    box.press("ArrowUp")
    box.press("End")
    box.press_sequentially("!")
    assert prompt(page) == "one\n<lora:none at all!\n"
    box.press("Tab")
    assert not box.evaluate("element => element === document.activeElement")


def test_the_list_goes_when_the_caret_does(page: Page, box: Any) -> None:
    ways: dict[str, Any] = {
        "a key": lambda: box.press("Home"),
        "a click": lambda: page.click("h1"),
        "another field": lambda: box.blur(),
        "another size": lambda: page.set_viewport_size({"width": 900, "height": 700}),
    }
    for name, leave in ways.items():
        box.fill("")
        box.press_sequentially("<lora:")
        offers(page)
        leave()
        assert closed(page), name


def test_the_negative_prompt_too(page: Page) -> None:
    area = page.locator("#negative")
    area.focus()
    area.press_sequentially(f"<lora:{ONE}")
    page.wait_for_timeout(300)
    area.press_sequentially(":")
    assert "te=" in offers(page)
    area.press("Escape")
    area.press_sequentially("1>")
    page.locator("#txt2img_neg_prompt .locon-mistakes", has_text="no tags in the negative prompt").wait_for()


@pytest.mark.parametrize(
    "change", ["opts.locon_completion = false", "window.TAC_CFG = null", "window.TAC_CFG = {}; opts.tac_active = true"]
)
def test_it_stays_off(page: Page, box: Any, change: str) -> None:
    page.evaluate(change)
    box.press_sequentially("<lora:")
    assert closed(page)


def test_it_is_there_where_the_others_is_switched_off(page: Page, box: Any) -> None:
    page.evaluate("window.TAC_CFG = {}; opts.tac_active = true; opts.tac_useLoras = false")
    box.press_sequentially("<lora:")
    assert offers(page)


def test_a_card_and_a_pasted_text_open_no_list(page: Page, box: Any) -> None:
    card(page, ONE).click()
    page.evaluate("area => { area.value = '<lora:'; updateInput(area); }", box.element_handle())
    assert closed(page)


def test_the_caret_stands_under_the_place(page: Page, box: Any) -> None:
    box.fill(f"cat <lora:{ONE}:1.o>")
    place = page.locator("#txt2img_prompt .locon-place")
    place.wait_for()
    assert page.locator(".locon-sentence").inner_text() == "this tag will be skipped: '1.o' is no number"
    text = place.evaluate("pre => pre.firstChild.data")
    assert text == f"<lora:{ONE}:1.o>\n"
    # where the letter is drawn, and where the caret is
    letter, caret = place.evaluate(
        """(pre, at) => {
          const range = document.createRange();
          range.setStart(pre.firstChild, at);
          range.setEnd(pre.firstChild, at + 1);
          return [range, pre.querySelector(".locon-caret")].map((each) => each.getBoundingClientRect().toJSON());
        }""",
        text.index("1.o"),
    )
    assert abs(letter["left"] - caret["left"]) < 1
    assert caret["top"] >= letter["bottom"] - 4
    box.fill(f"cat <lora:{ONE}:1>")
    place.wait_for(state="detached")


def test_a_misspelt_name_is_told_while_it_is_written(page: Page, box: Any) -> None:
    box.fill(f"<lora:{ONE}x>")
    page.locator(".locon-sentence", has_text=f"there is no adapter '{ONE}x'").wait_for()
    box.fill("cat")
    page.locator(".locon-mistakes").wait_for(state="detached")
    page.evaluate("opts.locon_mistakes = false")
    box.fill(f"<lora:{ONE}y>")
    page.wait_for_timeout(1500)
    assert page.locator(".locon-mistakes").count() == 0


def test_hostile_names_in_the_box(page: Page, box: Any) -> None:
    box.press_sequentially("<lora:a'b")
    assert offers(page) == [STRANGE]
    box.press("Enter")
    assert prompt(page).startswith(f"<lora:{STRANGE}:")
    assert closed(page)
    assert page.locator(".locon-mistakes").count() == 0
    box.fill("<lora:<img src=x onerror=attacked():1>")
    page.locator(".locon-sentence", has_text="onerror=attacked()").wait_for()
    assert page.locator("img[src='x']").count() == 0


def test_a_badge_where_part_of_a_file_does_not_fit(page: Page) -> None:
    badge = card(page, PARTLY).locator(".locon-partial")
    badge.wait_for()
    assert re.fullmatch(r"(\d+)/(\d+) layers fit", badge.inner_text())
    assert "1 × the model has no te2" in (badge.get_attribute("title") or "")
    assert card(page, ONE).locator(".locon-partial").count() == 0
    # another model is there: whoever is in sight asks again
    page.route(
        "**/locon/v1/fit", lambda route: route.fulfill(json={"fits": {PARTLY: {"used": 0, "total": 9, "why": "<b>"}}})
    )
    page.set_viewport_size({"width": 900, "height": 300})
    page.evaluate("window.scrollTo(0, 0)")
    card(page, PARTLY).scroll_into_view_if_needed()
    page.locator(".locon-partial", has_text="does not fit").wait_for()
    assert page.locator(".locon-partial b").count() == 0


def test_a_card_is_made_anew_after_an_edit(chromium: Browser, address: str, folder: Path) -> None:
    """The host's own way looks the card up by its name, unquoted: a name with a quote in it would not be found."""
    from modules import shared, ui_extra_networks

    listed = ui_extra_networks.extra_pages[0]
    html = listed.create_html("txt2img")
    loaded = [html.partition('data-locon-model="')[2].partition('"')[0]]

    def served(route: Any) -> None:
        url = urlsplit(route.request.url)
        script = CHECKOUT / "javascript" / url.path.rpartition("/")[2]
        if script.suffix == ".mjs":
            route.fulfill(body=script.read_text(), content_type="text/javascript")
        elif url.path == "/sd_extra_networks/get-single-card":
            (name,) = parse_qs(url.query)["name"]
            item = listed.create_item(name, enable_filter=False)
            route.fulfill(
                json={"html": listed.create_item_html("txt2img", item, shared.html("extra-networks-card.html"))}
            )
        elif url.path == "/locon/v1/fit":
            route.fulfill(json={"fits": {}, "model": loaded[-1]})
        elif url.path == "/":
            editor = (
                "<div class=edit-user-metadata><div class=locon-activation><label><textarea></textarea></label></div>"
                f"<button class=locon-word data-word='a (b)'>{escape(ATTACK)}</button></div>"
            )
            stubs = "opts = {}; shut = 0; function gradioApp() { return document } function closePopup() { shut += 1 } "
            stubs += "function updateInput() {} function attacked() { window.wrong = true }"
            script = "<script type=module src='file=x/javascript/locon.mjs'></script>"
            prompts = "<div id=txt2img_prompt><label><textarea>cat</textarea></label></div>"
            body = f"<body>{prompts}{html}{editor}<script>{stubs}</script>{script}"
            route.fulfill(body=body, content_type="text/html")
        else:
            route.fulfill(status=404)

    page = chromium.new_page()
    page.route("http://host.test/**", served)
    page.goto("http://host.test/")
    page.wait_for_function("window.loconSaved !== undefined")
    for name in (STRANGE, ONE):
        file = folder / f"{name}.json"
        before = file.read_bytes() if file.exists() else None
        file.write_text(json.dumps({"description": f"{ATTACK} new"}))
        page.evaluate("name => loconSaved(name, true)", name)
        card(page, name).locator(".description", has_text=" new").wait_for()
        file.write_bytes(before) if before else file.unlink()
        card(page, name).click()
        assert f"<lora:{name}:" in page.locator("textarea").first.input_value(), "the new card can be clicked"
    assert page.evaluate("shut") == 2
    stale = page.locator(".locon-stale-note")
    with page.expect_response("**/locon/v1/fit"):
        page.set_viewport_size({"width": 700, "height": 300})
        page.evaluate("window.scrollTo(0, 10000)")
        page.evaluate("window.scrollTo(0, 0)")
    assert page.locator(".locon-stale").count() == 0
    loaded.append("SDXL")
    with page.expect_response("**/locon/v1/fit"):
        page.evaluate("window.scrollTo(0, 10000)")
    page.locator(".locon-stale").wait_for()
    assert "refresh to see" in (stale.text_content() or "")
    page.evaluate("loconSaved('', true)")
    assert page.evaluate("shut") == 2
    page.click(".locon-word")
    assert page.input_value(".locon-activation textarea") == r"a \(b\)"
    page.click(".locon-word")
    assert page.input_value(".locon-activation textarea") == ""
    assert page.locator("img[src='x']").count() == 0
    assert page.evaluate("window.wrong") is None
    page.close()
