"""The extension in the headless webui, end to end: from a prompt to an image, with and without the built-in Lora."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from extensions_builtin_shim.__main__ import main
from extensions_builtin_shim.launch import CHECKOUT, OURS, launch
from extensions_builtin_shim.tiny_sd import TinySD
from extensions_builtin_shim.tiny_sd.models.make_adapters import RECIPES, write_all
from tests import random_adapters
from tests.test_store import checkpoint, overwrite, source_of

Launch = Callable[..., Any]

BUILTIN_LORA = """
from modules import extra_networks, script_callbacks

class BuiltinLora(extra_networks.ExtraNetwork):
    def activate(self, p, params_list):
        p.comment(f"the built-in was given {len(params_list)} tags")
    def deactivate(self, p):
        pass

def before_ui():
    network = BuiltinLora("lora")
    extra_networks.register_extra_network(network)
    extra_networks.register_extra_network_alias(network, "lyco")

script_callbacks.on_before_ui(before_ui)
"""


@functools.cache
def model() -> TinySD:
    return TinySD.random(0)


@pytest.fixture
def started() -> Iterator[Launch]:
    """started(**options of launch): a webui that is closed after the test."""
    running = []

    def start(**options: Any) -> Any:
        known = {"lora_dir": random_adapters.folder(), "make_model": lambda: copy.deepcopy(model())}
        running.append(launch(**{**known, **options}))
        return running[-1]

    yield start
    for webui in running:
        webui.close()


@pytest.fixture
def builtin(tmp_path: Path) -> dict[str, Path]:
    """A fake of the built-in Lora: registers in before_ui, as that does."""
    script = tmp_path / "Lora" / "scripts" / "lora_script.py"
    script.parent.mkdir(parents=True)
    script.write_text(BUILTIN_LORA)
    return {"Lora": tmp_path / "Lora"}


def generate(webui: Any, prompt: str, **options: Any) -> Any:
    return webui.generate(prompt, seed=1, steps=2, **options)


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean, of 255."""
    return max(ImageStat.Stat(ImageChops.difference(first, second)).mean)


def test_every_family_shows_and_goes(started: Launch) -> None:
    webui = started()
    plain = generate(webui, "a red cat")
    assert plain.adapters == ()
    assert plain.comments == ()
    pictures = {plain.image.tobytes()}
    for name, recipe in RECIPES.items():
        run = generate(webui, f"a red cat <lora:{name}:1>")
        (adapter,) = run.adapters
        assert adapter.used == adapter.total > 30
        assert adapter.unmatched == ()
        assert recipe.title in adapter.families
        assert run.comments == (str(adapter),)
        assert difference(plain.image, run.image) > 3
        pictures.add(run.image.tobytes())
        assert generate(webui, "a red cat").png == plain.png
    assert len(pictures) == 1 + len(RECIPES)


def test_same_request_same_bytes(started: Launch) -> None:
    prompt = "a red cat <lora:tiny_lora:0.8><lora:tiny_lokr:0.5>"
    first = generate(started(), prompt)
    second = generate(started(), prompt)
    assert first.sha256 == second.sha256 == hashlib.sha256(second.png).hexdigest()
    assert Image.open(io.BytesIO(first.png)).text["parameters"] == first.infotext  # type: ignore[attr-defined]
    assert first.infotext.startswith(f"{prompt}\nSteps: 2, ")
    assert first.seconds.load > 0
    assert first.seconds.apply > 0
    assert first.seconds.sample > 0


def test_order_of_tags_and_lyco(started: Launch) -> None:
    webui = started()
    pictures = {
        generate(webui, f"cat {tags}").image.tobytes()
        for tags in (
            "<lora:tiny_lora:0.8><lora:tiny_loha:0.5>",
            "<lora:tiny_loha:0.5><lora:tiny_lora:0.8>",
            "<lyco:tiny_loha:0.5><lora:tiny_lora:0.8>",
            "<lyco:tiny_loha:0.5><lyco:tiny_lora:0.8>",
        )
    }
    assert len(pictures) == 1


