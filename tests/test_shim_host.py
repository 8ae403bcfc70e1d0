"""The stand-in behaves as the webui v1.10.1 does. Each docstring quotes the fact about it that the test reproduces."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from extensions_builtin_shim.launch import launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD

put_modules_on_path()

from modules import (  # noqa: E402  # only now is there a `modules`
    extra_networks,
    initialize,
    script_callbacks,
    sd_models,
    shared,
)
from modules.processing import (  # noqa: E402
    Processed,
    StableDiffusionProcessingTxt2Img,
    process_images,
)

Events = list[Any]
Extensions = Mapping[str, Mapping[str, str]]
Start = Callable[..., None]

RECORDING = """
from modules import extra_networks
from host_events import events

class Recording(extra_networks.ExtraNetwork):
    def __init__(self, name, owner):
        super().__init__(name)
        self.owner = owner
    def activate(self, p, params_list):
        events.append(("activate", self.owner, [params.items for params in params_list]))
    def deactivate(self, p):
        events.append(("deactivate", self.owner))
"""
BUILTIN_LORA = (
    RECORDING
    + """
from modules import script_callbacks
def before_ui():
    network = Recording("lora", "builtin")
    extra_networks.register_extra_network(network)
    extra_networks.register_extra_network_alias(network, "lyco")
script_callbacks.on_before_ui(before_ui)
"""
)


def doing(what: str) -> str:
    """Makes the recording network do this, an expression, in `activate`."""
    return f"\nfrom modules import shared\nRecording.activate = lambda self, p, params_list: {what}\n"


REGISTER = RECORDING + "from modules import script_callbacks\n"


@functools.cache
def model() -> TinySD:
    return TinySD.random(0)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """A list that scripts get by `from host_events import events`."""
    module = ModuleType("host_events")
    module.events = []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "host_events", module)
    found: Events = module.events  # type: ignore[attr-defined]
    return found


@pytest.fixture
def start(tmp_path: Path, events: Events) -> Iterator[Start]:
    """start({name: {file: text}}, builtin={…}): writes these extensions and starts the stand-in with them."""
    running = []

    def write(group: str, extensions: Extensions) -> dict[str, Path]:
        for name, files in extensions.items():
            for file, text in files.items():
                path = tmp_path / group / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        return {name: tmp_path / group / name for name in extensions}

    def run(user: Extensions, builtin: Extensions | None = None) -> None:
        roots, builtin_roots = write("extensions", user), write("builtin", builtin or {})
        webui = launch(extensions=roots, builtin=builtin_roots, make_model=lambda: copy.deepcopy(model()))
        running.append(webui)

    yield run
    for webui in running:
        webui.close()


def generate(prompt: str | list[str], **options: Any) -> Processed:
    return process_images(StableDiffusionProcessingTxt2Img(prompt=prompt, seed=1, steps=1, **options))


def append(what: str) -> str:
    return f"from host_events import events\nevents.append({what})\n"


def test_load_order(start: Start, events: Events) -> None:
    """Fact: "built-in extensions first, then `extensions/`, each group sorted by name" """
    files = {name: {"scripts/s.py": append(repr(name))} for name in ("b", "a", "z", "y")}
    start({"b": files["b"], "a": files["a"]}, {"z": files["z"], "y": files["y"]})
    assert events == ["y", "z", "a", "b"]


def test_metadata_reorders_scripts(start: Start, events: Events) -> None:
    """Fact: "`metadata.ini` can reorder scripts (`[scripts/locon.py] After = …`)" """
    late = {"scripts/s.py": append("'late'"), "metadata.ini": "[scripts/s.py]\nAfter = second\n"}
    early = {"scripts/s.py": append("'early'"), "metadata.ini": "[scripts]\nBefore = second/s.py, none\n"}
    start({"a": late, "second": {"scripts/s.py": append("'second'")}, "z": early})
    assert events == ["early", "second", "late"]


def test_root_is_on_sys_path_only_while_its_script_is_imported(start: Start, events: Events) -> None:
    """Fact: "the extension's root is put first only while its script is imported, then `sys.path` is restored. A late
    `import helper` of a flat module fails; submodules of an already imported package still work"
    """
    script = """
