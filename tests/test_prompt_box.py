"""What the prompt boxes of the page are told: how a tag may go on, and what is wrong with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file, save_file

from extensions_builtin_shim.app import App
from extensions_builtin_shim.launch import ADAPTERS, launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.cards import Card, Cards
from lib_locon.facts import Facts
from lib_locon.files.reader import FileIdentity
from lib_locon.library import Library
from lib_locon.names import Names
from lib_locon.prompt.completion import Place, Word, place_at_end, ranked, words
from lib_locon.prompt.keys import KEYS
from lib_locon.prompt.presets import BUILT_IN
from lib_locon.user_metadata import UserMetadata
from tests import random_adapters

put_modules_on_path()
ATTACK = "<img src=x onerror=attacked()>"


# ---- where a tag stands


@pytest.mark.parametrize(
    ("tag", "kind", "word"),
    [
        ("<lora:", "name", ""),
        ("<lyco:a b", "name", "a b"),
        ("<lora: a", "name", "a"),
        ("<lora:<lora:", "key", ""),
        ("<lora:a:", "key", ""),
        ("<lora:a:0.5:t", "key", "t"),
        ("<lora:a:0.5:lbw=", "lbw", ""),
        ("<lora:a:w=OUT", "lbw", "OUT"),
        ("<lora:a: lbw = OUT", "lbw", "OUT"),
        ("<lora:a:lbwe=ATT", "lbwe", "ATT"),
    ],
)
def test_what_is_being_written(tag: str, kind: str, word: str) -> None:
    assert place_at_end(tag) == Place(kind, word)


@pytest.mark.parametrize(
    "tag", ["", "<lora", "lora:a", "<hypernet:a", "<lora:a:te=", "<lora:a>", "x <lora:a", "<lora:a:b=c=d"]
)
def test_where_nothing_is_offered(tag: str) -> None:
    assert place_at_end(tag) is None


def test_every_key_is_offered_with_a_sentence() -> None:
    found = words(Place("key", ""))
    assert {word.text for word in found} == {f"{key}=" for key in KEYS}
    assert all(word.about and len(word.about) < 100 for word in found)
    assert [word.text for word in words(Place("key", "te"))] == ["te=", "te1=", "te2=", "hrte=", "step="]
    assert words(Place("key", "0.5")) == []


def test_presets_are_offered_the_users_too() -> None:
    own = BUILT_IN.with_text("FACE:1,0,0,0,0,0,0,0,1,1,1,0.2,0,0,0,0,0\nSOFT:IN05-OUT05:attn1:0.5")
    assert words(Place("lbw", "fac"), own) == [Word("FACE", "1,0,0,0,0,0,0,0,1,1,1,0.2,0,0,0,0,0")]
    assert [word.text for word in words(Place("lbwe", ""), own)] == ["ATTNDEEPON", "ATTNDEEPOFF", "PROJDEEPOFF", "SOFT"]
    assert [word.text for word in words(Place("lbw", "OUTS"))] == ["OUTS"]


def test_best_first() -> None:
    names = ["xxfoxxx", "big_fox", "foxes", "fox", "none", "a FOX", "FoXy"]
    assert ranked("fox", [(name, (name,)) for name in names]) == ["fox", "foxes", "FoXy", "big_fox", "a FOX", "xxfoxxx"]
    assert ranked("", [(name, (name,)) for name in names]) == names
    assert ranked("fox", [("by its second name", ("a", "fox")), ("x", ("firefox",))]) == ["by its second name", "x"]


# ---- names


def card(name: str, alias: str = "", base: str = "SD1", read: bool = True) -> Card:
    path, stem = Path(f"/x/{name}.safetensors"), name.rpartition("/")[2]
    names = tuple(dict.fromkeys(filter(None, (name, stem, alias))))
    facts = Facts(alias=alias, base=base) if read else None
    return Card(stem, stem, path, FileIdentity(str(path), 1, 1), 0, facts, UserMetadata(), None, names)


def test_names_are_found_by_path_stem_and_alias() -> None:
    cards = [card("styles/ink", "Ink wash"), card("people/ann"), card("other")]
    names = Names(cards)
    for text, found in {"INK": "ink", "styles/": "ink", "wash": "ink", "ople": "ann", "oth": "other"}.items():
        assert [each.name for each in names.search(text)] == [found]
    assert names.search("") == cards
    assert names.search("zzz") == []


def test_what_does_not_fit_the_model_comes_last() -> None:
    names = Names([card("fox", base="SDXL"), card("foxes", base="SD1"), card("big fox", base="")])
    assert [each.name for each in names.search("fox", "SD1")] == ["foxes", "big fox", "fox"]
    assert [each.name for each in names.search("fox", "SDXL")] == ["fox", "big fox", "foxes"]


def test_which_names_lead_to_one_file() -> None:
    """As the library has it: path before file name before alias, and two files are no answer."""
    names = Names([card("a/x", "alias"), card("b/x", "twice"), card("y", "twice"), card("z", "y"), card("x")])
    assert {name for name in ("a/x", "b/x", "x", "y", "z", "alias", "twice", "none") if names.problem(name)} == {
        "twice", "none",
    }  # fmt: skip
    assert names.problem("twice").startswith("'twice' could be any of these: b/x, y.")
    assert names.problem("ALIAS") == "there is no adapter 'ALIAS' (near it: alias)"
    assert "and 4 more" in Names([card(f"{part}/same") for part in "abcdefghi"]).problem("same")
    assert names.complete
    assert not Names([card("a"), card("b", read=False)]).complete


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "secret user" / "Lora"
    (folder / "sub").mkdir(parents=True)
    tensors = load_file(random_adapters.folder() / "tiny_lora.safetensors")
    for name, alias in {"one": "", "sub/ink": "Ink wash", "twin": "", "sub/twin": ""}.items():
        save_file(tensors, folder / f"{name}.safetensors", {"ss_output_name": alias} if alias else None)
    (folder / "sub" / "ink.json").write_text(json.dumps({"preferred weight": 0.7}))
    return folder


def test_names_agree_with_the_library(folder: Path) -> None:
    library = Library([folder])
    names = Names(Cards(library).all())
    for name in ("one", "ink", "sub/ink", "Ink wash", "twin", "sub/twin", "none", "sub", ""):
        try:
            library.find(name)
        except Exception:  # noqa: BLE001  whatever it says
            assert names.problem(name), name
        else:
            assert not names.problem(name), name


# ---- the addresses


class Client:
    """The answers hold no folder of this computer."""

    def __init__(self, app: App) -> None:
        self.app = app

    def complete(self, tag: str) -> Any:
        return self._ask("GET", "/locon/v1/complete", f"tag={quote(tag)}")

    def mistakes(self, prompt: Any, **more: Any) -> Any:
        return self._ask("POST", "/locon/v1/parse", body={"prompt": prompt, **more})["mistakes"]

    def refused(self, path: str, body: Any) -> tuple[int, str]:
        status, content, _ = self.app.answer("POST", path, "", json.dumps(body).encode()) or (0, b"{}", "")
        return status, json.loads(content)["error"]

    def _ask(self, method: str, path: str, query: str = "", body: Any = None) -> Any:
        found = self.app.answer(method, path, query, b"" if body is None else json.dumps(body).encode())
        assert found is not None
        status, content, kind = found
        assert (status, kind) == (200, "application/json")
        assert "secret user" not in content.decode()
        return json.loads(content)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Any]]:
    running: list[Any] = []

    def run(**options: Any) -> Any:
        running.append(launch(lora_dir=folder, make_model=TinySD.random, make_app=App, **options))
        return running[-1]

    yield run
    for webui in running:
        webui.close()


@pytest.fixture
def client(start: Callable[..., Any]) -> Client:
    from modules import shared

    webui = start()
    webui.generate("cat", steps=1)  # loads the model
    assert shared.sd_model is not None
    client = Client(webui.app)
    client.complete("<lora:")
    return client


def test_names_in_the_box(client: Client) -> None:
    found = client.complete("<lora:ink")
    assert (found["kind"], found["word"], found["total"]) == ("name", "ink", 1)
    (offer,) = found["offers"]
    assert (offer["text"], offer["weight"]) == ("Ink wash", "0.7")
    assert "sub/ink" in offer["about"]
    assert "LoRA" in offer["about"]
    assert [offer["text"] for offer in client.complete("<lyco:twin")["offers"]] == ["sub/twin", "twin"]
    assert client.complete("cat")["offers"] == []
    assert client.complete("<lora:" + "x" * 100_000)["offers"] == []


def test_what_is_offered_works(client: Client) -> None:
    for offer in client.complete("<lora:")["offers"]:
        assert client.mistakes(f"cat <lora:{offer['text']}:1>") == []


def test_only_the_first_fifty(client: Client, folder: Path) -> None:
    save_file({"x.alpha": torch.ones(1)}, folder / "manyother.safetensors")
    for number in range(60):
        save_file({"x.alpha": torch.ones(1)}, folder / f"many{number:02}.safetensors")
    found = client.complete("<lora:many")
    assert found["total"] == 61
    assert len(found["offers"]) == 50


def test_a_new_file_is_offered_at_once(client: Client, folder: Path) -> None:
    assert client.complete("<lora:newcomer")["total"] == 0
    save_file({"x.alpha": torch.ones(1)}, folder / "newcomer.safetensors")
    assert client.complete("<lora:newcomer")["total"] == 1
    (folder / "newcomer.safetensors").unlink()
    assert client.complete("<lora:newcomer")["total"] == 0


def test_the_names_are_not_listed_at_each_letter(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[bool] = []
    everything = Cards.all
    monkeypatch.setattr(Cards, "all", lambda self, **options: listed.append(True) or everything(self, **options))
    for tag in ("<lora:o", "<lora:on", "<lora:one", "<lora:one:"):
        client.complete(tag)
    assert listed == []


def test_the_setting_for_names_counts(client: Client) -> None:
    from modules import shared

    shared.opts.set("lora_preferred_name", "Filename")
    assert [offer["text"] for offer in client.complete("<lora:ink")["offers"]] == ["ink"]


@pytest.mark.parametrize(
    ("prompt", "message", "under"),
    [
        ("<lora:one:1.o>", "this tag will be skipped: '1.o' is no number", "1.o"),
        ("cat <lora: one:te=x> dog", "this tag will be skipped: 'x' is no number", "x>"),
        ("<lora::1>", "this tag will be skipped: it names no adapter", ":1>"),
        ("<lora:one:lbw=OUTAL>", "this tag will be skipped: lbw has no preset 'OUTAL' (near it: OUTALL", "OUTAL>"),
        ("<lyco: onee:1>", "there is no adapter 'onee' (near it: one)", "onee"),
        ("<lora:twinn>", "there is no adapter 'twinn'", "twinn"),
        ("<lora:one:strat=3>", "'strat=3' is not understood and was ignored (is start= meant?)", "strat=3"),
        ("<lora:🌟🌟:1>", "there is no adapter '🌟🌟'", "🌟🌟"),
    ],
)
def test_a_mistake_has_a_sentence_and_a_place(client: Client, prompt: str, message: str, under: str) -> None:
    (mistake,) = client.mistakes(prompt)
    assert mistake["message"].startswith(message)
    assert mistake["tag"] in prompt
    assert mistake["tag"][mistake["at"] :].startswith(under)
    assert mistake["warning"] is ("ignored" in message)


def test_an_ambiguous_name(start: Callable[..., Any], folder: Path) -> None:
    for part in "ab":
        (folder / part).mkdir()
        save_file({"x.alpha": torch.ones(1)}, folder / part / "same.safetensors")
    client = Client(start().app)
    client.complete("<lora:")
    (mistake,) = client.mistakes("<lora:same>")
    assert mistake["message"].startswith("'same' could be any of these: a/same, b/same.")


def test_what_is_right_is_not_talked_about(client: Client) -> None:
    for prompt in (
        "",
        "a cat",
        "<lora:one:1>",
        "<lora:one:1:0@0,1@0.5:hr=0.3>",
        "<hypernet:x:1>",
        "<lora:one",
        "<lora:>",
    ):
        assert client.mistakes(prompt) == []


def test_no_file_is_read_whole_for_a_hash(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_locon import library

    monkeypatch.setattr(library, "hashes_of", lambda identity: pytest.fail(f"{identity} is read"))
    assert client.mistakes("<lora:#0123abcd4567:1>") == []


def test_nothing_is_said_of_a_name_before_all_headers_are_read(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be an alias."""
    from lib_locon import facts

    may_read, read = threading.Event(), facts.read_facts
    monkeypatch.setattr(facts, "read_facts", lambda path, **options: may_read.wait(30) and read(path, **options))
    monkeypatch.setattr("lib_locon.hosts.prompt_api.UNSURE", 0.0)
    client = Client(start().app)
    assert client.mistakes("<lora:Ink wash:1><lora:nothing:1>") == []
    assert client.mistakes("<lora:one:x>")
    may_read.set()
    deadline = time.monotonic() + 30
    while not client.mistakes("<lora:nothing:1>"):
        assert time.monotonic() < deadline
    assert client.mistakes("<lora:Ink wash:1>") == []


