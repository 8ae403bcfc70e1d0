"""Numbers, curves and windows of steps: their text, and what they are at each step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_locon.prompt.numbers import BadValue, Curve, parse_curve
from lib_locon.prompt.window import Window, parse_range

# text -> steps of the pass, the strength at steps 0, 1, 2, …
CURVES = {
    "0.5": (4, [0.5, 0.5, 0.5, 0.5]),
    "0.5@0.3": (4, [0.5, 0.5, 0.5, 0.5]),
    # the last position is at most 1: parts of the pass, and 1 is one step before the last
    "0@0,1@1": (6, [0, 0.25, 0.5, 0.75, 1, 1]),
    "1@1,0@0": (6, [0, 0.25, 0.5, 0.75, 1, 1]),
    "0@0;1@1": (6, [0, 0.25, 0.5, 0.75, 1, 1]),
    "0~0,1~1": (6, [0, 0.25, 0.5, 0.75, 1, 1]),
    " 0 @ 0 , 1 @ 1 ": (6, [0, 0.25, 0.5, 0.75, 1, 1]),
    "0@0,1": (6, [0, 0.25, 0.5, 0.75, 1, 1]),  # no position: 1
    "0@0,1@0.5": (6, [0, 0.5, 1, 1, 1, 1]),
    "0@0.25,1@0.75": (6, [0, 0, 0.5, 1, 1, 1]),
    "0@0,1@0.5,-1@1": (6, [0, 0.5, 1, 0, -1, -1]),
    # the last position is above 1: steps, counted from 0
    "0@1,1@3": (5, [0, 0, 0.5, 1, 1]),
    "1@0.5,0@2": (4, [1, 2 / 3, 0, 0]),
    "0.75@0;0.5@3;1@6": (8, [0.75, 2 / 3, 0.75 - 0.5 / 3, 0.5, 2 / 3, 0.5 + 1 / 3, 1, 1]),
    "0@5,1@6": (8, [0, 0, 0, 0, 0, 0, 1, 1]),
    # a jump: from the second of the two on
    "0@0,0@0.5,1@0.5,1@1": (6, [0, 0, 1, 1, 1, 1]),
    "0@0,1@1 ": (2, [0, 1]),  # loractl divides by zero here
    "0@0, 1@1": (3, [0, 1, 1]),
    "0@0,1@ 1": (1, [0]),
    "1@-3,0@3": (4, [0.5, 1 / 3, 1 / 6, 0]),
}


@pytest.mark.parametrize("text", CURVES)
def test_a_curve_at_each_step(text: str) -> None:
    steps, wanted = CURVES[text]
    curve, warning = parse_curve(text)
    assert [curve.at(step, steps) for step in range(len(wanted))] == pytest.approx(wanted, abs=1e-12)
    assert not warning


def test_a_first_item_without_a_position_is_the_constant_and_the_rest_is_said_to_be_ignored() -> None:
    for text in ("0,8", "0,1@1", "0;0.5"):
        curve, warning = parse_curve(text)
        assert curve == Curve.constant(0)
        assert repr(text) in warning


# text -> where in it
BAD_CURVES = {"": 0, "x": 0, "1@": 2, "1@x": 2, "0@0,": 4, "0@0,,1@1": 4, "0@0, y@1": 5, "1@2@3": 2, "0@0,1@nan": 6}


@pytest.mark.parametrize("text", BAD_CURVES)
def test_what_is_no_curve_and_where(text: str) -> None:
    with pytest.raises(BadValue) as caught:
        parse_curve(text)
    assert caught.value.at == BAD_CURVES[text]


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(
    points=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6),
    step=st.integers(0, 200),
    steps=st.integers(0, 150),
)
def test_any_curve_has_a_finite_strength_at_any_step_and_is_read_back_from_its_text(
    points: list[tuple[float, float]], step: int, steps: int
) -> None:
    curve, _ = parse_curve(",".join(f"{value!r}@{position!r}" for value, position in points))
    assert math.isfinite(curve.at(step, steps))
    again, warning = parse_curve(str(curve))
    assert (again, warning) == (curve, "")


@given(points=st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 1)), min_size=2, max_size=6), steps=st.integers(1, 60))
def test_a_curve_stays_between_its_lowest_and_its_highest_strength(
    points: list[tuple[float, float]], steps: int
) -> None:
    curve, _ = parse_curve(",".join(f"{value!r}@{position!r}" for value, position in points))
    low, high = min(value for value, _ in points), max(value for value, _ in points)
    assert all(low - 1e-9 <= curve.at(step, steps) <= high + 1e-9 for step in range(steps))


# window -> active at which of the steps 1 … 8, its words
WINDOWS = {
    Window(): (range(1, 9), "at every step"),
    Window(1): (range(1, 9), "at every step"),
    Window(3): (range(3, 9), "from step 3 on"),
    Window(0, 5): (range(1, 5), "at steps 1–4"),
    Window(3, 6): (range(3, 6), "at steps 3–5"),
    Window(3, 4): ([3], "at step 3"),
    Window(4, 4): ([], "at no step"),
    Window(0, 1): ([], "at no step"),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_counts_the_steps_from_1(window: Window) -> None:
    numbers, words = WINDOWS[window]
    assert [number for number in range(1, 9) if window.active(number - 1)] == list(numbers)
    assert str(window) == words
    assert window.never == (not numbers)


def test_a_range_is_start_and_stop() -> None:
    assert parse_range(" 5 - 10 ") == Window(5, 10)
    for text in ("5", "5-", "-5", "5-10-15", "a-b", "5–10", "0.5-1"):
        with pytest.raises(BadValue):
            parse_range(text)
