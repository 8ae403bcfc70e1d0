"""Our axes in the host's X/Y/Z plot: what each cell's text says is what the cell is."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from extensions_builtin_shim.launch import launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.errors import LoconError
from lib_locon.prompt import edit
from lib_locon.prompt.presets import BUILT_IN
from lib_locon.prompt.request import Request
from tests import random_adapters

put_modules_on_path()

LABELS = [
    "[LoCon] Adapter",
    "[LoCon] Strength",
    "[LoCon] TE strength",
    "[LoCon] UNet strength",
    "[LoCon] Block weights",
]
ADAPTER, STRENGTH, TE, UNET, BLOCKS = LABELS
STEPS = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Lora"
    folder.mkdir()
    for name in ("tiny_lora", "tiny_loha", "tiny_locon"):
        shutil.copy(random_adapters.folder() / f"{name}.safetensors", folder)
    for below in ("one", "two"):
        (folder / below).mkdir()
        shutil.copy(folder / "tiny_lora.safetensors", folder / below / "twice.safetensors")
    return folder


@pytest.fixture
def webui(folder: Path) -> Iterator[Any]:
    with launch(lora_dir=folder, make_model=TinySD.random) as running:
        yield running


def script() -> Any:
    from modules import scripts

    return next(each for each in scripts.scripts_data if each.path.endswith("xyz_grid.py"))


def labels() -> list[str]:
    return [option.label for option in script().module.axis_options]


def job(prompt: str, **more: Any) -> Any:
    from modules.processing import StableDiffusionProcessingTxt2Img

    p = StableDiffusionProcessingTxt2Img(prompt=prompt, seed=1, steps=STEPS, cfg_scale=2.5)
    for name, value in more.items():
        setattr(p, name, value)
    return p


def plot(p: Any, *axes: tuple[str, str], chosen: Sequence[str] | None = None) -> Any:
    """`chosen`: the first axis' values out of its drop-down."""
    given: list[Any] = []
    for number, (label, values) in enumerate(axes):
        given += [labels().index(label), values, chosen if number == 0 else None]
    return script().script_class().run(p, *given, csv_mode=chosen is None)


def prompts(processed: Any) -> list[str]:
    return [text.split("\n")[0] for text in processed.infotexts]


def cells(prompt: str, *axes: tuple[str, str], **more: Any) -> list[str]:
    return prompts(plot(job(prompt, **more), *axes))


def made_again(webui: Any, processed: Any) -> list[bool]:
    """Whether each cell's text alone makes its picture again, in another order and by itself."""
    found = []
    for text, image in reversed(list(zip(processed.infotexts, processed.images, strict=True))):
        from modules.infotext_utils import parse_generation_parameters

        fields = parse_generation_parameters(text)
        run = webui.generate(fields["Prompt"], seed=int(fields["Seed"]), steps=int(fields["Steps"]))
        found.append(run.image.tobytes() == image.tobytes() and run.infotext.splitlines()[1:] == text.splitlines()[1:])
    return found


# ---- what the cells are


def test_adapters_by_strengths(webui: Any) -> None:
    p = job("a cat <lora:tiny_lora:0.3>")
    processed = plot(p, (ADAPTER, "None, tiny_locon"), (STRENGTH, "0.5, 1"))
    assert prompts(processed) == [
        "a cat ", "a cat <lora:tiny_locon:0.5>",
        "a cat ", "a cat <lora:tiny_locon:1>",
    ]  # fmt: skip
    pictures = [image.tobytes() for image in processed.images]
    assert len(set(pictures)) == 3 and pictures[0] == pictures[2]
    assert made_again(webui, processed) == [True] * 4
    assert p.prompt == "a cat <lora:tiny_lora:0.3>"  # the job itself is as it was


def test_each_cells_text_names_what_is_in_the_cell(webui: Any) -> None:
    """The host shares one table of parameters among the cells: what one wrote must not stand in the next."""
    texts = plot(job("a cat"), (ADAPTER, "tiny_locon, None, tiny_lora")).infotexts
    assert "tiny_locon at 1: " in texts[0] and 'Lora hashes: "tiny_locon: ' in texts[0]
    assert "Lora hashes" not in texts[1] and "Locon" not in texts[1]
    assert "tiny_lora at 1: " in texts[2] and "tiny_locon" not in texts[2]


