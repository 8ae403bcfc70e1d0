"""Block weights: lists, presets, rules, and which block each weight of the real models is in."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_locon.models.blocks import block_of, place_of
from lib_locon.models.table import TargetTable
from lib_locon.prompt.blocks import FLUX, LAYOUTS, SD, parse_block_list
from lib_locon.prompt.elements import Elements, parse_rules
from lib_locon.prompt.layers import is_pattern, matches
from lib_locon.prompt.numbers import BadValue
from lib_locon.prompt.presets import BUILT_IN, Presets
from tests.oracles import model_tables

# ---- lists


def test_layouts_are_of_the_lengths_that_they_are_known_by() -> None:
    assert {count: len(layout) for count, layout in LAYOUTS.items()} == {12: 12, 17: 17, 20: 20, 26: 26, 61: 61}
    assert all(set(LAYOUTS[count]) < set(SD) for count in (12, 17, 20))
    assert SD[13] == "MID"
    assert FLUX[22:24] == ("S00", "S01")
    assert FLUX[-1] == "OUT"


# how many values -> what 1, 2, 3, … are for, and blocks that the list leaves at 0
SHORT = {
    12: ({"BASE": 1, "IN04": 2, "IN08": 5, "MID": 6, "OUT00": 7, "OUT05": 12}, {"IN00", "IN06", "OUT06", "OUT11"}),
    17: ({"BASE": 1, "IN01": 2, "IN08": 7, "MID": 8, "OUT03": 9, "OUT11": 17}, {"IN00", "IN03", "IN11", "OUT00"}),
    20: ({"BASE": 1, "IN00": 2, "IN08": 10, "MID": 11, "OUT00": 12, "OUT08": 20}, {"IN09", "OUT09"}),
    26: ({"BASE": 1, "IN00": 2, "IN11": 13, "MID": 14, "OUT00": 15, "OUT11": 26}, set()),
    61: ({"CLIP": 1, "T5": 2, "IN": 3, "D00": 4, "D18": 22, "S00": 23, "S37": 60, "OUT": 61, "BASE": 1}, set()),
}


@pytest.mark.parametrize("count", SHORT)
def test_what_each_value_is_for(count: int) -> None:
    values, left_out = SHORT[count]
    ratios = parse_block_list(",".join(str(n + 101) for n in range(count))).at(1)
    assert {block: ratios.of(block) - 100 for block in values} == values
    assert {block: ratios.of(block) for block in left_out} == dict.fromkeys(left_out, 0)
    assert ratios.of("") == 1  # time_embed and the like
    assert ratios.of("D00" if count != 61 else "IN04") == 1  # a model of another kind


def test_blocks_of_a_model_that_a_list_does_not_name_are_said() -> None:
    sdxl = ["", "BASE", "IN01", "IN04", "OUT00", "OUT05", "OUT02"]
    (note,) = BUILT_IN.block_list("ALL").at(1).notes(sdxl)
    assert note == "the block weights have no values for OUT00, OUT02, which counts as 0"
    assert BUILT_IN.block_list("FLUXALL").at(1).notes(["BASE", "T5", "IN", "D00", "S37", ""]) == []
    assert BUILT_IN.block_list("BASE").at(1).notes([*SD, "T5", ""]) == []
    (note,) = BUILT_IN.block_list("ALL").at(1).notes(["BASE", "T5", "D00", "S00", ""])
    assert "another kind of model" in note


def test_x_is_the_tags_number_and_may_have_one_added() -> None:
    ratios = parse_block_list("X,X+0.25,X-0.5, X ,1,1,1,1,1,1,1,1").at(0.5)
    assert ratios.values[:5] == (0.5, 0.75, 0, 0.5, 1)


def test_random_values_are_the_same_for_the_same_seed_in_their_ranges_and_rounded() -> None:
    blocks = parse_block_list(",".join(["R"] * 30 + ["U"] * 31))
    first, second = blocks.drawn("1").at(1).values, blocks.drawn("1").at(1).values
    assert first == second != blocks.drawn("2").at(1).values
    assert all(0 <= value <= 1 and value == round(value, 3) for value in first[:30])
    assert all(-0.5 <= value <= 1.5 and value == round(value, 3) for value in first[30:])
    assert min(first[30:]) < 0
    assert max(first[30:]) > 1
    assert blocks.random
    assert not blocks.drawn("1").random


# text -> what is said, where
BAD_LISTS = {
    "1,1,1": ("not 3 values", 0),
    "1,1,1,1,1,1,1,1,1,1,x,1": ("'x' is no value for a block", 20),
    "1,1,1,1, y,1,1,1,1,1,1,1": ("'y' is no value for a block", 9),
    ",1,1,1,1,1,1,1,1,1,1,1": ("'' is no value for a block", 0),
    "XX,1,1,1,1,1,1,1,1,1,1,1": ("'XX' is no value for a block", 0),
    "X*2,1,1,1,1,1,1,1,1,1,1,1": ("'X*2' is no value for a block", 0),
    "r,1,1,1,1,1,1,1,1,1,1,1": ("'r' is no value for a block", 0),
}


@pytest.mark.parametrize("text", BAD_LISTS)
def test_what_is_no_list_and_where(text: str) -> None:
    says, at = BAD_LISTS[text]
    with pytest.raises(BadValue, match=re.escape(says)) as caught:
        parse_block_list(text)
    assert caught.value.at == at


# ---- presets

# preset -> the blocks at 1; those of 17 that are not named here are at 0
PRESETS = {
    "NONE": "",
    "ALL": "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    "INS": "BASE IN01 IN02 IN04",
    "IND": "BASE IN05 IN07 IN08",
    "INALL": "BASE IN01 IN02 IN04 IN05 IN07 IN08",
    "MIDD": "BASE IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06",
    "OUTD": "BASE OUT03 OUT04 OUT05 OUT06",
    "OUTS": "BASE OUT07 OUT08 OUT09 OUT10 OUT11",
    "OUTALL": "BASE OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    "IN02": "IN02",
    "MID": "MID",
    "M00": "MID",
    "BASE": "BASE",
}


@pytest.mark.parametrize("name", PRESETS)
def test_built_in_presets(name: str) -> None:
    ratios = BUILT_IN.block_list(name).at(1)
    assert {block for block in SD if ratios.of(block)} == set(PRESETS[name].split())
    assert {ratios.of(block) for block in SD} <= {0, 1}


def test_other_presets() -> None:
    assert BUILT_IN.block_list("ALL0.5").at(1).values == (0.5,) * 17
    assert BUILT_IN.block_list("FLUXALL").at(1).values == (1,) * 61
    assert {block for block in FLUX if BUILT_IN.block_list("D03").at(1).of(block)} == {"D03"}
    assert not BUILT_IN.problems


def test_an_unknown_preset_names_near_ones() -> None:
    with pytest.raises(BadValue, match=r"no preset 'OUTAL' \(near it: OUTALL"):
        BUILT_IN.block_list("OUTAL")
    with pytest.raises(BadValue, match=r"no preset 'ATTNDEEP' \(near it: ATTNDEEPO"):
        BUILT_IN.element_rules("ATTNDEEP")
    for name in ("IN", "OUT", "ins", ""):  # Flux's own IN and OUT are not what is meant by these
        with pytest.raises(BadValue, match="no preset"):
            BUILT_IN.block_list(name)


def test_the_users_presets() -> None:
    text = """
    # a comment: 1,2
    just words
    MINE:1,0,0,0,1,0,0,0,0,0,0,0
    ALL : 2,2,2,2,2,2,2,2,2,2,2,2
    SHORT:1,2
    ONE:1
    a=b:1,0,0,0,1,0,0,0,0,0,0,0
    SOFT::attn1:0.5,BASE::0
    OUT03-OUT05:attn2:0.25

    WRONG:IN05-IN99:attn:1
    """
    presets = BUILT_IN.with_text(text)
    assert presets.block_list("MINE").at(1).of("IN08") == 1
    assert presets.block_list("ALL").at(1).of("BASE") == 2
    assert "ONE" not in presets.blocks
    assert presets.block_list("NONE") is BUILT_IN.block_list("NONE")
    assert [rule.ratio for rule in presets.element_rules("SOFT").rules] == [0.5, 0, 0.25]
    assert [problem.partition(":")[0] for problem in presets.problems] == [
        f"line {number} of the presets is not used" for number in (6, 8, 12)
    ]
    assert "IN05-IN99" in presets.problems[-1]


@given(text=st.one_of(st.text(), st.lists(st.sampled_from([*"AB:,\n#-X 01", "IN05", "NOT", "1,"])).map("".join)))
def test_any_text_is_read_as_presets(text: str) -> None:
    presets = Presets().with_text(text)
    assert all(isinstance(problem, str) for problem in presets.problems)


# ---- rules for layers

ATTN1 = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
PROJ = "output_blocks.5.1.proj_in"

# rules -> ratios of ATTN1 in IN04, PROJ in OUT05, a layer of the text encoder, one in no block; 2 is as before
RULES = {
    "": (2, 2, 2, 2),
    "::0": (0, 0, 0, 0),
    "IN04::0.5": (0.5, 2, 2, 2),
    "IN00-IN11::0.5": (0.5, 2, 2, 2),
    "OUT05-IN05::0.5": (2, 0.5, 2, 2),
    "IN04-M00::0.5": (0.5, 2, 2, 2),
    "NOT IN04::0.5": (2, 0.5, 0.5, 0.5),
    "NOT BASE IN04::0.5": (2, 0.5, 2, 0.5),
    "BASE::0.5": (2, 2, 0.5, 2),
    "CLIP::0.5": (2, 2, 0.5, 2),
    ":attn:0.5": (0.5, 2, 0.5, 2),  # self_attn has attn in it
    ":attn1:0.5": (0.5, 2, 2, 2),
    ":attn2:0.5": (2, 2, 2, 2),
    ":attn1 proj_in:0.5": (0.5, 0.5, 2, 2),
    ":NOT attn1:0.5": (2, 0.5, 0.5, 0.5),
    "IN:attn1:0.5": (0.5, 2, 2, 2),
    "IN04:attn:0.5,:to_q:0.25": (0.25, 2, 2, 2),  # the last one counts
    "IN04:attn:0.5\nOUT05:proj:0.25": (0.5, 0.25, 2, 2),
    "IN04 OUT05:attn1 proj:-1": (-1, -1, 2, 2),
}


@pytest.mark.parametrize("text", RULES)
def test_rules_take_the_place_of_the_blocks_ratio(text: str) -> None:
    elements = Elements("test", parse_rules(text))
    layers = ((ATTN1, "IN04"), (PROJ, "OUT05"), ("encoder.layers.0.self_attn.out_proj", "BASE"), ("time_embed.0", ""))
    assert tuple(elements.of(block, layer, 2) for layer, block in layers) == RULES[text]


@pytest.mark.parametrize("text", ["a:b", "a:b:c:1", "::x", "IN05-XX::1", "IN05-IN06-IN07-Q::1"])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(BadValue):
        parse_rules(text)


# pattern -> whether it matches ATTN1, PROJ
PATTERNS = {
    "attn1.*": (True, False),
    "attn1": (True, False),
    "*attn*": (True, False),
    "to_q": (True, False),
    "*.to_q": (True, False),
    "to_*": (True, False),
    "ttn1.*": (False, False),
    "attn2.*": (False, False),
    "*": (True, True),
    "input_blocks.4.*": (True, False),
    "input_blocks.?.1": (True, False),
    "*put_blocks.[45].*": (True, True),
    "output_blocks.5": (False, True),
    "proj_*": (False, True),
    ATTN1: (True, False),
    "[": (False, False),
    "[!": (False, False),
    "": (False, False),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_whole_segments(pattern: str) -> None:
    assert (matches(pattern, ATTN1), matches(pattern, PROJ)) == PATTERNS[pattern]


@given(pattern=st.text(), layer=st.text())
def test_any_pattern_can_be_asked(pattern: str, layer: str) -> None:
    assert matches(pattern, layer) in (True, False)
    assert is_pattern(pattern) in (True, False)


# ---- the blocks of real models


def by_substring(name: str) -> str:
    """lora-block-weight's rule, on the names of A1111's layers: the last entry whose mark is in the name."""
    marks = {
        "encoder": "BASE",
        **{f"input_blocks_{n}_": f"IN{n:02}" for n in range(12)},
        "middle_block_": "MID",
        **{f"output_blocks_{n}_": f"OUT{n:02}" for n in range(12)},
        "embedders": "BASE",
        "transformer_resblocks": "BASE",
    }
    found = [block for mark, block in marks.items() if mark in name]
    return found[-1] if found else ""


@pytest.mark.parametrize("model", model_tables.UNETS)
def test_every_weight_is_in_the_block_of_the_substring_rule(model: str) -> None:
    table = TargetTable.of_shapes(model_tables.live(model))
    seen = set()
    for target in table.modules():
        for views in target.views.values():
            (view,) = views
            place = place_of(target.component, view.path)
            kind = "" if target.component.startswith("te") else "diffusion_model_"
            assert place.block == by_substring(kind + place.layer.replace(".", "_")), view.path
            assert place.layer in view.path.replace(".wrapped", "")
            assert not place.layer.startswith(("model.diffusion_model.", "cond_stage_model.", "conditioner."))
            seen.add(place.block)
    levels = 9 if model == "sdxl" else 12
    wanted = {f"{side}{n:02}" for side in ("IN", "OUT") for n in range(levels)}
    assert seen == {*wanted, "MID", "BASE", ""}


@pytest.mark.parametrize("model", model_tables.UNETS)
def test_diffusers_names_are_in_the_same_blocks(model: str) -> None:
    """By the table's own translation, which has tests of its own."""
    table = TargetTable.of_shapes(model_tables.live(model))
    asked = 0
    for path in model_tables.read("diffusers", model):
        name = path.rpartition(".")[0]
        target = table.find(name, ("unet",))
        if not name.startswith(("down_", "up_", "mid_", "conv_in")) or target is None:
            continue
        (view,) = next(iter(target.views.values()))
        assert block_of("unet", name) == place_of("unet", view.path).block != "", name
        asked += 1
    assert asked > 300


def test_fluxs_blocks() -> None:
    table = TargetTable.of_shapes(model_tables.live("flux"))
    wanted = {
        "double_blocks.0.img_mod.lin": "D00",
        "double_blocks.18.txt_attn.proj": "D18",
        "single_blocks.37.linear1": "S37",
        "img_in": "IN",
        "time_in.in_layer": "IN",
        "guidance_in.out_layer": "IN",
        "final_layer.linear": "OUT",
    }
    assert {name: block_of("unet", name) for name in wanted} == wanted
    seen = {
        place_of(target.component, views[0].path).block for target in table.modules() for views in target.views.values()
    }
    assert seen == {"BASE", *FLUX[1:], ""}


def test_a_model_without_parts_has_blocks_too() -> None:
    assert place_of("model", "input_blocks.4.1.proj_in.weight") == ("IN04", "input_blocks.4.1.proj_in")
    assert place_of("model", "linear.weight") == ("", "linear")
    assert place_of("model", "weight") == ("", "")
