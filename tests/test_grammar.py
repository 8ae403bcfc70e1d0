"""The prompt's tags, one example per rule, and a fuzz: any text at all is read without an error."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib_locon.prompt.grammar import parse_prompt
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
    "<lora:名前:0.8>": ("名前", 0.8, 0.8, None),
    "<lora:<b:0.8>": ("<b", 0.8, 0.8, None),
}


@pytest.mark.parametrize("tag", RULES)
def test_a_tag_is_read_by_the_rules(tag: str) -> None:
    name, te, unet, dyn = RULES[tag]
    parsed = parse_prompt(f"a cat, {tag} on a mat")
    assert parsed.requests == [Request(name, Strengths(te, unet), dyn)]
    assert parsed.text == "a cat,  on a mat"
    assert not parsed.bad
    assert not parsed.warnings


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
    "<lora:style:1:unet=x,5>": ("'x,5' is no number", "x,5"),
    "<lora:style:0,8>": ("'0,8' is no number", "0,8"),
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


def test_the_caret_is_under_the_value_where_blanks_stand_before_it() -> None:
    (problem,) = parse_prompt("<lora:style:te=  abc>").bad
    assert problem.position == "<lora:style:te=  abc>".index("abc")


# tag -> what the caret is under
ODD = {
    "<lora:style:0.8:foo=1>": "1>",
    "<lora:style:1:1:4:7>": "7>",
    "<lora:style:lbw=OUTALL>": "OUTALL",
}


@pytest.mark.parametrize("tag", ODD)
def test_what_is_not_understood_is_ignored_with_a_warning(tag: str) -> None:
    parsed = parse_prompt(tag)
    assert [request.name for request in parsed.requests] == ["style"]
    assert not parsed.bad
    (warning,) = parsed.warnings
    assert "not understood" in str(warning)
    assert tag in str(warning)
    assert warning.position == tag.rindex(ODD[tag])


def test_a_value_without_a_key_is_not_a_place() -> None:
    parsed = parse_prompt("<lora:style:=0.5>")
    assert [request.strengths for request in parsed.requests] == [(1, 1)]
    assert len(parsed.warnings) == 1


@pytest.mark.parametrize(("component", "strength"), [("te1", 0.3), ("te2", 0.3), ("unet", 0.7), ("model", 0.7)])
def test_which_strength_a_component_gets(component: str, strength: float) -> None:
    (request,) = parse_prompt("<lora:a:0.3:0.7>").requests
    assert request.strengths.of(component) == strength


# ---- any text

WORDS = ("<lora:", "<lyco:", "te", "unet=", "dyn=", "0.5", "-1", "nan", "1e400", "9" * 40)
PIECES = st.sampled_from((*WORDS, *"<>:= \naé"))
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
        assert all(math.isfinite(strength) for strength in request.strengths)
        assert request.dyn is None or request.dyn > 0
    for problem in (*parsed.bad, *parsed.warnings):
        assert problem.tag in tags
        assert 0 < problem.position < len(problem.tag)
        assert str(problem)


@settings(max_examples=200)
@given(text=TEXTS.filter(lambda text: not TAG.search(text)))
def test_a_text_without_tags_is_unchanged(text: str) -> None:
    parsed = parse_prompt(text)
    assert (parsed.text, parsed.requests, parsed.bad, parsed.warnings) == (text, [], [], [])


@settings(max_examples=100)
@given(te=st.floats(-1e6, 1e6), unet=st.floats(-1e6, 1e6), dyn=st.integers(1, 999))
def test_written_numbers_are_read_as_they_are(te: float, unet: float, dyn: int) -> None:
    expected = [Request("a", Strengths(te, unet), dyn)]
    assert parse_prompt(f"<lora:a:{te!r}:{unet!r}:{dyn}>").requests == expected
    assert parse_prompt(f"<lora:a:dyn={dyn}:te={te!r}:unet={unet!r}>").requests == expected