import sys
import tiny_test_package
from modules import script_callbacks, scripts
from host_events import events
events.append((sys.path[0] == scripts.basedir(), scripts.basedir().endswith("ext")))
sys.path.append("/added by the script")
def late():
    import tiny_test_package.late
    events.append(tiny_test_package.late.VALUE)
    try:
        import tiny_test_helper
    except ImportError:
        events.append("no helper")
script_callbacks.on_before_ui(late)
"""
    package = {"tiny_test_package/__init__.py": "", "tiny_test_package/late.py": "VALUE = 5\n"}
    path = list(sys.path)
    start({"ext": {"scripts/s.py": script, "tiny_test_helper.py": "", **package}})
    assert events == [(True, True), 5, "no helper"]
    assert sys.path == path


def test_script_modules(start: Start, events: Events) -> None:
    """Fact: "Script modules are loaded under the file's name (`"locon.py"`) and are not in `sys.modules`. Every `*.py`
    directly in `scripts/` is executed as a script, so helpers there run twice."
    """
    helper = append('("helper", __name__)')
    script = "import sys\nsys.path.append(__file__.rpartition('/')[0])\nimport h_tiny_test\n" + append("__name__")
    start({"ext": {"scripts/h_tiny_test.py": helper, "scripts/s.py": script}})
    assert events == [("helper", "h_tiny_test.py"), ("helper", "h_tiny_test"), "s.py"]
    assert "s.py" not in sys.modules


def test_dataclass_in_a_script(start: Start, events: Events, capsys: pytest.CaptureFixture[str]) -> None:
    """Fact: "A dataclass with string annotations defined in the script itself raises AttributeError (seen)." """
    bad = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    start({"a": {"scripts/bad.py": bad}, "b": {"scripts/good.py": append("'good'")}})
    assert events == ["good"]
    err = capsys.readouterr().err
    assert "AttributeError" in err
    assert "bad.py" in err


def test_registering_at_import_is_lost(start: Start) -> None:
    """Fact: "`extra_networks.initialize()` clears the registry after scripts load and before the UI is built:
    registering at import is lost."
    """
    start({"ext": {"scripts/s.py": REGISTER + 'extra_networks.register_extra_network(Recording("x", "ext"))'}})
    assert extra_networks.extra_network_registry == {}


def test_before_ui_is_reversed(start: Start) -> None:
    """Fact: "`before_ui` callbacks run in REVERSED order, so a plain `on_before_ui` is overwritten by the built-in's
    (seen)."
    """
    plain = REGISTER + (
        'script_callbacks.on_before_ui(lambda: extra_networks.register_extra_network(Recording("lora", "ours")))'
    )
    start({"ours": {"scripts/s.py": plain}}, {"Lora": {"scripts/lora_script.py": BUILTIN_LORA}})
    assert owner("lora") == "builtin"


def test_metadata_and_app_started_win(start: Start) -> None:
    """Fact: "Two ways that held: `metadata.ini` with `[callbacks/<extension>/<file>.py/before_ui]` and `Before =
    lora/lora_script.py/before_ui`; or registering in `on_app_started`, which is repeated after each UI reload."
    """
    register = 'extra_networks.register_extra_network(Recording("lora", "{}"))'
    first = REGISTER + f"script_callbacks.on_before_ui(lambda: {register.format('before_ui')})\n"
    ini = "[callbacks/ours/s.py/before_ui]\nBefore = lora/lora_script.py/before_ui\n"
    builtin = {"Lora": {"scripts/lora_script.py": BUILTIN_LORA}}
    start({"Ours": {"scripts/s.py": first, "metadata.ini": ini}}, builtin)
    assert owner("lora") == "before_ui"
    second = REGISTER + f"script_callbacks.on_app_started(lambda demo, app: {register.format('app_started')})\n"
    start({"ours2": {"scripts/s.py": second}}, builtin)
    assert owner("lora") == "app_started"
    initialize.reload_ui()
    assert owner("lora") == "app_started"


def test_callback_is_named_after_the_file_that_registers(start: Start) -> None:
    """Fact: "`metadata.ini` with `[callbacks/<extension>/<file>.py/before_ui]`". The host takes for the file the first
    one outside `script_callbacks.py` that is on the stack: the one that calls `on_before_ui`, a script or not.
    """
    package = "from modules import script_callbacks\ndef register():\n    script_callbacks.on_before_ui(id, name='n')\n"
    start({"Ext": {"scripts/s.py": "import tiny_test_deep\ntiny_test_deep.register()\n", "tiny_test_deep.py": package}})
    assert [known.name for known in script_callbacks.ordered_callbacks("before_ui")] == [
        "ext/tiny_test_deep.py/before_ui/n"
    ]


def owner(name: str) -> str:
    found: str = extra_networks.extra_network_registry[name].owner  # type: ignore[attr-defined]
    return found


def test_reload_ui(start: Start, events: Events) -> None:
    """Fact: ""Reload UI": scripts are executed again, package modules stay cached in `sys.modules`, registries are
    cleared, `on_model_loaded` does not fire again."
    """
    script = """
import tiny_test_cached
from modules import extra_networks, script_callbacks
from host_events import events
events.append("script")
script_callbacks.on_before_ui(lambda: events.append(("before_ui", len(extra_networks.extra_network_registry))))
script_callbacks.on_ui_settings(lambda: events.append("ui_settings"))
script_callbacks.on_app_started(lambda demo, app: events.append(("app_started", demo, app)))
script_callbacks.on_app_started(lambda *_: extra_networks.register_extra_network(extra_networks.ExtraNetwork("x")))
script_callbacks.on_model_loaded(lambda model: events.append("model_loaded"))
script_callbacks.on_script_unloaded(lambda: events.append("unloaded 1"))
script_callbacks.on_script_unloaded(lambda: events.append("unloaded 2"))
"""
    start({"ext": {"scripts/s.py": script, "tiny_test_cached.py": append("'package'")}})
    page = ["script", ("before_ui", 0), "ui_settings", ("app_started", None, None)]
    assert events == ["package", *page, "model_loaded"]
    for _ in range(2):
        events.clear()
        initialize.reload_ui()
        assert events == ["unloaded 2", "unloaded 1", *page]


def test_failing_callback(start: Start, events: Events, capsys: pytest.CaptureFixture[str]) -> None:
    """An extension's error in a callback is printed; the other callbacks run (why "the user sees … no word of why")."""
    script = append("'script'") + (
        "from modules import script_callbacks\n"
        "script_callbacks.on_app_started(lambda *_: 1 / 0)\n"
        "script_callbacks.on_app_started(lambda *_: events.append('second'))\n"
    )
    start({"ext": {"scripts/s.py": script}})
    assert events == ["script", "second"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_removing_callbacks(start: Start) -> None:
    """Callbacks are removed by the file that registered them, or by function."""
    start({})
    script_callbacks.on_before_ui(print)
    script_callbacks.on_model_loaded(repr)
    assert [known.name for known in script_callbacks.callback_map["callbacks_before_ui"]] == [
        "base/test_shim_host.py/before_ui"
    ]
    script_callbacks.remove_callbacks_for_function(print)
    assert script_callbacks.callback_map["callbacks_before_ui"] == []
    script_callbacks.remove_current_script_callbacks()
    assert script_callbacks.callback_map["callbacks_model_loaded"] == []


def test_lyco_is_in_another_table(start: Start, events: Events) -> None:
    """Fact: "`<lyco:…>` is an alias in another table and still reaches the built-in unless re-registered; otherwise
    both handlers act in one run (seen)."
    """
    plain = REGISTER + (
        'script_callbacks.on_app_started(lambda *_: extra_networks.register_extra_network(Recording("lora", "ours")))'
    )
    start({"ours": {"scripts/s.py": plain}}, {"Lora": {"scripts/lora_script.py": BUILTIN_LORA}})
    events.clear()
    generate("<lora:a:1><lyco:b:1>")
    assert events == [("activate", "ours", [["a", "1"]]), ("activate", "builtin", [["b", "1"]]),
                      ("deactivate", "ours"), ("deactivate", "builtin")]  # fmt: skip


def test_when_activate_runs(start: Start, events: Events) -> None:
    """Fact: "`activate(p, params_list)` runs: with an empty list when no tag is there, at model load, for each batch.
    Each call replaces the previous one. `deactivate(p)` runs only if the last batch had tags."
    """
    loaded = (
        "from modules import script_callbacks\n"
        + append("'script'")
        + ("script_callbacks.on_model_loaded(lambda model: events.append('model_loaded'))\n")
    )
    start({"e": {"scripts/s.py": loaded}}, {"Lora": {"scripts/lora_script.py": BUILTIN_LORA}})
    assert events == ["script", "model_loaded", ("activate", "builtin", [])]
    events.clear()
    generate("plain")
    generate(["<lora:a:1>", "x", "plain", "x"], n_iter=2, batch_size=2)
    generate(["plain", "<lora:a:1><lora:b:1>"], n_iter=2)
    none = ("activate", "builtin", [])
    assert events == [none, ("activate", "builtin", [["a", "1"]]), none,
                      none, ("activate", "builtin", [["a", "1"], ["b", "1"]]), ("deactivate", "builtin")]  # fmt: skip


def test_only_the_first_prompt_of_a_batch_counts(start: Start, events: Events) -> None:
    """Fact: "Only the first prompt of a batch supplies tags. Tags are stripped from every prompt. The negative prompt
    is not parsed."
    """
    start({}, {"Lora": {"scripts/lora_script.py": BUILTIN_LORA}})
    events.clear()
    p = StableDiffusionProcessingTxt2Img(
        prompt=["one <lora:a:1>", "two <lora:b:1>"], negative_prompt="<lora:c:1>", seed=1, steps=1, batch_size=2
    )
    processed = process_images(p)
    assert events == [("activate", "builtin", [["a", "1"]]), ("deactivate", "builtin")]
    assert p.prompts == ["one ", "two "]
    assert p.negative_prompt == "<lora:c:1>"
    assert len(processed.images) == 2
    assert processed.all_seeds == [1, 2]


def test_how_tags_are_read() -> None:
    """Fact: "The regex is `<(\\w+):([^>]+)>`; arguments split at `:`; an argument with exactly one `=` is named, else
    positional."
    """
    text, found = extra_networks.parse_prompt("a <lora:x:te=1:0.5:a=b=c> b <not a tag> <lora:> <x:y>")
    assert text == "a  b <not a tag> <lora:> "
    (params,) = found["lora"]
    assert (params.items, params.positional, params.named) == (
        ["x", "te=1", "0.5", "a=b=c"], ["x", "0.5", "a=b=c"], {"te": "1"})  # fmt: skip
    assert [params.items for params in found["x"]] == [["y"]]


def test_exception_in_activate(start: Start, events: Events, capsys: pytest.CaptureFixture[str]) -> None:
    """Fact: "An exception inside `activate` is printed and swallowed by the host: the user sees an image without the
    effect and no word of why."
    """
    start({}, {"Lora": {"scripts/lora_script.py": BUILTIN_LORA + doing("1 / 0 if params_list else None")}})
    capsys.readouterr()
    processed = generate("<lora:a:1>")
    assert len(processed.images) == 1
    assert processed.comments == ""
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "activating extra network lora with arguments" in err


def test_unknown_tags_are_stripped_and_reach_nobody(start: Start, events: Events) -> None:
    """Fact: "Tags are stripped from every prompt", those of unknown types too."""
    start({})
    p = StableDiffusionProcessingTxt2Img(prompt="a <nothing:b:1>", seed=1, steps=1)
    process_images(p)
    assert p.prompts == ["a "]
    assert events == []


def test_model_loaded_again_with_the_same_object(start: Start, events: Events) -> None:
    """Fact: "`on_model_loaded` also fires on VAE and checkpoint changes with the same model object. Several checkpoints
    can be kept loaded, so state belongs to a model object, never to the process."
    """
    script = "from modules import script_callbacks\n" + append("'script'")
    start({"e": {"scripts/s.py": script + "script_callbacks.on_model_loaded(events.append)\n"}})
    first = shared.sd_model
    assert isinstance(first, TinySD)
    storage = first.state_dict()["first_stage_model.decoder"].data_ptr()
    sd_models.reload_model_weights(model().state_dict())
    assert events == ["script", first, first]
    assert first.state_dict()["first_stage_model.decoder"].data_ptr() == storage
    second = sd_models.load_model()
    assert shared.sd_model is second
    assert events[3:] == [second]
    shared.sd_model = first
    assert shared.sd_model is first
    assert sd_models.model_data.loaded_sd_models == [first, second]
    assert len(events) == 4


def test_comments_and_infotext(start: Start) -> None:
    """Fact: "`p.comment(text)` puts a line under the image; `p.extra_generation_params[...]` goes to the infotext." """
    start({})
    p = StableDiffusionProcessingTxt2Img(prompt="a <x:y>", negative_prompt="b", seed=7, steps=1)
    p.extra_generation_params["Lora hashes"] = "a: 1, b: 2"
    p.comment("line")
    p.comment("line")
    processed = process_images(p)
    assert processed.comments == "line\n"
    assert processed.infotexts == [
        "a <x:y>\nNegative prompt: b\nSteps: 1, Sampler: DDIM, CFG scale: 5.0, Seed: 7, Size: 32x32, Model: tiny_sd, "
        'Lora hashes: "a: 1, b: 2"'
    ]


def test_override_settings_leak(start: Start) -> None:
    """Fact: "`override_settings` restores only keys that already are in `opts.data`. The built-in adds its options
    through `options_templates.update`, and so an overridden `lora_functional` leaked for good (seen). Use
    `opts.add_option`." "posting `sd_lora` to `/options` gives HTTP 500"
    """
    from modules.options import OptionInfo

    start({})
    shared.options_templates.update({"lora_functional": OptionInfo(False)})
    shared.opts.add_option("ours", OptionInfo(1).info("explained"))
    generate("a", override_settings={"lora_functional": True, "ours": 2})
    assert (shared.opts.lora_functional, shared.opts.ours) == (True, 1)
    with pytest.raises(KeyError):
        generate("a", override_settings={"sd_lora": "x"})


def test_lora_dir_is_always_there(start: Start) -> None:
    """Fact: "The flag exists even when the built-in Lora is disabled in the Extensions tab." """
    start({})
    assert Path(shared.cmd_opts.lora_dir).is_dir()


def test_interrupt(start: Start) -> None:
    """The user's interrupt ends the sampling at the next step; the host still shows what it has."""
    start({}, {"Lora": {"scripts/lora_script.py": BUILTIN_LORA + doing("shared.state.interrupt()")}})
    shared.state.begin()
    assert len(generate("a", n_iter=3).images) == 1


def test_progress_of_a_job(start: Start) -> None:
    """A job tells how many batches it has, which of them runs, and which step of it."""
    from modules import progress

    seen: list[tuple[int, int, int, int]] = []
    start({})
    state = shared.state
    script_callbacks.on_cfg_denoiser(
        lambda _: seen.append((state.job_no, state.job_count, state.sampling_step, round(progress.fraction() * 4)))
    )
    state.begin("txt2img")
    assert progress.fraction() == 0
    process_images(StableDiffusionProcessingTxt2Img(prompt="a", seed=1, steps=2, n_iter=2))
    assert seen == [(0, 2, 0, 0), (0, 2, 1, 1), (1, 2, 0, 2), (1, 2, 1, 3)]
    assert progress.fraction() == 1
    state.end()
    assert progress.fraction() == 0


def test_denoiser_callback(start: Start) -> None:
    """`on_cfg_denoiser` is called before each call of the denoising network, with the host's attributes."""
    calls: list[script_callbacks.CFGDenoiserParams] = []
    start({})
    without = process_images(StableDiffusionProcessingTxt2Img(prompt="a", negative_prompt="b", seed=1, steps=3))
    script_callbacks.on_cfg_denoiser(calls.append)
    p = StableDiffusionProcessingTxt2Img(prompt="a", negative_prompt="b", seed=1, steps=3)
    assert process_images(p).images[0].tobytes() == without.images[0].tobytes()
    assert [(call.sampling_step, call.total_sampling_steps) for call in calls] == [(0, 3), (1, 3), (2, 3)]
    sigmas = [float(call.sigma) for call in calls]
    assert sigmas == sorted(sigmas, reverse=True)
    with torch.no_grad():
        texts = p.sd_model.learned_conditioning(["a", "b"])
    for call in calls:
        assert torch.equal(call.text_cond, texts[:1])
        assert torch.equal(call.text_uncond, texts[1:])
        assert call.x.shape[0] == 1
        assert call.denoiser.p is p  # type: ignore[attr-defined]


PAGE = """
from modules import script_callbacks, ui_extra_networks
from host_events import events
class Page(ui_extra_networks.ExtraNetworksPage):
    def __init__(self):
        super().__init__("Lora")
    def list_items(self):
        return []
"""


def test_pages_of_cards(start: Start, events: Events) -> None:
    """Fact: "Card pages: cleared in `initialize_rest`, built right after `before_ui`; register there.
    `ui_extra_networks.register_page` only appends: a second page named "Lora" would stand beside the first."
    """
    from modules import ui_extra_networks

    script = PAGE + (
        "ui_extra_networks.register_page(Page())\n"
        "script_callbacks.on_before_ui(lambda: ui_extra_networks.register_page(Page()))\n"
        "names = lambda: [page.name for page in ui_extra_networks.extra_pages]\n"
        "script_callbacks.on_ui_settings(lambda: events.append(names()))\n"
    )
    start({"a": {"scripts/s.py": script}, "b": {"scripts/s.py": script}})
    assert events == [["lora", "lora"]] * 2  # those of before_ui, and not those of the scripts
    initialize.reload_ui()
    assert len(ui_extra_networks.extra_pages) == 2


def test_previews_are_served_from_registered_folders_only(start: Start, tmp_path: Path) -> None:
    """Fact: "Thumbnails and previews are served only from registered directories." """
    from modules import ui_extra_networks

    for name in ("in/a.png", "in/a.txt", "out/a.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    script = PAGE + (
        f"Page.allowed_directories_for_previews = lambda self: [{str(tmp_path / 'in')!r}]\n"
        "script_callbacks.on_before_ui(lambda: ui_extra_networks.register_page(Page()))\n"
    )
    start({"a": {"scripts/s.py": script}})
    assert ui_extra_networks.fetch_file(str(tmp_path / "in/a.png")).read_bytes() == b"x"
    for name in ("in/a.txt", "out/a.png", "in/../out/a.png"):
        with pytest.raises(ValueError, match=r"is no picture|in no folder"):
            ui_extra_networks.fetch_file(str(tmp_path / name))


def test_infotext_is_parsed(start: Start, events: Events) -> None:
    """Fact: "`infotext_pasted` fires on paste in the UI" """
    from modules import infotext_utils

    start({})
    script_callbacks.on_infotext_pasted(lambda text, fields: fields.update(Prompt=fields["Prompt"].upper()))
    text = 'a: b, c\nd\nNegative prompt: e\nf\nSteps: 3, CFG scale: 5.0, Seed: 1, Lora hashes: "a: 1, b: \\"2\\""'
    assert infotext_utils.paste_fields(text) == {
        "Prompt": "A: B, C\nD", "Negative prompt": "e\nf", "Steps": "3", "CFG scale": "5.0", "Seed": "1",
        "Lora hashes": 'a: 1, b: "2"',
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["extra_networks", "script_callbacks", "shared", "sd_models", "processing", "scripts", "ui_extra_networks"]
)
def test_anything_else_raises(name: str) -> None:
    """The extension gets nothing here that the real host would not give it."""
    module = getattr(__import__(f"modules.{name}"), name)
    with pytest.raises(AttributeError, match=rf"the headless stand-in for the webui has no modules\.{name}\.anything"):
        _ = module.anything
    assert getattr(module, "anything", None) is None
    with pytest.raises(ImportError):
        __import__("modules.ui_toprow")
    with pytest.raises(AttributeError, match="has no setting 'sd_lora'"):
        _ = shared.opts.sd_lora