def test_any_order_of_the_axes_makes_the_same_cells(webui: Any) -> None:
    axes = [(ADAPTER, "None, tiny_locon"), (TE, "0.25"), (UNET, "0.5"), (BLOCKS, "OUTALL")]
    wanted = {"a cat", "a cat<lora:tiny_locon:0.25:unet=0.5:lbw=OUTALL>"}
    for first, second, third in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        found = cells("a cat", axes[first], axes[second], axes[third])
        assert set(found) == {text.replace(":lbw=OUTALL", "") for text in wanted}
    for first, second in ((0, 3), (3, 0)):
        assert set(cells("a cat", axes[first], axes[second])) == {"a cat", "a cat<lora:tiny_locon:1:lbw=OUTALL>"}
    with_tag = [cells("a <lora:tiny_lora:te=0.5:dyn=2> cat", *order) for order in (axes[:2], axes[1::-1])]
    assert set(with_tag[0]) == set(with_tag[1]) == {"a  cat", "a <lora:tiny_locon:0.25:unet=0.5:dyn=2> cat"}


def test_without_the_first_adapter_the_second_stays_as_it_is(webui: Any) -> None:
    prompt = "<lora:tiny_lora:1><lora:tiny_locon:0.7>"
    for axes in ([(ADAPTER, "None"), (STRENGTH, "0.1")], [(STRENGTH, "0.1"), (ADAPTER, "None")]):
        assert cells(prompt, *axes) == ["<lora:tiny_locon:0.7>"]


def test_a_strength_goes_to_the_named_adapter(webui: Any) -> None:
    prompt = "<lora:tiny_lora:1><lyco:tiny_locon:0.7:1:hr=2>"
    assert cells(prompt, (STRENGTH, "tiny_locon: 0.1, 0.2")) == [
        f"<lora:tiny_lora:1><lyco:tiny_locon:{number}:hr=2>" for number in ("0.1", "0.2")
    ]
    assert cells(prompt, (UNET, "tiny_locon: 0.1"), (ADAPTER, "None")) == ["<lyco:tiny_locon:0.7:unet=0.1:hr=2>"]


def test_the_default_multiplier_is_the_hosts(webui: Any) -> None:
    from modules import shared

    shared.opts.set("extra_networks_default_multiplier", 0.6)
    assert cells("a cat", (ADAPTER, "tiny_lora")) == ["a cat<lora:tiny_lora:0.6>"]


def test_every_prompt_of_the_job_is_changed(webui: Any) -> None:
    p = job(["a cat <lora:tiny_lora:1>", "a dog"], n_iter=2)
    cell = copy.copy(p)
    option = next(option for option in script().module.axis_options if option.label == ADAPTER)
    option.apply(cell, "tiny_locon", ["tiny_locon"])
    assert cell.prompt == ["a cat <lora:tiny_locon:1>", "a dog"]
    assert p.prompt == ["a cat <lora:tiny_lora:1>", "a dog"]


@pytest.mark.parametrize(
    ("prompt", "hires", "wanted"),
    [
        ("a <lora:tiny_lora:1>", "b <lora:tiny_lora:0.5>", "b <lora:tiny_locon:0.5>"),
        ("a <lora:tiny_lora:1>", "b", "b"),
        ("a <lora:tiny_lora:1>", "b <lora:tiny_loha:0.5>", "b <lora:tiny_loha:0.5>"),
        ("a", "b", "b<lora:tiny_locon:1>"),
        ("a", "", ""),
    ],
)
def test_a_prompt_for_the_hires_pass(webui: Any, prompt: str, hires: str, wanted: str) -> None:
    p = job(prompt, hr_prompt=hires)
    next(option for option in script().module.axis_options if option.label == ADAPTER).apply(p, "tiny_locon", [])
    assert p.hr_prompt == wanted


def test_beside_an_axis_of_the_hosts(webui: Any) -> None:
    assert cells("a cat <lora:tiny_lora:1>", ("Prompt S/R", "cat, dog"), (STRENGTH, "0-1 [2]")) == [
        f"a {what} <lora:tiny_lora:{strength}>" for strength in (0, 1) for what in ("cat", "dog")
    ]


# ---- what may be written


ONE, TWO, TWICE = "<lora:tiny_lora:0.3>", "<lora:tiny_lora:0.3> <lora:tiny_loha:1>", "<lora:tiny_lora:0.3>" * 2


@pytest.mark.parametrize(
    ("tags", "adapter", "name", "wanted"),
    [
        (TWO, "tiny_locon", "tiny_lora", "<lora:tiny_locon:0.5> <lora:tiny_loha:1>"),
        (TWO, "tiny_locon", "tiny_loha", "<lora:tiny_locon:0.3> <lora:tiny_loha:0.5>"),
        (TWO, "tiny_loha", "tiny_loha", "<lora:tiny_loha:0.3> <lora:tiny_loha:0.5>"),
        (TWO, "None", "tiny_lora", " <lora:tiny_loha:1>"),
        (TWO, "None", "tiny_loha", " <lora:tiny_loha:0.5>"),
        (TWICE, "tiny_loha", "tiny_lora", "<lora:tiny_loha:0.5><lora:tiny_lora:0.3>"),
        (TWICE, "None", "tiny_lora", "<lora:tiny_lora:0.3>"),
    ],
)
def test_a_strength_follows_its_tag(webui: Any, tags: str, adapter: str, name: str, wanted: str) -> None:
    axes = (ADAPTER, adapter), (STRENGTH, f"{name}: 0.5")
    assert cells(f"a cat {tags}", *axes) == cells(f"a cat {tags}", *reversed(axes)) == [f"a cat {wanted}"]


