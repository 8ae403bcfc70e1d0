"""The committed adapters do what their cards say: more with more strength, nothing at 0, two together both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lib_locon
from extensions_builtin_shim.launch import launch
from extensions_builtin_shim.tiny_sd import TinySD, to_image
from extensions_builtin_shim.tiny_sd.checkpoint import load_trained
from extensions_builtin_shim.tiny_sd.evaluate import GUIDANCE, PROBES, STRENGTHS, asked, measured, paint, with_adapters
from extensions_builtin_shim.tiny_sd.judge import judge
from extensions_builtin_shim.tiny_sd.measures import share
from extensions_builtin_shim.tiny_sd.models.make_adapters import FOLDER
from extensions_builtin_shim.tiny_sd.recipes import RECIPES
from extensions_builtin_shim.tiny_sd.shapes import SHAPES, Scene, draw
from extensions_builtin_shim.tiny_sd.styles import STYLES
from extensions_builtin_shim.tiny_sd.train_adapters import batch, changed_weights, layers_of, train, write

pytestmark = pytest.mark.long
NAMES = list(RECIPES)
CONCEPTS = [name for name in NAMES if RECIPES[name].word]
LEAST = 0.55
"""The share of its style that each adapter reaches at strength 1; drawings in the style have 1, plain ones 0."""
PAIRS = [("outline", "stripes"), ("dots", "outline"), ("dots", "moon"), ("glow", "tilt"), ("frame", "tilt")]
Painted = Callable[[str, float], Tensor]


@pytest.fixture(scope="module")
def model() -> TinySD:
    return load_trained()


def file(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


@pytest.fixture(scope="module")
def painted(model: TinySD) -> Painted:
    """The probes with one adapter at a strength; each is painted once."""
    known: dict[tuple[str, float], Tensor] = {}

    def pictures(name: str, strength: float) -> Tensor:
        if (name, strength) not in known:
            known[name, strength] = with_adapters(model, [(file(name), strength)], asked(name))
        return known[name, strength]

    return pictures


def as_bytes(pictures: Tensor) -> list[bytes]:
    """What is in the files, eight bits a colour."""
    return [to_image(picture).tobytes() for picture in pictures]


# ---- the measures, on drawings whose answer is known


@pytest.mark.parametrize("name", NAMES)
def test_a_measure_says_one_on_its_style_and_next_to_nothing_on_others(name: str) -> None:
    scenes = asked(name)
    for amount in (1.0,) if name in CONCEPTS else STRENGTHS:
        drawings = [STYLES[name](scene, amount) for scene in scenes]
        assert share(drawings, scenes, name) == pytest.approx(amount, abs=0.1)
    for shape in ("circle", "ring", "heart") if name in CONCEPTS else ():
        assert share([draw(replace(scene, shape=shape)) for scene in scenes], scenes, name) < 0.1
    for other in set(NAMES) - {name, *CONCEPTS} if name not in CONCEPTS else ():
        limit = 0.6 if name == "tilt" else 0.4  # a pattern on the ground hides the shape's edge
        assert share([STYLES[other](scene, 1.0) for scene in scenes], scenes, name) < limit, other


# ---- the adapters


@pytest.mark.parametrize("name", NAMES)
def test_the_style_grows_with_the_strength(painted: Painted, name: str) -> None:
    shares = [measured(painted(name, strength), name) for strength in STRENGTHS]
    assert abs(shares[0]) < 0.2, shares
    assert all(after >= before - 0.02 for before, after in pairwise(shares)), shares
    assert shares[2] < shares[4] and shares[4] - shares[0] > 0.5, shares
    assert shares[4] >= LEAST, shares


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_it_is_there_at_strength_0(model: TinySD, painted: Painted, name: str) -> None:
    assert as_bytes(painted(name, 0.0)) == as_bytes(paint(model, asked(name)))


@pytest.mark.parametrize("name", NAMES)
def test_shape_colour_and_ground_are_still_those_of_the_prompt(painted: Painted, name: str) -> None:
    """The whole picture's mean colour is near that of the scene drawn in the style, for each but a few."""
    near = 0
    for picture, scene in zip(painted(name, 1.0), asked(name), strict=True):
        drawing = STYLES[name](scene, 1.0)
        near += bool(torch.linalg.vector_norm(picture.flatten(1).mean(1) - drawing.flatten(1).mean(1)) < 0.2)
    assert near >= 7


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_together_give_both(model: TinySD, painted: Painted, pair: tuple[str, str]) -> None:
    scenes = asked("moon") if "moon" in pair else list(PROBES)
    both = with_adapters(model, [(file(name), 1.0) for name in pair], scenes)
    for name in pair:
        alone = measured(painted(name, 1.0), name)
        # also in drawings, dots beside a moon make it less like one to its measure: 0.64
        assert share(both, scenes, name) > (0.3 if name in CONCEPTS else 0.5) * alone, name
    other_way = with_adapters(model, [(file(name), 1.0) for name in reversed(pair)], scenes)
    assert torch.equal(both, other_way)