def test_what_goes_wrong_is_said_and_the_rest_applies(started: Launch) -> None:
    webui = started()
    good = generate(webui, "cat <lora:tiny_lora:0.8>")
    run = generate(webui, "cat <lora:tiny_loho:1><lora:tiny_lora:0.8><lora:tiny_lokr:much><lora:../x:1><lora: :1>")
    assert [adapter.name for adapter in run.adapters] == ["tiny_lora"]
    assert run.image.tobytes() == good.image.tobytes()
    said = "\n".join(run.comments)
    assert "no adapter 'tiny_loho'" in said
    assert "tiny_loha" in said.partition("near it:")[2].partition("\n")[0]
    assert "'much' is no number" in said
    assert "'../x'" in said
    assert "names no adapter" in said
    # strength 0 leaves the base; and what the last run reported is not reported again
    zero = generate(webui, "cat <lora:tiny_lora:0>")
    assert [adapter.strengths.te for adapter in zero.adapters] == [0]
    plain = generate(webui, "cat")
    assert plain.adapters == ()
    assert zero.image.tobytes() == plain.image.tobytes()


def test_reload_ui_again_and_again(started: Launch) -> None:
    webui = started()
    plain, with_lora = (generate(webui, prompt) for prompt in ("cat", "cat <lora:tiny_lora:1>"))
    for _ in range(3):
        webui.reload_ui()  # while the adapter is in the model
        assert generate(webui, "cat <lora:tiny_lora:1>").png == with_lora.png
        webui.reload_ui()
        assert generate(webui, "cat").png == plain.png
        assert generate(webui, "cat <lyco:tiny_lora:1>").image.tobytes() == with_lora.image.tobytes()


def test_takes_over_from_the_builtin(started: Launch, builtin: dict[str, Path]) -> None:
    """Facts: `before_ui` runs reversed, `<lyco:…>` is in another table, "Reload UI" clears the registries."""
    alone = generate(started(), "cat <lora:tiny_lora:1><lyco:tiny_loha:1>")
    webui = started(builtin=builtin)
    for _ in range(2):
        run = generate(webui, "cat <lora:tiny_lora:1><lyco:tiny_loha:1>")
        assert run.comments == alone.comments
        assert run.png == alone.png
        webui.reload_ui()


def test_builtin_answers_without_us(started: Launch, builtin: dict[str, Path]) -> None:
    """The fake can win: else the test above would prove nothing."""
    run = generate(started(builtin=builtin, extensions={}), "cat <lora:tiny_lora:1>")
    assert run.comments == ("the built-in was given 1 tags",)
    assert run.adapters == ()


def test_app_started_alone_takes_over(started: Launch, builtin: dict[str, Path], tmp_path: Path) -> None:
    """Fact: "or registering in `on_app_started`": also where metadata.ini is missing or names the file wrongly."""
    root = tmp_path / "ours"
    shutil.copytree(CHECKOUT / "scripts", root / "scripts")
    (root / "lib_locon").symlink_to(CHECKOUT / "lib_locon")
    webui = started(builtin=builtin, extensions={"ours": root})
    assert len(generate(webui, "cat <lora:tiny_lora:1>").adapters) == 1