def test_a_strength_follows_its_tag_through_two_axes(webui: Any) -> None:
    axes = (ADAPTER, "tiny_loha"), (ADAPTER, "tiny_locon"), (STRENGTH, "tiny_lora: 0.5")
    assert cells(f"a cat {ONE}", *axes) == ["a cat <lora:tiny_locon:0.5>"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_strength_for_an_adapter_that_only_an_axis_names(webui: Any, order: int) -> None:
    axes = (ADAPTER, "tiny_loha"), (STRENGTH, "tiny_loha: 0.5")
    with pytest.raises(LoconError, match="for 'tiny_loha', and the prompt has no tag of it"):
        cells(f"a cat {ONE}", *axes[::order])


def test_the_values_of_a_strength(webui: Any) -> None:
    from lib_locon.hosts.xyz import listed

    assert listed("0.2, .4,1,") == ["0.2", ".4", "1"]
    assert listed("0-1 (+0.25)") == ["0", "0.25", "0.5", "0.75", "1"]
    assert listed("0-1 (0.3)") == ["0", "0.3", "0.6", "0.9"]
    assert listed("1 - -1 [3], 7") == ["1", "0", "-1", "7"]
    assert listed("1-0 (-0.5)") == ["1", "0.5", "0"]
    assert listed("1-3") == ["1", "2", "3"]
    assert listed("-1-1[1]") == ["-1"]
    assert listed("0@0;1@0.5, 1") == ["0@0;1@0.5", "1"]
    assert listed(" some style : 0.5, 0-1 [2]") == ["some style: 0.5", "some style: 0", "some style: 1"]
    assert listed("") == []
    assert len(listed("0-1 (0.0000001)")) <= 10_000
    for wrong in ("0-1 (-0.1)", "1-0", "0-1 (0)", "0-1 [0]"):
        with pytest.raises(LoconError, match="range without a value"):
            listed(wrong)


@pytest.mark.parametrize("text", ["much", "0.5, much", "tiny_lora: much", "nan", "1;2"])
def test_no_strength_is_refused_before_the_first_image(webui: Any, text: str) -> None:
    with pytest.raises(LoconError, match=r"is no number|only .* counts"):
        plot(job("<lora:tiny_lora:1>"), (STRENGTH, text))


def test_an_unknown_name_is_refused_with_those_near_it(webui: Any) -> None:
    with pytest.raises(LoconError, match=r"no adapter 'tiny_lroa'.*near it: .*tiny_lora.*; .*'nothing'"):
        plot(job("a cat"), (ADAPTER, "tiny_lora, tiny_lroa, None, nothing"))
    with pytest.raises(LoconError, match="'twice' could be any of these: one/twice, two/twice"):
        plot(job("a cat"), (ADAPTER, "twice"))


def test_a_name_that_no_tag_can_hold_is_refused(webui: Any) -> None:
    with pytest.raises(LoconError, match="no tag can hold"):
        plot(job("a cat"), (ADAPTER, "tiny_lora:0.5"))


def test_an_unknown_preset_is_refused_with_those_near_it(webui: Any) -> None:
    with pytest.raises(LoconError, match=r"no preset 'OUTAL' \(near it: OUTALL"):
        plot(job("<lora:tiny_lora:1>"), (BLOCKS, "OUTAL"))


def test_a_strength_for_no_adapter_is_an_error(webui: Any) -> None:
    with pytest.raises(LoconError, match="the prompt has no tag"):
        plot(job("a cat"), (STRENGTH, "0.5"))
    with pytest.raises(LoconError, match="for 'tiny_loha', and the prompt has no tag of it"):
        plot(job("a cat <lora:tiny_lora:1>"), (STRENGTH, "tiny_loha: 0.5"))


def test_a_tag_that_cannot_be_read_is_an_error(webui: Any) -> None:
    with pytest.raises(LoconError, match="'much' is no number"):
        plot(job("<lora:tiny_lora:much>"), (UNET, "0.5"))


def test_block_weights(webui: Any) -> None:
    values = ",".join(["1", *["0"] * 16])
    processed = plot(job("<lora:tiny_locon:1:lbw=INALL>"), (BLOCKS, f'None, OUTALL, "{values}", IN04'))
    assert prompts(processed) == [
        "<lora:tiny_locon:1>",
        *(f"<lora:tiny_locon:1:lbw={name}>" for name in ("OUTALL", values, "IN04")),
    ]
    assert made_again(webui, processed) == [True] * 4


def test_the_users_presets_are_among_the_block_weights(webui: Any) -> None:
    from modules import shared

    shared.opts.set("locon_presets", "MINE:" + ",".join(["0.5"] * 17))
    option = next(option for option in script().module.axis_options if option.label == BLOCKS)
    assert option.choices()[:2] == ["None", "NONE"] and "MINE" in option.choices()
    assert prompts(plot(job("<lora:tiny_lora:1>"), (BLOCKS, ""), chosen=["MINE"])) == ["<lora:tiny_lora:1:lbw=MINE>"]


def test_the_drop_down_lists_what_a_tag_can_find(webui: Any, folder: Path) -> None:
    option = next(option for option in script().module.axis_options if option.label == ADAPTER)
    assert option.choices()[0] == "None"
    assert "tiny_lora" in option.choices() and "new" not in option.choices()
    shutil.copy(folder / "tiny_lora.safetensors", folder / "new.safetensors")
    assert "new" in option.choices()
    processed = plot(job("a cat"), (ADAPTER, ""), chosen=option.choices())
    assert len(processed.images) == len(option.choices())


# ---- where the axes are


def test_the_axes_are_there_once(webui: Any) -> None:
    for _ in range(3):
        assert [label for label in labels() if label.startswith("[LoCon]")] == LABELS
        assert all(type(option) is script().module.AxisOption for option in script().module.axis_options)
        webui.reload_ui()


def test_a_second_building_of_the_page_doubles_nothing(webui: Any) -> None:
    from modules import script_callbacks

    script_callbacks.before_ui_callback()
    assert [label for label in labels() if label.startswith("[LoCon]")] == LABELS


def test_unloaded_they_are_gone(webui: Any) -> None:
    from modules import script_callbacks

    theirs = script().module.axis_options
    before = [option for option in theirs if not option.label.startswith("[LoCon]")]
    script_callbacks.script_unloaded_callback()
    assert script().module.axis_options is theirs
    assert theirs == before and len(before) > 3


def test_without_the_script_nothing_happens(webui: Any) -> None:
    from modules import scripts

    from lib_locon.hosts.xyz import Axes

    kept = list(scripts.scripts_data)
    scripts.scripts_data.clear()
    axes = Axes(list, lambda: None, lambda: BUILT_IN)  # type: ignore[arg-type, return-value]
    axes.add()
    axes.remove()
    scripts.scripts_data.extend(kept)


# ---- the text of a prompt


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (edit.both(edit.strength("0.5")), "<lora:a>", "<lora:a:0.5>"),
        (edit.both(edit.strength("0.5")), "<lora:a:1:0:4>", "<lora:a:0.5:dyn=4>"),
        (edit.both(edit.strength("0.5")), "<lora:a:te1=1:in=2:hr=3>", "<lora:a:0.5:hr=3>"),
        (edit.both(edit.strength("0@0;1@1")), "<lora:a:1>", "<lora:a:0@0,1@1>"),
        (edit.text_encoders(edit.strength("0")), "<lora:a>", "<lora:a:0:unet=1>"),
        (edit.text_encoders(edit.strength("0")), "<lora:a:0.5>", "<lora:a:0:unet=0.5>"),
        (edit.text_encoders(edit.strength("0")), "<lora:a:0.5:0.7:te2=3>", "<lora:a:0:unet=0.7>"),
        (edit.unet(edit.strength("-1")), "<lora:a>", "<lora:a:unet=-1>"),
        (edit.unet(edit.strength("-1")), "<lyco:a:te=0.5:mid=2>", "<lyco:a:0.5:unet=-1>"),
        (edit.blocks("MIDD", BUILT_IN), "<lora:lora:0.5>", "<lora:lora:0.5:lbw=MIDD>"),
        (edit.no_blocks, "<lora:a:0.5:1:OUTALL>", "<lora:a:0.5:unet=1>"),
    ],
)
def test_a_changed_tag(change: Callable[[Request], Request], before: str, after: str) -> None:
    prompt = f"x {before} y <lora:b:9> <hypernet:c:1>"
    tag = edit.first_tag(prompt)
    assert tag is not None
    assert edit.changed(prompt, tag, change, BUILT_IN) == f"x {after} y <lora:b:9> <hypernet:c:1>"


def test_another_name_leaves_all_else_as_it_was_written() -> None:
    prompt = "x <lyco: old :0.80:unknown=1:> <lora:old:2>"
    tag = edit.first_tag(prompt)
    assert tag is not None and tag.name == "old"
    assert edit.renamed(prompt, tag, "new") == "x <lyco:new:0.80:unknown=1:> <lora:old:2>"
    assert edit.without(prompt, tag) == "x  <lora:old:2>"
    assert edit.first_tag(prompt, "none") is None
