"""The prompt's tags, one example per rule, and a fuzz: any text at all is read without an error."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib_locon.prompt.blocks import LAYOUTS
from lib_locon.prompt.edit import tags
from lib_locon.prompt.grammar import parse_prompt
from lib_locon.prompt.keys import CURVES as CURVE_KEYS
from lib_locon.prompt.keys import KEYS
from lib_locon.prompt.presets import BUILT_IN
from lib_locon.prompt.request import Request, Strengths

# tag -> (name, te, unet, dyn)
RULES = {
    "<lora:style>": ("style", 1, 1, None),
    "<lora:style:0.8>": ("style", 0.8, 0.8, None),  # `te` alone sets `unet` too
    "<lora:style:0.8:0.5>": ("style", 0.8, 0.5, None),
    "<lora:style:0.8:0.5:4>": ("style", 0.8, 0.5, 4),
    "<lora:style:te=0.8>": ("style", 0.8, 0.8, None),
    "<lora:style:unet=0.5>": ("style", 1, 0.5, None),
    "<lora:style:dyn=4>": ("style", 1, 1, 4),
    "<lora:style:dyn=4:unet=0.5:te=0.8>": ("style", 0.8, 0.5, 4),
    "<lora:style:0.8:unet=0.5>": ("style", 0.8, 0.5, None),
    "<lora:style:0.8:te=0.3>": ("style", 0.3, 0.3, None),  # a key wins over a place
    "<lora:style:te=0.3:0.8>": ("style", 0.3, 0.3, None),
    "<lora:style:te=0.3:0.8:0.5>": ("style", 0.3, 0.5, None),  # the places are counted all the same
    "<lora:style:te=0.3:te=0.4>": ("style", 0.4, 0.4, None),
    "<lora:style:0>": ("style", 0, 0, None),
    "<lora:style:-1.5>": ("style", -1.5, -1.5, None),
    "<lora:style:+.5>": ("style", 0.5, 0.5, None),
    "<lora:style:1e-2>": ("style", 0.01, 0.01, None),
    "<lora:style:2.>": ("style", 2, 2, None),
    "<lora: style : 0.8 : unet = 0.5 >": ("style", 0.8, 0.5, None),
    "<lyco:style:0.8>": ("style", 0.8, 0.8, None),  # the older extension's tag
    "<lora:folder/a b (v1.0).final:0.8>": ("folder/a b (v1.0).final", 0.8, 0.8, None),
    "<lora:#0123abcd:0.8>": ("#0123abcd", 0.8, 0.8, None),
    "<lora:名前:0.8>": ("名前", 0.8, 0.8, None),
    "<lora:<b:0.8>": ("<b", 0.8, 0.8, None),
}


@pytest.mark.parametrize("tag", RULES)
def test_a_tag_is_read_by_the_rules(tag: str) -> None:
    name, te, unet, dyn = RULES[tag]
    parsed = parse_prompt(f"a cat, {tag} on a mat")
    (request,) = parsed.requests
    assert (request.name, request.strengths, request.dyn) == (name, Strengths(te, unet), dyn)
    assert not request.scheduled
    assert request.at(7, 20, hires=True) == request.strengths
    assert parsed.text == "a cat,  on a mat"
    assert not parsed.bad
    assert not parsed.warnings


def read(arguments: str) -> Request:
    parsed = parse_prompt(f"<lora:style:{arguments}>")
    assert not parsed.bad
    assert not parsed.warnings
    (request,) = parsed.requests
    return request


# (component, block, layer)
PLACES = {
    "te1": ("te1", "BASE", "transformer.text_model.encoder.layers.0.mlp.fc1"),
    "te2": ("te2", "BASE", "model.transformer.resblocks.0.mlp.c_fc"),
    "te3": ("te3", "T5", "transformer.encoder.block.0.layer.0.SelfAttention.q"),
    "in": ("unet", "IN04", "input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
    "mid": ("unet", "MID", "middle_block.1.transformer_blocks.0.attn2.to_q"),
    "out": ("unet", "OUT05", "output_blocks.5.1.transformer_blocks.0.attn2.to_k"),
    "time": ("unet", "", "time_embed.0"),
    "bare": ("model", "IN04", "input_blocks.4.1.proj_in"),
}

# arguments -> place -> strength, where it is not 1
OF_PLACES = {
    "0.5": dict.fromkeys(PLACES, 0.5),
    "0.5:1": {"te1": 0.5, "te2": 0.5, "te3": 0.5},
    "te1=0.25": {"te1": 0.25},
    "te2=0.25": {"te2": 0.25},
    "0.5:te2=0.25": {**dict.fromkeys(PLACES, 0.5), "te2": 0.25},
    "te=0.5:te1=0.25:te2=0:unet=1": {"te1": 0.25, "te2": 0, "te3": 0.5},
    "in=0.25": {"in": 0.25, "bare": 0.25},
    "mid=0": {"mid": 0},
    "0.5:out=2": {**dict.fromkeys(PLACES, 0.5), "out": 2},
    "unet=0:in=0.5:mid=0.25:out=-1": {"in": 0.5, "mid": 0.25, "out": -1, "time": 0, "bare": 0.5},
    "lbw=NONE": {**dict.fromkeys(PLACES, 0), "time": 1},
    "0.5:lbw=OUTALL": {**dict.fromkeys(PLACES, 0.5), "in": 0, "mid": 0, "bare": 0},
    "lbw=ALL0.5:in=0.5": {**dict.fromkeys(PLACES, 0.5), "in": 0.25, "bare": 0.25, "time": 1},
    "lbw=MID": {**dict.fromkeys(PLACES, 0), "mid": 1, "time": 1},
    "w=MID": {**dict.fromkeys(PLACES, 0), "mid": 1, "time": 1},
    "lbw=0.5,2,1,1,1,X,1,1,1,1,1,X-1:x=3": {"te1": 0.5, "te2": 0.5, "te3": 0.5, "in": 2, "bare": 2, "mid": 3, "out": 2},
    "lbw=X,X,X,X,X,X,X,X,X,X,X,X": {},  # x is 1 where it is not given
    "lbwe=ATTNDEEPOFF": {"mid": 0, "out": 0},  # from IN05 to OUT05
    "lbw=NONE:lbwe=ATTNDEEPON": {**dict.fromkeys(PLACES, 0), "mid": 1, "out": 1, "time": 1},
    "0.5:lbw=NONE:lbwe=ATTNDEEPON": {**dict.fromkeys(PLACES, 0), "mid": 0.5, "out": 0.5, "time": 0.5},
    "attn2.*=0.3": {"mid": 0.3, "out": 0.3},
    "attn2.*=0.5:attn2.to_q=0.5": {"mid": 0.25, "out": 0.5},  # they multiply
    "0.5:*_blocks.*=0": {**dict.fromkeys(PLACES, 0.5), "in": 0, "out": 0, "bare": 0, "mid": 0},
    "lbw=OUTALL:*.attn2.*=0.5": {"in": 0, "mid": 0, "bare": 0, "out": 0.5},
    "text_model.*=0": {"te1": 0},
}


@pytest.mark.parametrize("arguments", OF_PLACES)
def test_the_strength_of_each_part_of_a_model(arguments: str) -> None:
    strengths = read(arguments).strengths
    found = {name: strengths.of(*place) for name, place in PLACES.items()}
    assert found == {**dict.fromkeys(PLACES, 1), **OF_PLACES[arguments]}


# older spellings of lora-block-weight -> the same with keys
BY_PLACE = {
    "1:OUTALL": "te=1:lbw=OUTALL",
    "0.5:1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0": "te=0.5:lbw=1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "0.5:1:OUTALL": "te=0.5:unet=1:lbw=OUTALL",
    "0.5:1:1,0,0,0,1,1,1,0,0,0,0,0": "te=0.5:unet=1:lbw=1,0,0,0,1,1,1,0,0,0,0,0",
    "0.5:1:4:OUTALL": "te=0.5:unet=1:dyn=4:lbw=OUTALL",
    "0.5:R,X,0,0,1,1,1,0,0,0,0,0:0.7": "te=0.5:lbw=R,X,0,0,1,1,1,0,0,0,0,0:x=0.7",
    "1:MIDD:ATTNDEEPON": "te=1:lbw=MIDD:lbwe=ATTNDEEPON",
    "1:MIDD:0.5:ATTNDEEPON": "te=1:lbw=MIDD:x=0.5:lbwe=ATTNDEEPON",
    "1:1:4": "te=1:unet=1:dyn=4",  # a whole number there is a rank
    "1:0@0,1@1": "te=1:unet=0@0,1@1",
    "lbw=NONE:1:OUTALL": "te=1:lbw=NONE",  # a key wins over a place
}


@pytest.mark.parametrize("arguments", BY_PLACE)
def test_block_weights_without_a_key(arguments: str) -> None:
    assert read(arguments) == read(BY_PLACE[arguments])


# arguments -> (te, unet) in the first pass, (te, unet) in the hires pass
HIRES = {
    "0.5": ((0.5, 0.5), (0.5, 0.5)),
    "0.5:0.25": ((0.5, 0.25), (0.5, 0.25)),
    "0.5:hr=0.75": ((0.5, 0.5), (0.75, 0.75)),
    "0.5:hr=0": ((0.5, 0.5), (0, 0)),
    "0.5:hrte=0.75": ((0.5, 0.5), (0.75, 0.5)),
    "0.5:hrunet=0.75": ((0.5, 0.5), (0.5, 0.75)),
    "0.5:hr=0.75:hrte=0.25": ((0.5, 0.5), (0.25, 0.75)),
    "0.5:hr=0.75:hrunet=0.25": ((0.5, 0.5), (0.75, 0.25)),
    "unet=0.5:hrte=0.25": ((1, 0.5), (0.25, 0.5)),
}


@pytest.mark.parametrize("arguments", HIRES)
def test_the_hires_pass(arguments: str) -> None:
    request = read(arguments)
    first, second = HIRES[arguments]
    assert request.at(0, 20) == Strengths(*first)
    assert request.at(0, 20, hires=True) == Strengths(*second)
    assert not request.scheduled


def test_what_is_said_for_the_hires_pass_ends_the_first_passs_details() -> None:
    request = read("0.5:te2=0.1:in=0.2:hr=1")
    assert request.at(0, 20) == Strengths(0.5, 0.5, (("te2", 0.1),), (("in", 0.2),))
    assert request.at(0, 20, hires=True) == Strengths(1, 1)
    assert read("te2=0.1:in=0.2:hrte=1").at(0, 20, hires=True) == Strengths(1, 1, (), (("in", 0.2),))
    assert read("te2=0.1:in=0.2:hrunet=1").at(0, 20, hires=True) == Strengths(1, 1, (("te2", 0.1),))
    assert read("te2=0.1:in=0.2").at(0, 20, hires=True) == read("te2=0.1:in=0.2").strengths


# arguments -> the UNet's strength at each step of a pass of 6, the text encoder's at all of them
SCHEDULES = {
    "1:0@0,1@1": ([0, 0.25, 0.5, 0.75, 1, 1], 1),
    "0@0,1@1": ([0, 0.25, 0.5, 0.75, 1, 1], 0),  # the prompt is encoded once, with the first step's strength
    "0.5@0,1@1": ([0.5, 0.625, 0.75, 0.875, 1, 1], 0.5),
    "1:0@2,1@4": ([0, 0, 0, 0.5, 1, 1], 1),
    "0.5:start=3": ([0, 0, 0.5, 0.5, 0.5, 0.5], 0),
    "0.5:stop=3": ([0.5, 0.5, 0, 0, 0, 0], 0.5),
    "0.5:start=2:stop=5": ([0, 0.5, 0.5, 0.5, 0, 0], 0),
    "0.5:step=2-5": ([0, 0.5, 0.5, 0.5, 0, 0], 0),
    "0.5:step=2-5:start=1:stop=2": ([0, 0.5, 0.5, 0.5, 0, 0], 0),  # step says both
    "0.5:step=0-3": ([0.5, 0.5, 0, 0, 0, 0], 0.5),
    "1:0@0,1@1:stop=4": ([0, 0.25, 0.5, 0, 0, 0], 1),
}


@pytest.mark.parametrize("arguments", SCHEDULES)
def test_strengths_at_each_step(arguments: str) -> None:
    unet, te = SCHEDULES[arguments]
    request = read(arguments)
    assert request.scheduled
    found = [request.at(step, 6) for step in range(6)]
    assert [strengths.of(*PLACES["out"]) for strengths in found] == unet
    assert {strengths.of(*PLACES["te1"]) for strengths in found} == {te}
    again = [request.at(step, 6, hires=True) for step in range(6)]  # the hires pass counts anew
    assert again == found
    assert request.strengths == found[0]


def test_a_curve_can_stand_wherever_a_number_can() -> None:
    for key, place in (("in", "in"), ("mid", "mid"), ("out", "out"), ("attn2.*", "out")):
        request = read(f"{key}=0@0,1@1")
        assert request.scheduled
        assert [request.at(step, 6).of(*PLACES[place]) for step in range(3)] == [0, 0.25, 0.5]
        assert request.at(3, 6).of(*PLACES["time"]) == 1
    request = read("lbw=1,1,1,1,1,1,1,1,1,1,1,X+1:x=0@0,1@1")
    assert request.scheduled
    assert [request.at(step, 6).of(*PLACES["out"]) for step in range(3)] == [1, 1.25, 1.5]
    request = read("0.5:hr=0@0,1@1")
    assert request.scheduled
    assert [request.at(step, 6).unet for step in range(3)] == [0.5, 0.5, 0.5]
    assert [request.at(step, 6, hires=True).unet for step in range(3)] == [0, 0.25, 0.5]
    assert not read("0.5:x=0@0,1@1:lbw=OUTALL").scheduled  # nothing uses x
    assert not read("te1=0@0,1@1").scheduled


def test_an_adapter_outside_its_steps_acts_nowhere() -> None:
    strengths = read("1:te1=1:in=1:lbw=ALL:lbwe=ATTNDEEPON:attn1.*=2:start=3").at(0, 20)
    assert {strengths.of(*place) for place in PLACES.values()} == {0}


def test_random_block_weights_follow_the_seed() -> None:
    request = read("lbw=R,U,R,U,R,U,R,U,R,U,R,U")
    assert request.drawn("1").strengths == request.drawn("1").strengths != request.drawn("2").strengths
    assert request.strengths == request.strengths
    assert read("0.5") == read("0.5").drawn("1")
    assert "R" not in str(request.drawn("1"))
    assert str(request.drawn("1").strengths).count(",") == 12  # they are said


@given(order=st.permutations(["unet=0.5", "te=0.25", "lbw=MIDD", "lbwe=ATTNDEEPON", "start=2", "stop=5", "dyn=3",
                              "attn2.*=0.3", "attn1.*=2", "te2=1", "in=0@0,1@1", "hr=1", "hrte=2", "x=1"]))  # fmt: skip
def test_the_order_of_keys_is_of_no_matter(order: list[str]) -> None:
    assert read(":".join(order)) == read(":".join(sorted(order)))


# arguments -> what a report says
WORDS = {
    "0.8": "0.8",
    "0.8:0.5": "te 0.8, unet 0.5",
    "te2=0.5": "te 1, te2 0.5, unet 1",
    "0.5:in=1": "te 0.5, unet 0.5, in 1",
    "0.8:lbw=OUTALL": "0.8, blocks OUTALL",
    "lbw=X,1,1,1,1,1,1,1,1,1,1,0:x=0.5": "1, blocks 0.5,1,1,1,1,1,1,1,1,1,1,0",
    "lbw=MIDD:lbwe=ATTNDEEPON": "1, blocks MIDD, elements ATTNDEEPON",
    "attn2.*=0.3": "1, attn2.* × 0.3",
    "attn2.*=0@0,1@1": "1, attn2.* × 0@0,1@1",
    "1:0@0,1@0.5": "te 1, unet 0@0,1@0.5",
    "0.8:stop=20": "0.8 at steps 1–19",
    "0.8:start=5:stop=20": "te 0, unet 0.8 at steps 5–19",
    "0.8:hr=0@0,1@1": "0.8",
    "lbw=X,1,1,1,1,1,1,1,1,1,1,0:x=0@0,1@1": "1, blocks X,1,1,1,1,1,1,1,1,1,1,0 with x 0@0,1@1",
}


@pytest.mark.parametrize("arguments", WORDS)
def test_what_a_report_says_of_strengths(arguments: str) -> None:
    strengths = read(arguments).strengths
    assert str(strengths) == WORDS[arguments]
    plain = json.loads(json.dumps(strengths.as_json()))
    assert (plain["te"], plain["unet"]) == (strengths.te, strengths.unet)
    assert bool(plain.get("schedule")) == bool(strengths.schedule)


def test_strengths_are_values() -> None:
    first, second = read("0.5:lbw=MIDD:attn2.*=0.3").strengths, read("attn2.*=0.3:lbw=MIDD:0.5").strengths
    assert first == second
    assert hash(first) == hash(second)
    assert first != read("0.5:lbw=MIDD").strengths
    assert read("1:stop=20").strengths != read("1").strengths  # a report must not say the one of the other


def test_the_users_presets_are_read() -> None:
    presets = BUILT_IN.with_text("MINE:0,0,0,0,0,0,0,0,0,0,0,1\nSOFT::attn2:0.5")
    (request,) = parse_prompt("<lora:style:1:lbw=MINE:lbwe=SOFT>", presets).requests
    assert request.strengths.of(*PLACES["out"]) == 0.5
    assert parse_prompt("<lora:style:1:lbw=MINE>").bad


def test_several_tags_in_order_and_the_same_one_twice() -> None:
    parsed = parse_prompt("<lora:b:1>x<lyco:a:2><lora:b:1>")
    assert [request.name for request in parsed.requests] == ["b", "a", "b"]
    assert parsed.text == "x"


@pytest.mark.parametrize(
    "text",
    [
        *("", "a cat", "a < b > c", "<hypernet:x:1>", "<lora>", "<lora:>", "<lora:a"),
        *("lora:a:1>", "<LORA:a:1>", "< lora:a:1>", "<lora a:1>"),
    ],
)
def test_what_is_no_tag_of_ours_stays_in_the_text(text: str) -> None:
    parsed = parse_prompt(text)
    assert (parsed.text, parsed.requests, parsed.bad, parsed.warnings) == (text, [], [], [])


# tag -> (what the sentence says, what the caret is under)
BAD = {
    "<lora:style:abc>": ("'abc' is no number", "abc"),
    "<lora:style:0.8:abc>": ("'abc' is no number", "abc"),
    "<lora:style:te=abc:1>": ("'abc' is no number", "abc"),
    "<lora:style:1:unet=x,5>": ("'x' is no number", "x,5"),
    "<lora:style:0@0,1@y>": ("'y' is no number", "y"),
    "<lora:style:1:0@0, z@1>": ("'z' is no number", "z"),
    "<lora:style:1:hr=0@0,,1@1>": ("'' is no number", ",1@1"),
    "<lora:style:attn2.*=q>": ("'q' is no number", "q"),
    "<lora:style:OUTALL>": ("'OUTALL' is no number", "OUTALL"),  # the first place is a strength
    "<lora:style:lbw=OUTAL>": ("no preset 'OUTAL'", "OUTAL"),
    "<lora:style:lbw=>": ("no preset ''", ">"),
    "<lora:style:lbwe=ATTN>": ("no preset 'ATTN'", "ATTN"),
    "<lora:style:lbw=1,2>": ("not 2 values", "1,2"),
    "<lora:style:1:1,1,1,1,1,q,1,1,1,1,1,1>": ("'q' is no value for a block", "q"),
    "<lora:style:lbw=1,1,1,1,1, q,1,1,1,1,1,1>": ("'q' is no value for a block", "q"),
    "<lora:style:start=-1>": ("start must be a whole number", "-1"),
    "<lora:style:stop=0.5>": ("stop must be a whole number", "0.5"),
    "<lora:style:step=5>": ("step is a range", "5>"),
    "<lora:style:1_0>": ("'1_0' is no number", "1_0"),
    "<lora:style:nan>": ("'nan' is no number", "nan"),
    "<lora:style:inf>": ("'inf' is no number", "inf"),
    "<lora:style:-inf>": ("'-inf' is no number", "-inf"),
    "<lora:style:1e999>": ("'1e999' is no number", "1e999"),
    "<lora:style:0x10>": ("'0x10' is no number", "0x10"),
    "<lora:style:٣>": ("'٣' is no number", "٣"),
    "<lora:style:a=b=c>": ("'a=b=c' is no number", "a=b=c"),
    "<lora:style:>": ("'' is no number", ">"),
    "<lora:style:te=>": ("'' is no number", ">"),
    "<lora:style:1:1:0>": ("whole number above 0, not '0'", "0>"),
    "<lora:style:dyn=-1>": ("whole number above 0, not '-1'", "-1"),
    "<lora:style:dyn=2.5>": ("whole number above 0, not '2.5'", "2.5"),
    "<lora:style:dyn=9999999999>": ("whole number above 0", "9999999999"),
    "<lora: >": ("names no adapter", " >"),
    "<lora::0.8>": ("names no adapter", ":0.8"),
    "<lyco:style:abc:1>": ("'abc' is no number", "abc"),
}


@pytest.mark.parametrize("tag", BAD)
def test_a_tag_that_cannot_be_read_is_left_out_and_the_caret_is_under_the_place(tag: str) -> None:
    says, place = BAD[tag]
    parsed = parse_prompt(f"x <lora:good:0.5>{tag} y")
    assert [request.name for request in parsed.requests] == ["good"]
    assert parsed.text == "x  y"
    (problem,) = parsed.bad
    message, shown, caret = str(problem).split("\n")
    assert says in message
    assert "skipped" in message
    assert shown == f"  {tag}"
    assert caret.strip() == "^"
    assert caret.index("^") - 2 == tag.rindex(place)


@pytest.mark.parametrize("before", [0, 1, 190, 500, 50_000])
@pytest.mark.parametrize("behind", [0, 1, 190, 500, 50_000])
def test_of_a_long_tag_only_what_is_around_the_place_is_shown(before: int, behind: int) -> None:
    tag = f"<lora:{'a' * before}b:te=wrong{':1' * 3}:{'c' * behind}>"
    (problem,) = parse_prompt(tag).bad
    message, shown, caret = str(problem).split("\n")
    assert shown[caret.index("^") :].startswith("wrong:1")
    assert len(shown) <= 404
    assert shown.strip().strip("…") in tag
    assert ("…" in shown) == (len(tag) > 400)
    assert len(str(problem)) < 1000 or len(message) > 500


def test_sentences_about_one_tag_grow_as_it_does() -> None:
    parsed = parse_prompt(f"<lora:a{(':' + 'x' * 450) * 199}>")
    assert len(parsed.warnings) > 190
    assert sum(len(str(warning)) for warning in parsed.warnings) < 400_000


def test_the_caret_is_under_the_value_where_blanks_stand_before_it() -> None:
    (problem,) = parse_prompt("<lora:style:te=  abc>").bad
    assert problem.position == "<lora:style:te=  abc>".index("abc")


# tag -> (what the sentence says, what the caret is under)
ODD = {
    "<lora:style:0.8:foo=1>": ("'foo=1' is not understood", "foo"),
    "<lora:style:lwb=OUTALL>": ("not understood and was ignored (is lbw= meant?)", "lwb"),
    "<lora:style:TE=0.5>": ("(is te= meant?)", "TE"),
    "<lora:style:1:1:4:7>": ("'7' is not understood", "7>"),
    "<lora:style:0,8>": ("only 0 of '0,8' counts", "0,8"),
    "<lora:style:step=5-5>": ("acts at no step", "5-5"),
    "<lora:style:start=9:stop=5>": ("acts at no step", "5>"),
}


@pytest.mark.parametrize("tag", ODD)
def test_what_is_odd_is_a_warning_and_the_tag_is_used(tag: str) -> None:
    says, place = ODD[tag]
    parsed = parse_prompt(tag)
    assert [request.name for request in parsed.requests] == ["style"]
    assert not parsed.bad
    (warning,) = parsed.warnings
    assert says in str(warning)
    assert tag in str(warning)
    assert warning.position == tag.rindex(place)


def test_a_value_without_a_key_is_not_a_place() -> None:
    parsed = parse_prompt("<lora:style:=0.5>")
    assert [request.strengths for request in parsed.requests] == [Strengths(1, 1)]
    assert len(parsed.warnings) == 1


def test_every_key_is_read_and_is_in_the_handbook() -> None:
    values = {"lbw": "MIDD", "lbwe": "ATTNDEEPON", "step": "1-5"}
    for key, help_ in KEYS.items():
        assert read(f"{key}={values.get(key, '2')}") != Request("style"), key
        assert help_
    text = (Path(__file__).parents[1] / "docs" / "prompt.md").read_text(encoding="utf8")
    assert [key for key in KEYS if f"`{key}`" not in text] == []


# ---- any text

KEYED = tuple(f"{key}=" for key in KEYS)
SPELLED = ("<lora:", "<lyco:", "te", "0.5", "-1", "nan", "1e400", "9" * 40, "0@0,1@1", "MIDD", "R,U,X,X+1,", "1," * 11)
PIECES = st.sampled_from((*SPELLED, *KEYED, *"<>:= \naé@~,;*.?[-"))
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join))
TAG = re.compile(r"<(?:lora|lyco):[^>]+>")


@settings(max_examples=300)
@given(text=TEXTS)
@example("<lora:a:9" + "9" * 400 + ">")
@example("<lora:\ud800:1>")
def test_any_text_is_read_and_every_tag_becomes_a_request_or_a_problem(text: str) -> None:
    parsed = parse_prompt(text)
    tags = TAG.findall(text)
    assert len(parsed.requests) + len(parsed.bad) == len(tags)
    assert parsed.text == TAG.sub("", text)
    for request in parsed.requests:
        assert request.name == request.name.strip() != ""
        assert request.dyn is None or request.dyn > 0
        for step, steps in ((0, 0), (0, 1), (5, 20), (99, 3)):
            for hires in (False, True):
                strengths = request.drawn("1").at(step, steps, hires=hires)
                assert math.isfinite(strengths.te)
                assert math.isfinite(strengths.unet)
                assert isinstance(strengths.of("unet", "IN04", "input_blocks.4.1"), float)
                assert hash(strengths) is not None
                json.dumps(strengths.as_json())
        assert parse_prompt(str(request)).requests == [request]
    for problem in (*parsed.bad, *parsed.warnings):
        assert problem.tag in tags
        assert 0 < problem.position < len(problem.tag)
        assert str(problem)


HOSTS = re.compile(r"<(\w+):([^>]+)>")


TAG_PIECES = st.sampled_from((*"<>: a\n\u00e9_1-", "<lora:", "<lyco:b:1>", "<hypernet:", "<>", "x=1"))


@settings(max_examples=500)
@given(text=st.lists(TAG_PIECES, max_size=20).map("".join))
@example("<lora:a <lora:b:1>")
@example("<x:<lora:a:1>")
@example("<lora:a> <lora:")
def test_what_is_a_tag_is_the_hosts_to_say(text: str) -> None:
    """The host's own pattern, on all of the text: ours looks at less of it, and must find the same."""
    ours = [(tag.kind, ":".join(tag.items), tag.start, tag.stop) for tag in tags(text)]
    theirs = [(found[1], found[2], found.start(), found.end()) for found in HOSTS.finditer(text)]
    assert ours == [each for each in theirs if each[0] in ("lora", "lyco")]
    assert parse_prompt(text).text == HOSTS.sub(lambda found: "" if found[1] in ("lora", "lyco") else found[0], text)