def test_tags_in_the_negative_prompt_do_nothing(client: Client) -> None:
    (mistake,) = client.mistakes("bad <lora:one:1>", negative=True)
    assert "no tags in the negative prompt" in mistake["message"]
    assert (mistake["tag"], mistake["warning"]) == ("<lora:one:1>", True)
    assert client.mistakes("bad", negative=True) == []


def test_a_prompt_full_of_mistakes_gets_few_sentences(client: Client) -> None:
    assert len(client.mistakes("".join(f"<lora:one:{number}x>" for number in range(500)))) == 5
    missing = client.mistakes("".join(f"<lora:none{number}>" for number in range(500)))
    assert len(missing) == 2
    assert len(client.mistakes("<lora:one:x> <lora:one:x>")) == 1


def test_hostile_requests(client: Client) -> None:
    for body in (None, [], {"prompt": 5}, {"prompt": ["a"]}, {}):
        assert client.refused("/locon/v1/parse", body)[0] == 400
    assert client.refused("/locon/v1/parse", {"prompt": "x" * 200_000})[0] == 413
    for body in (None, {"names": 5}, {"names": [5]}, {"names": ["a"] * 101}):
        status, sentence = client.refused("/locon/v1/fit", body)
        assert status == 400
        assert "names" in sentence