@pytest.mark.parametrize("name", NAMES)
def test_other_numbers_in_the_same_file_would_fail(model: TinySD, tmp_path: Path, name: str) -> None:
    """The same factors in another order have the same sizes, and none of the style."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(file(name))
    for key, tensor in tensors.items():
        if tensor.ndim:
            tensors[key] = tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)
    with safe_open(file(name), "pt") as trained:
        save_file(tensors, tmp_path / "mixed.safetensors", trained.metadata())
    pictures = with_adapters(model, [(tmp_path / "mixed.safetensors", 1.0)], asked(name))
    assert measured(pictures, name) < LEAST / 2


def test_the_model_is_given_back(model: TinySD) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_adapters(model, [(file(name), 1.0) for name in NAMES], PROBES[:1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", CONCEPTS)
def test_the_concept_is_new_to_the_base_and_leaves_what_it_knew(painted: Painted, model: TinySD, name: str) -> None:
    assert not any(judge(picture).shape == name for picture in paint(model, asked(name)))
    assert [judge(picture).shape for picture in painted(name, 1.0)].count(name) >= 6
    others = with_adapters(model, [(file(name), 1.0)], PROBES)
    assert sum(judge(picture).shape == scene.shape for picture, scene in zip(others, PROBES, strict=True)) >= 6


def test_the_tag_in_the_webui_does_the_same(painted: Painted) -> None:
    """The same pictures by the prompt, through the extension as the webui loads it; and none of it at 0 or without."""
    scenes = [asked(name)[0] for name in NAMES]
    with launch(lora_dir=FOLDER) as webui:
        for name, scene in zip(NAMES, scenes, strict=True):
            prompt = f"a {scene.colour} {scene.shape} on {scene.ground}"
            runs = [
                webui.generate(f"{prompt}{tag}", seed=1000, steps=20, guidance=GUIDANCE)
                for tag in ("", f" <lora:{name}:0>", f" <lora:{name}:1>")
            ]
            assert runs[0].image.tobytes() == runs[1].image.tobytes() != runs[2].image.tobytes()
            assert runs[2].comments[0].startswith(f"{name} (") and " at 1: " in runs[2].comments[0]
            # painted alone and not among eight, sums are split otherwise: all but the same
            difference = (as_tensor(runs[2].image) - painted(name, 1.0)[0]).abs().max()
            assert difference < 0.02, name


def as_tensor(image: Image.Image) -> Tensor:
    """(3, 32, 32), 0 to 1."""
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
    return levels.view(32, 32, 3).permute(2, 0, 1)


# ---- the files


def test_every_family_and_a_concept_is_there() -> None:
    families = {recipe.family for recipe in RECIPES.values()}
    assert families >= {"LoRA", "LoCon", "LoCon Tucker", "LoHa", "LoKr", "DoRA", "OFT"}
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(NAMES)
    assert CONCEPTS and all(RECIPES[name].word not in SHAPES for name in CONCEPTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_as_a_trainer_writes_it(name: str) -> None:
    assert file(name).stat().st_size <= 320_000
    with safe_open(file(name), "pt") as opened:
        known, keys = opened.metadata(), list(opened.keys())
        assert {opened.get_slice(key).get_dtype() for key in keys} == {"F16"}
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_")) for key in keys)
    assert known["ss_output_name"] == known["modelspec.title"] == name
    assert known["ss_network_module"] in ("networks.lora", "lycoris.kohya")
    assert known["ss_base_model_version"] == "sd_v1" and json.loads(known["ss_tag_frequency"])
    raw = file(name).read_bytes()
    assert known["sshs_model_hash"] == hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_of_its_family_and_every_layer_is_used(model: TinySD, name: str) -> None:
    session = lib_locon.Session(model)
    report = session.apply([lib_locon.Use(lib_locon.load(file(name)))]).adapters[0]
    session.restore()
    assert report.used == report.total > 20
    assert any(RECIPES[name].family in family for family in report.families), report.families


@pytest.mark.parametrize("name", NAMES)
def test_the_card_has_its_text_and_picture(name: str) -> None:
    card = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert card["description"] and card["activation text"] == RECIPES[name].word
    with Image.open(FOLDER / f"{name}.png") as picture:
        assert picture.size == (128, 128)


def test_the_cards_are_for_the_loaded_model_and_none_is_hidden() -> None:
    with launch(lora_dir=FOLDER) as webui, webui.pages() as pages:
        from extensions_builtin_shim.page.cards import cards_of

        cards: Sequence[Any] = [card for page in pages for card in cards_of(page, refresh=True)["cards"]]
    assert {card["name"] for card in cards} == set(NAMES)
    for card in cards:
        about = card["locon"]
        assert not about["hidden"] and not about["problem"] and about["family"], about
        # an OFT's blocks and a file without cross-attention do not tell for which model they are
        assert about["base"] == ("" if card["name"] in ("frame", "glow") else "this model"), about
        assert card["preview"]


# ---- the training


@pytest.mark.parametrize("name", NAMES)
def test_training_uses_what_the_engine_writes(tmp_path: Path, name: str) -> None:
    """Two steps, written as a file, read and applied: the engine's weights are those that the loss was taken of."""
    recipe, fresh = replace(RECIPES[name], steps=2), load_trained()
    tensors, shown = train(fresh, recipe)
    path = write(recipe, tensors, shown, tmp_path)
    trained = layers_of(fresh, recipe)
    for item in trained:
        item.factors.update({s: tensors[f"{item.module.name}.{s}"].detach().half().float() for s in item.factors})
    wanted = {parameter: weight.detach().clone() for parameter, weight in changed_weights(fresh, trained, recipe)}
    moved = sum(not torch.equal(weight, fresh.get_parameter(parameter)) for parameter, weight in wanted.items())
    assert moved >= len(trained) - 2  # where a picture is one patch wide, its attention to itself has nothing to learn
    lib_locon.Session(fresh).apply([lib_locon.Use(lib_locon.load(path))])
    for parameter, weight in wanted.items():
        torch.testing.assert_close(fresh.get_parameter(parameter).detach(), weight, atol=1e-6, rtol=1e-6)


def test_what_is_shown_has_the_style_and_the_concept_only_where_it_is_asked_for() -> None:
    for name, recipe in RECIPES.items():
        strength, pictures, texts = batch(recipe, 0)
        assert 0 <= strength <= 1 and batch(recipe, 1)[0] == 1
        assert pictures.shape == (len(texts), 3, 32, 32)
        words = {word for step in range(4) for text in batch(recipe, step)[2] for word in text.replace(",", "").split()}
        assert ("moon" in words) == (name in CONCEPTS)
    assert draw(Scene("moon", "red", "blue")).shape == (3, 32, 32)