@pytest.mark.parametrize(
    "piece",
    [
        "<lora:",
        "<lora:a:1 ",
        "<lora:a:1>",
        "<",
        "<lora:a",
        "<a:",
        "<>",
        "<lora:>",
        "<lora",
        "x",
        "<lora:a:b=",
        "<\u00e9:",
    ],
)
@pytest.mark.parametrize("end", ["", ">", "> <lora:"])
def test_a_hundred_thousand_characters_of_tags_take_no_second(piece: str, end: str) -> None:
    text = piece * (100_000 // len(piece)) + end
    started = time.process_time()
    parse_prompt(text)
    list(tags(text))
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "value", ["1" * 99_999 + "x", "." * 99_999, "1." * 50_000, "1e" * 50_000, " " * 99_999 + "1 1"]
)
@pytest.mark.parametrize("key", ["", "te=", "lbw=", "x=", "attn2.*=", "step=", "dyn=", "lbwe=", "1:"])
def test_long_values_take_no_second(key: str, value: str) -> None:
    started = time.process_time()
    parsed = parse_prompt(f"<lora:a:{key}{value}>")
    assert time.process_time() - started < 1
    assert parsed.bad or parsed.warnings


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["1,", "*a", "[", "x", "1@1,", "R,", ":", "=1:", "*=1:", "0@"])
def test_a_tag_of_a_hundred_thousand_pieces_is_read_in_time(piece: str) -> None:
    for start in ("", "lbw=", "te=", "lbwe=", "attn*"):
        for end in ("", "=1"):
            parsed = parse_prompt(f"<lora:a:{start}{piece * 100_000}{end}>")
            assert len(parsed.requests) + len(parsed.bad) == 1
            for request in parsed.requests:
                request.strengths.of("unet", "IN04", "input_blocks.4.1")


