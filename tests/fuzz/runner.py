"""The loop over random cases: each in a folder of its own, within limits, kept where it breaks a promise."""

from __future__ import annotations

import gc
import math
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Target(Protocol):
    """One kind of input, and the promises about it."""

    def run(self, rng: random.Random, folder: Path) -> str:
        """Makes a case of random numbers in an empty folder and checks it; returns a word for what became of it.

        Raises where a promise is broken, whatever the exception.
        """
        ...


@dataclass
class Outcome:
    """Cases by what became of them ("prompts: read" → count), and the failures as texts."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)
    """Target → seconds of its slowest case."""


def run_case(name: str, target: Target, case: str, folder: Path) -> str:
    """One case by its seed. Its folder is gone afterwards, unless it failed."""
    place = folder / "case"
    place.mkdir()
    try:
        outcome = target.run(random.Random(f"{name} {case}"), place)
    except BaseException:
        place.rename(folder / f"failed-{name}-{case.replace(':', '-')}")
        raise
    shutil.rmtree(place)
    return outcome


def fuzz(targets: Mapping[str, Target], seconds: float, seed: int, folder: Path, most: float = math.inf) -> Outcome:
    """As many cases as fit into the time (at most `most` of each target), the targets in turn."""
    outcome = Outcome()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end and number < most:
        case = f"{seed}:{number}"
        number += 1
        for name, target in targets.items():
            started = time.monotonic()
            try:
                outcome.counts[f"{name}: {run_case(name, target, case, folder)}"] += 1
            except Exception:  # noqa: BLE001  that is what is looked for
                outcome.failures.append(f"--only {name} --case {case}\n{traceback.format_exc()}")
            taken = time.monotonic() - started
            outcome.slowest[name] = max(taken, outcome.slowest.get(name, 0.0))
    gc.collect()
    return outcome


@contextmanager
def opened(names: Mapping[str, type], wanted: list[str]) -> Iterator[dict[str, Target]]:
    """The targets of these names, made, and closed at the end where they can be."""
    with ExitStack() as stack:
        made: dict[str, Target] = {}
        for name in wanted:
            target = names[name]()
            made[name] = stack.enter_context(target) if hasattr(target, "__exit__") else target
        yield made
