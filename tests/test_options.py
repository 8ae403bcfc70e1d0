"""The built-in's options: there without it, under the same keys, and each does what it says."""

from __future__ import annotations

import gc
import hashlib
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from extensions_builtin_shim.launch import OURS, launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.settings import BASE_STORE, BUILTIN_SETTINGS, HIDE_UNKNOWN, IN_MEMORY, PRESETS, SETTINGS, SIDE_PATH
from tests import random_adapters

put_modules_on_path()

KEYS = {  # of the host's v1.10.1, with its defaults
    "sd_lora": "None", "lora_preferred_name": "Alias from file", "lora_add_hashes_to_infotext": True,
    "lora_bundled_ti_to_infotext": True, "lora_show_all": False, "lora_hide_unknown_for_versions": [],
    "lora_in_memory_limit": 0, "lora_not_found_warning_console": False, "lora_not_found_gradio_warning": False,
    "lora_functional": False,
}  # fmt: skip
BUILTIN_SCRIPT = """
from modules import shared
shared.options_templates.update({"lora_functional": shared.OptionInfo(True, "theirs")})
shared.opts.data_labels.update(shared.options_templates)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Lora"
    folder.mkdir()
    for name in ("tiny_lora", "tiny_loha"):
        shutil.copy(random_adapters.folder() / f"{name}.safetensors", folder)
    return folder


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Any]]:
    running: list[Any] = []

    def run(**options: Any) -> Any:
        running.append(launch(lora_dir=folder, make_model=TinySD.random, **options))
        return running[-1]

    yield run
    for webui in running:
        webui.close()


def set_option(key: str, value: object) -> None:
    from modules import shared

    shared.opts.set(key, value)


def generate(prompt: str, **options: Any) -> tuple[Any, Any]:
    """(what the host processed, the job)."""
    from modules.processing import StableDiffusionProcessingTxt2Img, process_images

    p = StableDiffusionProcessingTxt2Img(prompt=prompt, steps=1, seed=1, **options)
    return process_images(p), p


# ---- that they are there


def test_the_built_ins_options_are_there_without_it(start: Callable[..., Any]) -> None:
    from modules import shared

    start()
    assert {setting.key for setting in BUILTIN_SETTINGS} == set(KEYS)
    for key, default in KEYS.items():
        assert shared.opts.data[key] == default  # what is in `data` is put back after an image that overrode it
        assert shared.opts.data_labels[key].section[0] in ("extra_networks", "compatibility")


def test_those_of_the_built_in_stay_its_own(start: Callable[..., Any], tmp_path: Path) -> None:
    from modules import shared

    script = tmp_path / "builtin" / "Lora" / "scripts" / "lora_script.py"
    script.parent.mkdir(parents=True)
    script.write_text(BUILTIN_SCRIPT)
    webui = start(extensions=OURS, builtin={"Lora": script.parents[1]})
    for _ in range(2):
        assert shared.opts.data_labels["lora_functional"].label == "theirs"
        assert shared.opts.data["lora_functional"] is True  # so that the host can put it back
        assert shared.opts.data_labels["lora_show_all"].label != "theirs"
        webui.reload_ui()


def test_what_an_image_overrides_is_put_back(start: Callable[..., Any]) -> None:
    from modules import shared

    start()
    before = dict(shared.opts.data)
    overridden = {"lora_functional": True, "sd_lora": "tiny_lora", "lora_in_memory_limit": 3}
    _, p = generate("a cat", override_settings=overridden)
    assert "<lora:tiny_lora:1.0>" in p.all_prompts[0]
    assert shared.opts.data == before


def test_a_choice_of_the_user_outlives_a_reload(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    set_option("lora_in_memory_limit", 5)
    webui.reload_ui()
    assert shared.opts.lora_in_memory_limit == 5


def test_the_list_of_adapters_for_every_prompt(start: Callable[..., Any], folder: Path) -> None:
    from modules import shared

    start()
    info = shared.opts.data_labels["sd_lora"]
    assert info.component_args() == {"choices": ["None", "tiny_loha", "tiny_lora"]}
    shutil.copy(folder / "tiny_lora.safetensors", folder / "new.safetensors")
    info.refresh()
    assert "new" in info.component_args()["choices"]


# ---- that each does what it says


def test_an_adapter_for_every_prompt(start: Callable[..., Any]) -> None:
    webui = start()
    plain, chosen = (webui.generate(f"a cat{tag}", steps=2).image.tobytes() for tag in ("", "<lora:tiny_lora:0.5>"))
    assert plain != chosen
    set_option("extra_networks_default_multiplier", 0.5)
    set_option("sd_lora", "tiny_lora")
    run = webui.generate("a cat", steps=2)
    assert run.image.tobytes() == chosen
    assert run.infotext.startswith("a cat<lora:tiny_lora:0.5>\n")
    named = webui.generate("a cat<lora:tiny_lora:0>", steps=2)
    assert named.image.tobytes() == plain
    assert named.infotext.startswith("a cat<lora:tiny_lora:0>\n")
    both = webui.generate("a cat<lora:tiny_loha:1>", steps=2)
    assert [adapter.name for adapter in both.adapters] == ["tiny_loha", "tiny_lora"]
    set_option("sd_lora", "None")
    assert webui.generate("a cat", steps=2).image.tobytes() == plain


def test_an_adapter_for_every_batch_is_written_once(start: Callable[..., Any]) -> None:
    start()
    set_option("sd_lora", "tiny_lora")
    processed, p = generate("a cat", n_iter=3)
    assert p.all_prompts == ["a cat<lora:tiny_lora:1.0>"] * 3
    assert all(text.count("<lora:") == 1 for text in processed.infotexts)


def test_a_chosen_adapter_that_is_gone_is_left_out(start: Callable[..., Any]) -> None:
    webui = start()
    set_option("sd_lora", "gone")
    assert webui.generate("a cat", steps=1).infotext.startswith("a cat\n")


def test_the_name_that_a_click_inserts(start: Callable[..., Any], folder: Path) -> None:
    save_file(load_file(folder / "tiny_lora.safetensors"), folder / "file.safetensors", {"ss_output_name": "alias"})
    webui = start()
    for choice, word in {"Alias from file": "<lora:alias:", "Filename": "<lora:file:"}.items():
        set_option("lora_preferred_name", choice)
        with webui.pages() as (page,):
            item = next(item for item in page.list_items() if item["name"] == "file")
        assert word in item["prompt"]


def test_cards_of_unknown_models_are_hidden_where_that_is_asked(start: Callable[..., Any], folder: Path) -> None:
    nothing_telling = {
        "lora_unet_x.lora_up.weight": torch.zeros(4, 2),
        "lora_unet_x.lora_down.weight": torch.zeros(2, 4),
    }
    save_file(nothing_telling, folder / "unknown.safetensors")
    webui = start()

    def hidden(model: str) -> list[str]:
        from lib_locon.hosts import cards_page

        cards_page._FAMILIES[__import__("modules.shared").shared.sd_model] = model
        with webui.pages() as (page,):
            return [item["name"] for item in page.list_items() if item["locon"]["hidden"]]

    assert "unknown" not in hidden("SD1")
    set_option(HIDE_UNKNOWN.key, ["SD1"])
    assert "unknown" in hidden("SD1")
    assert "unknown" not in hidden("SD2")
    set_option("lora_show_all", True)
    assert hidden("SD1") == []


def test_so_many_adapters_stay_in_memory(start: Callable[..., Any]) -> None:
    webui = start()
    from lib_locon.hosts import a1111

    def read(prompt: str) -> list[weakref.ref[Any]]:
        webui.generate(prompt, steps=1)
        return [weakref.ref(use.adapter) for use in a1111._webui.used]

    (lora,) = read("<lora:tiny_lora:1>")
    assert read("<lora:tiny_lora:0.5>")[0]() is lora()
    read("<lora:tiny_loha:1>")
    gc.collect()
    assert lora() is None
    set_option(IN_MEMORY.key, 2)
    (lora,) = read("<lora:tiny_lora:1>")
    read("<lora:tiny_loha:1>")
    assert lora() is not None
    assert read("<lora:tiny_lora:1>")[0]() is lora()


def test_how_loudly_a_missing_adapter_is_said(
    start: Callable[..., Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "broken.safetensors").write_bytes(b"")
    webui = start()

    def levels() -> dict[str, str]:
        caplog.clear()
        with caplog.at_level("INFO", "lib_locon"):
            comments = str(webui.generate("<lora:gone:1><lora:broken:1>", steps=1).comments)
        assert "no adapter 'gone'" in comments and "is empty" in comments
        return {record.getMessage().split()[-3]: record.levelname for record in caplog.records}

    assert levels() == {"'gone'": "INFO", "'broken'": "WARNING"}
    set_option("lora_not_found_warning_console", True)
    assert levels() == {"'gone'": "WARNING", "'broken'": "WARNING"}


def test_what_is_said_under_an_image(start: Callable[..., Any], folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(folder / "tiny_lora.safetensors")
    save_file({**tensors, "lora_unet_no_such.lora_up.weight": torch.zeros(4, 2),
               "lora_unet_no_such.lora_down.weight": torch.zeros(2, 4)}, folder / "part.safetensors")  # fmt: skip
    webui = start()
    prompt = "<lora:tiny_lora:1><lora:part:1><lora:gone:1><lora:tiny_loha:1:no=1>"

    def said(choice: str) -> list[str]:
        set_option("locon_comments", choice)
        caplog.clear()
        with caplog.at_level("INFO", "lib_locon"):
            lines: list[str] = [line.split()[0] for line in webui.generate(prompt, steps=1).comments]
        assert len([record for record in caplog.records if "at 1" in record.getMessage()]) == 3  # whatever the choice
        return lines

    assert said("all") == ["tiny_lora", "part", "tiny_loha", "there", "'no=1'"]
    assert said("problems") == ["part", "there", "'no=1'"]
    assert said("nothing") == []


def test_a_missing_adapter_pops_up_where_that_is_asked(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from types import ModuleType

    shown: list[str] = []
    gradio = ModuleType("gradio")  # the page's own, of which we need this one function
    gradio.Warning = shown.append  # type: ignore[attr-defined]
    webui = start()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    webui.generate("<lora:gone:1>", steps=1)
    assert shown == []
    set_option("lora_not_found_gradio_warning", True)
    webui.generate("<lora:gone:1><lora:tiny_lora:1>", steps=1)
    assert len(shown) == 1 and "no adapter 'gone'" in shown[0]


def test_the_old_way_runs_beside_the_layers(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    base = {name: weight.detach().clone() for name, weight in shared.sd_model.named_parameters()}
    set_option("lora_functional", True)
    plain, used = (webui.generate(f"a cat{tag}", steps=2).image.tobytes() for tag in ("", "<lora:tiny_lora:1>"))
    assert plain != used
    assert all(torch.equal(base[name], weight) for name, weight in shared.sd_model.named_parameters())


def test_a_bundled_embeddings_adapter_is_named(start: Callable[..., Any], folder: Path) -> None:
    from modules import sd_hijack

    tensors = load_file(folder / "tiny_lora.safetensors")
    save_file({**tensors, "bundle_emb.zorp.string_to_param.*": torch.ones(2, 64)}, folder / "x.safetensors")
    webui = start()
    table = sd_hijack.model_hijack.embedding_db.word_embeddings
    webui.generate("zorp <lora:x:1>", steps=1)
    assert str(table["zorp"].shorthash) == "x"
    set_option("lora_bundled_ti_to_infotext", False)
    webui.generate("zorp <lora:x:1>", steps=1)
    assert not table["zorp"].shorthash


def test_pickled_files_are_read_where_that_is_asked(start: Callable[..., Any], folder: Path) -> None:
    torch.save(load_file(folder / "tiny_lora.safetensors"), folder / "old.pt")
    webui = start()
    assert "no adapter 'old'" in str(webui.generate("<lora:old:1>", steps=1).comments)
    set_option("locon_allow_pickle", True)
    assert "old (LoRA) at 1" in str(webui.generate("<lora:old:1>", steps=1).comments)


@pytest.mark.parametrize("choice", ["auto", "checkpoint", "ram", "device"])
def test_where_the_base_is_kept(start: Callable[..., Any], choice: str) -> None:
    """The random model comes from no file, and its device is the CPU: all ways end in RAM, each by its own name."""
    from modules import shared

    webui = start()
    set_option("locon_base_store", choice)
    webui.generate("<lora:tiny_lora:1>", steps=1)
    from lib_locon.hosts import a1111

    report = a1111._webui.session(shared.sd_model).engine.store.report()
    assert report.policy == choice and set(report.weights) == {"ram"}
    assert bool(report.reasons) == (choice in ("auto", "checkpoint"))  # only these look for a file


def test_unused_copies_of_the_base_are_given_back_where_that_is_asked(start: Callable[..., Any]) -> None:
    from modules import shared

    webui = start()
    from lib_locon.hosts import a1111

    def kept() -> int:
        for prompt in ("<lora:tiny_lora:1>", "a cat"):
            webui.generate(prompt, steps=1)
        unused: int = a1111._webui.session(shared.sd_model).engine.store.report().unused
        return unused

    assert kept() > 0
    set_option("locon_free_unused", True)
    assert kept() == 0


def test_the_users_presets_are_read(start: Callable[..., Any]) -> None:
    webui = start()
    prompt = "<lora:tiny_lora:1:lbw=MINE>"
    assert "no preset 'MINE'" in str(webui.generate(prompt, steps=1).comments)
    set_option("locon_presets", f"MINE:{','.join(['0.5'] * 17)}")
    assert "blocks MINE" in str(webui.generate(prompt, steps=1).comments)


def test_what_was_applied_stands_in_the_text_unless_that_is_off(start: Callable[..., Any]) -> None:
    webui = start()
    assert 'Locon: "tiny_lora at 1: ' in webui.generate("<lora:tiny_lora:1>", steps=1).infotext
    set_option("locon_infotext", False)
    assert "Locon: " not in webui.generate("<lora:tiny_lora:1>", steps=1).infotext


def test_hashes_stand_in_the_text_and_on_the_card(start: Callable[..., Any], folder: Path) -> None:
    save_file(load_file(folder / "tiny_lora.safetensors"), folder / "liar.safetensors", {"sshs_model_hash": "f" * 64})
    content = (folder / "liar.safetensors").read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    webui = start()

    def card() -> tuple[str, bool]:
        with webui.pages() as (page,):
            item = next(item for item in page.list_items() if item["name"] == "liar")
        return item["shorthash"], digest in item["search_terms"]

    assert card() == ("", False)  # not what the file says of itself
    assert f'Lora hashes: "liar: {digest[:12]}"' in webui.generate("<lora:liar:1>", steps=1).infotext
    assert card() == (digest[:12], True)
    set_option("lora_add_hashes_to_infotext", False)
    assert "Lora hashes" not in webui.generate("<lora:liar:1>", steps=1).infotext


# ---- what stands in the host's file may be anything


@pytest.mark.parametrize(
    ("setting", "found", "read"),
    [
        (IN_MEMORY, -3, 0), (IN_MEMORY, 2.0, 2), (IN_MEMORY, None, 0), (IN_MEMORY, float("nan"), 0),
        (IN_MEMORY, "x", 0),
        (BASE_STORE, "ram", "ram"), (BASE_STORE, "RAM!", "auto"), (BASE_STORE, None, "auto"), (PRESETS, 3, ""),
        (PRESETS, "A:1", "A:1"), (SIDE_PATH, None, False), (SIDE_PATH, 1, True), (HIDE_UNKNOWN, ["SD1", 7], ("SD1",)),
        (HIDE_UNKNOWN, "SD1", ()), (HIDE_UNKNOWN, None, ()),
    ],
)  # fmt: skip
def test_a_strange_value_is_made_sound(setting: Any, found: object, read: object) -> None:
    assert setting.read(found) == read


def test_every_setting_reads_its_own_default() -> None:
    for setting in (*SETTINGS, *BUILTIN_SETTINGS):
        assert setting.read(setting.default) == setting.default
        assert type(setting.read(setting.default)) is type(setting.default)


def test_the_documentation_has_every_setting_and_its_default() -> None:
    text = (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf8")
    for setting in SETTINGS:
        default = {True: "on", False: "off", "": ""}.get(setting.default, f"`{setting.default}`")  # type: ignore[arg-type]
        assert f"| `{setting.key}` | {default} |".replace("|  |", "| |") in text
        assert all(f"`{choice}`" in text for choice in setting.choices)
    assert all(f"| `{setting.key}` | " in text for setting in BUILTIN_SETTINGS)