# ---- how much of a file fits


def fits(client: Client, *names: str) -> Any:
    return client._ask("POST", "/locon/v1/fit", body={"names": names})["fits"]


def test_a_part_of_a_file_that_does_not_fit(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(random_adapters.folder() / "tiny_lora.safetensors")
    stem = next(iter(tensors)).split(".")[0]
    moved = {key.replace(stem, "lora_te2_text_model_encoder_layers_0_mlp_fc1"): value for key, value in tensors.items()}
    save_file(moved, folder / "partly.safetensors")
    found = fits(client, "one", "partly", "none", "../one", "#0123abcd", "")
    assert set(found) == {"one", "partly"}
    total = found["one"]["total"]
    assert found["one"] == {"used": total, "total": total, "why": ""}
    assert found["partly"] == {"used": total - 1, "total": total, "why": "1 × the model has no te2"}
    assert set(fits(client, "ink", "sub/twin")) == {"ink", "sub/twin"}
    from lib_locon import fitting

    monkeypatch.setattr(fitting, "read_adapter", lambda *_, **__: pytest.fail("it was read before"))
    assert fits(client, "one", "partly") == found
    monkeypatch.undo()
    save_file(tensors, folder / "partly.safetensors")
    assert fits(client, "partly")["partly"]["used"] == total


def test_a_file_for_another_model_and_one_that_is_broken(client: Client, folder: Path) -> None:
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    other = {f"{key}.lora_up.weight": torch.zeros(320, 4), f"{key}.lora_down.weight": torch.zeros(4, 2048)}
    save_file(other, folder / "xl.safetensors")
    (folder / "broken.safetensors").write_bytes(b"<!DOCTYPE html>")
    found = fits(client, "xl", "broken")
    assert set(found) == {"xl"}
    assert found["xl"]["used"] == 0
    assert "SDXL" in found["xl"]["why"]


def test_no_model_is_loaded_for_it(start: Callable[..., Any]) -> None:
    from modules import sd_models

    client = Client(start().app)
    sd_models.model_data.clear()
    assert client._ask("POST", "/locon/v1/fit", body={"names": ["one"]}) == {"fits": {}, "model": None}


def test_another_model_is_another_answer(client: Client) -> None:
    from modules import sd_models

    before = fits(client, "one")["one"]
    other = torch.nn.Module()
    other.add_module("alone", torch.nn.Linear(2, 2))
    sd_models.model_data.set_sd_model(other)
    assert fits(client, "one")["one"]["used"] == 0
    assert before["used"] > 0


def test_the_page_hears_of_another_model(client: Client) -> None:
    """What a card says of the model is as it was when the cards were listed."""
    from modules import sd_models, ui_extra_networks

    (page,) = ui_extra_networks.extra_pages
    family = client._ask("POST", "/locon/v1/fit", body={"names": []})["model"]
    assert family
    assert f'data-locon-model="{family}"' in page.create_html("txt2img")
    other = torch.nn.Module()
    other.add_module("alone", torch.nn.Linear(2, 2))
    sd_models.model_data.set_sd_model(other)
    assert client._ask("POST", "/locon/v1/fit", body={"names": []})["model"] == ""
    assert 'data-locon-model=""' in page.create_html("txt2img")


def test_none_asks_for_a_password(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    shared.cmd_opts.api_auth = "me:secret"
    assert Client(webui.app).complete("<lora:")["total"] == 4
    assert Client(webui.app).mistakes("<lora:one>") == []


def test_the_shipped_adapters_fit() -> None:
    """And whoever opens the demo sees no badge on them."""
    with launch(lora_dir=ADAPTERS, make_app=App) as webui:
        client = Client(webui.app)
        webui.generate("cat", steps=1)
        names = [path.stem for path in ADAPTERS.glob("*.safetensors")]
        found = fits(client, *names)
        assert set(found) == set(names)
        assert all(fit["used"] == fit["total"] for fit in found.values())