def test_failure_inside_activate(
    started: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fact: "An exception inside `activate` is printed and swallowed by the host"."""
    webui = started()
    plain = generate(webui, "cat")
    from lib_locon.hosts.webui import Webui

    with monkeypatch.context() as patch:
        patch.setattr(Webui, "activate", lambda *_, **__: 1 / 0)
        run = generate(webui, "cat <lora:tiny_lora:1>")
    assert run.image.tobytes() == plain.image.tobytes()
    assert run.seconds.apply >= 0
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert difference(generate(webui, "cat <lora:tiny_lora:1>").image, plain.image) > 3


def test_two_models(started: Launch) -> None:
    """Fact: "Several checkpoints can be kept loaded, so state belongs to a model object"."""
    webui = started()
    from modules import sd_models, shared

    first = shared.sd_model
    prompts = ("cat", "cat <lora:tiny_lora:1>")
    wanted = [generate(webui, prompt).png for prompt in prompts]
    # another checkpoint, loaded while the first holds an adapter
    sd_models.model_data.make = lambda: TinySD.random(5)
    second = sd_models.load_model()
    others = [generate(webui, prompt).png for prompt in prompts]
    assert not set(wanted) & set(others)
    for current, expected in ((first, wanted), (second, others), (first, wanted)):
        shared.sd_model = current
        assert [generate(webui, prompt).png for prompt in prompts] == expected
        generate(webui, prompts[1])


@pytest.mark.parametrize("kept", [False, True], ids=["loaded in the middle", "kept"])
def test_a_refiner_holds_what_the_prompt_asks_for(started: Launch, kept: bool) -> None:
    """Fact: the refiner takes over between two steps; for a model that is still loaded nothing is announced."""
    webui = started()
    from modules import script_callbacks, sd_models, shared

    first = shared.sd_model
    prompt = "cat <lora:tiny_lora:1>"
    sd_models.model_data.make = lambda: TinySD.random(5)
    second = sd_models.load_model() if kept else None
    alone = TinySD.random(5).learned_conditioning(["cat"])
    wanted = []
    if second is not None:
        second.cond_stage_model_empty_prompt = None  # as the host has it when a model is loaded
        generate(webui, prompt)
        wanted = _weights(second)
        shared.sd_model = first
    seen: list[Any] = []

    def take_over(params: Any) -> None:
        if params.sampling_step == 1:
            model = second if second is not None else sd_models.load_model()
            assert model is not None
            model.cond_stage_model_empty_prompt = None
            shared.sd_model = model
            seen.append(model.learned_conditioning(["cat"]))  # before our callback, as the host does
        if params.sampling_step == 2:
            seen.append(_weights(shared.sd_model))

    for tag in (prompt, "cat"):
        script_callbacks.on_cfg_denoiser(take_over)
        webui.generate(tag, seed=1, steps=4)
        script_callbacks.remove_callbacks_for_function(take_over)
        shared.sd_model = first
        if tag == prompt and wanted:
            assert seen[-1].keys() == wanted.keys()
            assert all(seen[-1][name].equal(wanted[name]) for name in wanted)
        base = TinySD.random(5).state_dict()
        assert all(seen[-1][name].equal(base[name]) for name in base) == (tag == "cat")
    assert seen[2].equal(alone) and not seen[0].equal(alone)


def _weights(model: TinySD) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


OUTER = ("cat", "cat <lora:tiny_lora:1>", "cat <lora:tiny_lora:0@1,1@0.2> <lora:tiny_loha:0.5>")
INNER = ("dog", "dog <lora:tiny_locon:1>", "cat <lora:tiny_lora:0.3>")
PLACES = ("after_extra_networks_activate", "process_batch", "first step", "third step", "third step, after ours")


class Scripts:
    """What the host calls in the course of a job."""

    def __init__(self, place: str = "", action: Callable[[], object] = object) -> None:
        self.place, self.action = place, action

    def after_extra_networks_activate(self, *_: Any, **__: Any) -> None:
        self._at("after_extra_networks_activate")

    def process_batch(self, *_: Any, **__: Any) -> None:
        self._at("process_batch")

    def _at(self, place: str) -> None:
        if place == self.place:
            self.action()


def image(prompt: str, place: str = "", action: Callable[[], object] = object, **fields: Any) -> bytes:
    """Of one job, with something done in the middle of it, once."""
    from modules import processing, script_callbacks

    done: list[int] = []

    def at_step(params: Any) -> None:
        if not done and params.sampling_step == (0 if place == "first step" else 2):
            done.append(1)  # the steps of jobs inside come here too
            action()

    if place == "third step, after ours":
        scripts = Scripts("process_batch", lambda: script_callbacks.on_cfg_denoiser(at_step))
    else:
        scripts = Scripts(place, action)
    if place.endswith(" step"):
        script_callbacks.on_cfg_denoiser(at_step)
    p = processing.StableDiffusionProcessingTxt2Img(prompt=prompt, seed=1, steps=4, scripts=scripts, **fields)
    try:
        return bytes(processing.process_images(p).images[0].tobytes())
    finally:
        script_callbacks.remove_callbacks_for_function(at_step)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("outer", OUTER)
def test_a_job_goes_on_after_others_inside_it(started: Launch, outer: str, place: str) -> None:
    """Fact: a script may run a job within its own callbacks; the host applies the outer one's tags only once."""
    started()
    if place == "third step, after ours":
        outer = outer.replace("0@1,1@0.2", "0.7")  # what is done after our callback of a step counts from the next on
    alone = {prompt: image(prompt) for prompt in (outer, *INNER)}
    made: list[bytes] = []
    assert image(outer, place, lambda: made.extend(map(image, INNER))) == alone[outer]
    assert made == [alone[prompt] for prompt in INNER]
    assert {prompt: image(prompt) for prompt in alone} == alone


@pytest.mark.parametrize("place", PLACES[:2])
def test_a_job_goes_on_after_one_inside_it_that_fails(started: Launch, place: str) -> None:
    started()
    alone = image(OUTER[1])
    failed: list[str] = []

    def fails() -> None:
        with pytest.raises(RuntimeError, match="in the inner one"):
            image(INNER[1], "process_batch", fail)
        failed.append("once")

    def fail() -> None:
        raise RuntimeError("in the inner one")

    assert image(OUTER[1], place, fails) == alone
    assert failed == ["once"]
    with pytest.raises(RuntimeError, match="in the inner one"):
        image(OUTER[2], place, fail)
    assert image(OUTER[1]) == alone
    assert image("cat") == image("cat", place, lambda: image(INNER[1]))


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("inner", ["", *INNER])
def test_what_others_set_acts_on_the_text_and_outlives_a_job_inside(started: Launch, place: str, inner: str) -> None:
    webui = started()
    import networks

    def set_and_run() -> None:
        networks.loaded_networks[0].unet_multiplier = networks.loaded_networks[0].te_multiplier = 0.25
        if inner:
            image(inner)

    assert image(OUTER[1], place, set_and_run) == image("cat <lora:tiny_lora:0.25>")
    assert image(OUTER[1]) == webui.generate(OUTER[1], steps=4, guidance=5).image.tobytes()


def test_what_others_set_on_the_text_is_not_in_the_next_job(started: Launch) -> None:
    """Fact: the host keeps what it encoded last, by prompts and tags, for the next job too."""
    started()
    import networks

    def silence_text() -> None:
        networks.loaded_networks[0].te_multiplier = 0

    kept = {"cached_c": [None, None], "cached_uc": [None, None]}
    alone = image(OUTER[1])
    assert image(OUTER[1], "process_batch", silence_text, **kept) not in (alone, image("cat"))
    assert kept["cached_c"][1] is not None
    assert image(OUTER[1], **kept) == alone


@pytest.mark.parametrize("outer", OUTER[:2])
def test_networks_that_a_script_loads_in_a_job_stay_in_it(started: Launch, outer: str) -> None:
    started()
    import networks

    found = image(outer, "process_batch", lambda: networks.load_networks(["tiny_loha"], [1.0], [1.0], [None]))
    assert found == image("cat <lora:tiny_loha:1>")


def test_no_job_is_kept(started: Launch) -> None:
    """The host's jobs hold pictures and latents; it does not tell of the end of each."""
    started()
    from modules import processing

    jobs: list[weakref.ref[Any]] = []

    def run(prompt: str, fails: bool = False) -> None:
        scripts = Scripts("process_batch", (lambda: 1 / 0) if fails else object)
        p = processing.StableDiffusionProcessingTxt2Img(prompt=prompt, seed=1, steps=1, scripts=scripts)
        jobs.append(weakref.ref(p))
        with suppress(ZeroDivisionError):
            processing.process_images(p)

    for prompt in (OUTER[1], "cat", OUTER[2], "cat"):
        run(prompt)
        run(prompt, fails=True)
    run("cat")
    gc.collect()
    assert [job() for job in jobs] == [None] * len(jobs)


def test_another_extension_before_the_hosts_function(started: Launch) -> None:
    webui = started()
    from modules import processing

    ours = processing.process_images_inner
    asked: list[Any] = []

    def theirs(p: Any) -> Any:
        asked.append(p)
        return ours(p)

    try:
        processing.process_images_inner = theirs
        for _ in range(3):
            webui.reload_ui()
        alone = image(OUTER[1])
        assert image(OUTER[1], "process_batch", lambda: image(INNER[1])) == alone
        assert len(asked) == 3
        webui.close()
        assert processing.process_images_inner is theirs
    finally:
        processing.process_images_inner = ours.__wrapped__


def test_other_weights_in_the_same_model(started: Launch) -> None:
    """Fact: "`on_model_loaded` also fires on checkpoint changes with the same model object"."""
    webui = started()
    from modules import sd_models

    wanted = [generate(webui, prompt).png for prompt in ("cat", "cat <lora:tiny_lora:1>")]
    other = TinySD.random(5)
    sd_models.reload_model_weights(other.state_dict())  # while an adapter is in
    assert generate(webui, "cat").png not in wanted
    generate(webui, "cat <lora:tiny_lora:1>")
    sd_models.reload_model_weights(model().state_dict())
    assert [generate(webui, prompt).png for prompt in ("cat", "cat <lora:tiny_lora:1>")] == wanted


def test_a_base_that_is_lost_for_a_while(started: Launch, tmp_path: Path) -> None:
    """The checkpoint file is written over while an adapter is in, and comes back."""
    webui = started()
    from modules import shared

    from lib_locon.hosts import a1111

    path = checkpoint(tmp_path / "model.safetensors", shared.sd_model.state_dict())
    a1111._webui.session(shared.sd_model).engine.store.source = source_of(path)
    plain, styled = (generate(webui, prompt) for prompt in ("cat", "cat <lora:tiny_lora:1>"))
    kept, then = path.read_bytes(), path.stat()
    overwrite(path)
    lost = generate(webui, "cat")
    assert lost.image.tobytes() == styled.image.tobytes() != plain.image.tobytes()
    (comment,) = lost.comments
    assert comment.startswith("what the model held before is in this image: ")
    assert comment.count("load the checkpoint again") == 1
    assert str(tmp_path) not in comment
    path.write_bytes(kept)
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert generate(webui, "cat").png == plain.png
    assert a1111._webui.text_changed  # the webui keeps what it encoded for the image before, by the adapter's encoder


def test_close_leaves_nothing(started: Launch) -> None:
    webui = started()
    from modules import extra_networks, shared

    held = shared.sd_model
    generate(webui, "cat <lora:tiny_lora:1>")
    webui.close()
    assert extra_networks.extra_network_registry == {}
    wanted = model().state_dict()
    assert [name for name, tensor in held.state_dict().items() if not tensor.equal(wanted[name])] == []


def test_random_adapters_are_the_same_each_time(tmp_path: Path) -> None:
    written = {path.name: path.read_bytes() for path in write_all(tmp_path)}
    assert written == {path.name: path.read_bytes() for path in random_adapters.folder().iterdir()}
    assert written.keys() == {f"{name}.safetensors" for name in RECIPES}
    assert len(set(written.values())) == len(written)


def test_adapters_are_sound_files() -> None:
    from safetensors import safe_open

    for path in random_adapters.folder().iterdir():
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            assert metadata["ss_output_name"] == path.stem
            assert metadata["ss_network_module"] in ("networks.lora", "lycoris.kohya")
            keys = list(file.keys())
            assert {str(file.get_tensor(key).dtype) for key in keys} == {"torch.float16"}
            assert all(key.startswith(("lora_unet_", "lora_te_text_model_")) for key in keys)


def test_command_line(tmp_path: Path) -> None:
    """In a process of its own, as a user calls it: without, with, without, and with again."""
    prompts = ["a red cat", "a red cat <lora:glow:0.8><lora:nope:1>"] * 2
    arguments = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    command = [sys.executable, "-m", "extensions_builtin_shim", *arguments, "--seed", "1", "--steps", "2", "--json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "a.png")],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data.keys() == {"runs"}
    runs = data["runs"]
    assert [run["prompt"] for run in runs] == prompts
    assert runs[0]["sha256"] == runs[2]["sha256"] != runs[1]["sha256"] == runs[3]["sha256"]
    for index, run in enumerate(runs):
        assert run.keys() == {"prompt", "seed", "image", "sha256", "adapters", "comments", "seconds"}
        assert run["image"] == str(tmp_path / f"a-{index + 1}.png")
        assert hashlib.sha256(Path(run["image"]).read_bytes()).hexdigest() == run["sha256"]
        assert run["seconds"].keys() == {"load", "apply", "sample"}
        assert (run["seconds"]["load"] > 0) == (index == 0)
    assert runs[0]["adapters"] == []
    (adapter,) = runs[1]["adapters"]
    assert adapter.pop("total") == adapter.pop("used") == 24
    assert set(adapter.pop("families")) == {"LoHa"}
    assert adapter == {"name": "glow", "strengths": {"te": 0.8, "unet": 0.8}, "unmatched": []}
    assert "no adapter 'nope'" in "\n".join(runs[1]["comments"])
    assert done.stderr.count("no adapter 'nope'") == 2
    assert "Traceback" not in done.stderr


def test_command_line_without_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    arguments = ["--prompt", "cat <lora:outline:1:2:3:4>", "--steps", "1", "--seed", "-1", "--out", str(out)]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{out}  seed ")
    assert told.err.count("outline (LoRA) at te 1, unet 2: ") == 1
    assert told.err.count("'4' is not understood") == 1
    assert Image.open(out).size == (32, 32)


def test_json_without_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt", "cat", "--steps", "1", "--json", "--lora-dir", str(tmp_path)]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["image"] is None


def test_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").mkdir()
    assert main(["--prompt", "cat", "--steps", "1", "--out", str(tmp_path / "a.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompt x", "where should the image go"),
        ("--prompt x --out a.jpg", "--out must end in .png"),
        ("--prompt x --out none/a.png", "there is no folder none"),
        ("--prompt x --json --steps 0", "the steps must be"),
        ("--prompt x --json --steps 201", "the steps must be"),
        ("--prompt x --json --steps many", "invalid int value: 'many'"),
        ("--prompt x --json --seed -2", "the seed must be"),
        ("--prompt x --json --seed 4294967296", "the seed must be"),
        ("--prompt x --json --lora-dir none", "there is no folder none"),
        ("--prompt x --json --port 80", "--port is the page's"),
        ("--prompt \udcff --json", "no text in UTF-8"),
        ("--json", "go with --prompt"),
        ("--port 65536", "--port must be 0 to 65535"),
        ("--nonsense", "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_launch_refuses_another_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inside a real webui the stand-in stays out of the way."""
    from types import ModuleType

    other = ModuleType("modules")
    other.__file__ = str(tmp_path / "modules" / "__init__.py")
    monkeypatch.setitem(sys.modules, "modules", other)
    with pytest.raises(RuntimeError, match="another package called `modules`"):
        launch()


def test_our_extension_is_this_checkout() -> None:
    assert (OURS["sd-webui-locon"] / "scripts" / "locon.py").is_file()