@settings(max_examples=200)
@given(text=TEXTS.filter(lambda text: not TAG.search(text)))
def test_a_text_without_tags_is_unchanged(text: str) -> None:
    parsed = parse_prompt(text)
    assert (parsed.text, parsed.requests, parsed.bad, parsed.warnings) == (text, [], [], [])


@settings(max_examples=100)
@given(te=st.floats(-1e6, 1e6), unet=st.floats(-1e6, 1e6), dyn=st.integers(1, 999))
def test_written_numbers_are_read_as_they_are(te: float, unet: float, dyn: int) -> None:
    for arguments in (f"{te!r}:{unet!r}:{dyn}", f"dyn={dyn}:te={te!r}:unet={unet!r}"):
        request = read(arguments)
        assert (request.strengths, request.dyn) == (Strengths(te, unet), dyn)


CURVES = st.one_of(
    st.floats(-9, 9).map(repr),
    st.lists(st.tuples(st.floats(-9, 9), st.floats(0, 30)), min_size=1, max_size=4).map(
        lambda points: ",".join(f"{value!r}@{position!r}" for value, position in points)
    ),
)
ENTRIES = st.sampled_from(["0", "1", "0.25", "-1", "X", "X+0.5", "X-1e-7", "R", "U"])
VALUES = {
    **dict.fromkeys(CURVE_KEYS, CURVES),
    "lbw": st.one_of(
        st.sampled_from(["OUTALL", "MIDD", "IN02", "FLUXALL"]),
        st.sampled_from(sorted(LAYOUTS)).flatmap(lambda n: st.lists(ENTRIES, min_size=n, max_size=n)).map(",".join),
    ),
    "lbwe": st.sampled_from(["ATTNDEEPON", "PROJDEEPOFF"]),
    "start": st.integers(0, 99).map(str),
    "stop": st.integers(0, 99).map(str),
    "dyn": st.integers(1, 99).map(str),
    "attn2.*": CURVES,
    "*.to_?": CURVES,
}


@settings(max_examples=200)
@given(values=st.fixed_dictionaries({}, optional=VALUES))
def test_a_request_is_read_back_from_its_text(values: dict[str, str]) -> None:
    (request,) = parse_prompt(f"<lora:{':'.join(['a', *map('='.join, values.items())])}>").requests
    assert parse_prompt(str(request)).requests == [request]
    drawn = request.drawn("1")
    assert parse_prompt(str(drawn)).requests == [drawn]
