"""What the command line and the page accept. Each refusal is a sentence for the user."""

from __future__ import annotations

MAX_PROMPT = 10_000  # characters
MAX_STEPS = 200
MAX_GUIDANCE = 30
MAX_COUNT = 16


class BadRequest(ValueError):
    """A request that cannot be run."""


def checked_prompt(value: object) -> str:
    """A text that can be written into a file."""
    if not isinstance(value, str):
        raise BadRequest("a prompt must be a text")
    if len(value) > MAX_PROMPT:
        raise BadRequest(f"a prompt may have {MAX_PROMPT} characters, this one has {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRequest("a prompt holds bytes that are no text in UTF-8") from error
    if "\0" in value:
        raise BadRequest("a prompt must not hold a null character")
    return value


def checked_seed(value: object) -> int:
    """A seed, or -1 for a random one."""
    if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value < 2**32:
        raise BadRequest(f"the seed must be a whole number from -1 (random) to {2**32 - 1}")
    return value


def checked_steps(value: object) -> int:
    """How many steps."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_STEPS:
        raise BadRequest(f"the steps must be a whole number from 1 to {MAX_STEPS}")
    return value


def checked_guidance(value: object) -> float:
    """How strongly the prompt counts against the negative one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_GUIDANCE:
        raise BadRequest(f"the guidance must be a number from 0 to {MAX_GUIDANCE}")
    return float(value)


def checked_count(value: object) -> int:
    """How many images."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
        raise BadRequest(f"the number of images must be a whole number from 1 to {MAX_COUNT}")
    return value
