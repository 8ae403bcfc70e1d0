"""Sentences for scenes: several ways to say each, some of which leave something open."""

from __future__ import annotations

from random import Random

from .shapes import Scene

_WHOLE = (
    ("{thing} on {ground}", 6),
    ("{thing} on a {ground} background", 2),
    ("{thing} on {ground} ground", 1),
    ("{thing}, {ground} background", 2),
    ("{ground} background with {thing}", 2),
    ("on {ground}, {thing}", 1),
)
_PREFIXES = (("", 12), ("a picture of ", 2), ("a drawing of ", 1), ("simple ", 1), ("a photo of ", 1))
_SUFFIXES = (("", 12), (", simple", 1), (", masterpiece", 1), (", best quality", 1), (", minimal", 1))
_SYNONYMS = {"small": ("small", "small", "tiny"), "large": ("large", "large", "big")}


def _pick(random: Random, weighted: tuple[tuple[str, int], ...]) -> str:
    texts, weights = zip(*weighted, strict=True)
    return str(random.choices(texts, weights)[0])


def caption(scene: Scene, random: Random) -> str:
    """One way to say it. Words that say nothing (`a picture of`) teach the model to pass over such words."""
    size = f"{random.choice(_SYNONYMS[scene.size])} " if scene.size else ""
    told = random.random()
    colour = "" if told < 0.06 else f"{scene.colour} "
    article = "a " if random.random() < 0.75 else ""
    thing = f"{article}{size}{colour}{scene.shape}"
    whole = thing if told > 0.92 else _pick(random, _WHOLE).format(thing=thing, ground=scene.ground)
    prefix = "" if whole.startswith("on ") else _pick(random, _PREFIXES)
    return f"{prefix}{whole}{_pick(random, _SUFFIXES)}"


def plain(scene: Scene) -> str:
    """The way that the measurements use."""
    return f"a {scene.colour} {scene.shape} on {scene.ground}"
