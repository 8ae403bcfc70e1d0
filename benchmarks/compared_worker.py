"""Measures one way in this process and prints one JSON object: `python -m benchmarks.compared_worker` does it for
`benchmarks.compared`, one process for each way, so that none disturbs another's memory or modules."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import adapters
from benchmarks.compared_check import Agreement, Factors, agreement, difference
from benchmarks.compared_ways import Unable, Way
from benchmarks.memory import anonymous, settle, watch
from benchmarks.models import DTYPES, skeleton
from lib_locon.models.table import TargetTable

WAYS = {
    "ours-ram": "benchmarks.compared_ways:OursRam",
    "ours-checkpoint": "benchmarks.compared_ways:OursCheckpoint",
    "peft": "benchmarks.compared_peft:Peft",
    "lycoris": "benchmarks.compared_lycoris:Lycoris",
    "lycoris-precise": "benchmarks.compared_lycoris:LycorisPrecise",
    "lycoris-onfly": "benchmarks.compared_lycoris:LycorisOnTheFly",
    "diffusers": "benchmarks.compared_diffusers:Diffusers",
}
STEPS = ("load", "apply", "change", "remove", "again")
RANKS = (8, 32)
FULL, OTHER = 1.0, 0.7


@dataclass
class Figures:
    """What was seen of one rank."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {step: [] for step in STEPS})
    floors: list[float] = field(default_factory=list)
    peak: int | None = None
    held: int | None = None
    agreements: dict[str, Agreement] = field(default_factory=dict)
    different: tuple[float, float] = (math.nan, math.nan)


class Bench:
    """One way with its model, and a plain copy of the touched weights for the floor and for the checks."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.bases: dict[str, Tensor] = {name: weight.clone() for name, weight in way.weights.items()}
        gc.collect()
        gc.freeze()  # the libraries and the model are no garbage: looking through them takes longer than many a step

    def floor(self) -> float:
        """Seconds for one plain copy of the base into the touched weights; they hold it afterwards."""
        start = perf_counter()
        for name, weight in self.way.weights.items():
            weight.copy_(self.bases[name])
        return perf_counter() - start

    def once(self, file: Path, factors: dict[str, Factors], into: Figures) -> None:
        """A round that is not timed: memory and results. It warms everything up, too."""
        way = self.way
        self.floor()
        rest, peaks = self._rest(), []

        def watched(step: Callable[[], None]) -> None:
            before = self._rest()
            with watch() as peak:
                step()
            if rest is not None and before is not None and peak.over_rest is not None:
                peaks.append(before - rest + peak.over_rest)

        watched(lambda: way.load(file))
        watched(lambda: way.apply(FULL))
        held = self._rest()
        into.held = None if rest is None or held is None else held - rest
        into.agreements["apply"] = agreement(way.weights, self.bases, factors, FULL)
        watched(lambda: way.remove(FULL))
        into.different = difference(way.weights, self.bases)
        watched(lambda: way.apply(FULL))
        watched(lambda: way.change(FULL, OTHER))
        into.agreements["change"] = agreement(way.weights, self.bases, factors, OTHER)
        way.remove(OTHER)
        way.unload()
        into.peak = max(peaks, default=None)

    def timed(self, file: Path, into: Figures) -> None:
        """A round from the base and without the adapter, a floor before and after it."""
        way = self.way
        steps: tuple[Callable[[], None], ...] = (
            lambda: way.load(file),
            lambda: way.apply(FULL),
            lambda: way.change(FULL, OTHER),
            lambda: way.remove(OTHER),
            lambda: way.apply(FULL),
        )
        into.floors.append(self.floor())
        for name, step in zip(STEPS, steps, strict=True):
            self._rest()
            start = perf_counter()
            step()
            into.seconds[name].append(perf_counter() - start)
        way.remove(FULL)
        way.unload()
        into.floors.append(self.floor())

    @staticmethod
    def _rest() -> int | None:
        gc.collect()
        settle()
        return anonymous()


def measure(name: str, model: str, dtype: str, ranks: Iterable[int], rounds: int) -> dict[str, Any]:
    """The way's version, and a row for each rank; rows without numbers, but with the reason, where it cannot do it."""
    ranks = list(ranks)
    try:
        module, _, of = WAYS[name].partition(":")
        kind: type[Way] = getattr(importlib.import_module(module), of)
    except ImportError as error:
        return unable(name, dtype, ranks, f"not installed: {error}")
    try:
        with tempfile.TemporaryDirectory(prefix="locon-benchmark-") as folder, torch.no_grad():
            figures = _rounds(kind(model, DTYPES[dtype], Path(folder)), model, Path(folder), ranks, rounds)
    except (Unable, MemoryError) as error:
        return unable(name, dtype, ranks, str(error), kind)
    finally:
        gc.unfreeze()
    return {**_about(name, kind), "rows": [_row(name, dtype, rank, found) for rank, found in figures.items()]}


def _rounds(way: Way, model: str, folder: Path, ranks: list[int], rounds: int) -> dict[int, Figures]:
    table = TargetTable.of_model(skeleton(model))
    files, figures = {}, {rank: Figures() for rank in ranks}
    bench = Bench(way)
    for rank in ranks:
        file = adapters.write(folder / f"rank{rank}.safetensors", f"locon-r{rank}", table, seed=rank)
        files[rank] = way.convert(file)
        bench.once(files[rank], Factors.of(load_file(file)), figures[rank])
    for _ in range(rounds):
        for rank in ranks:
            bench.timed(files[rank], figures[rank])
    return figures


def _about(name: str, kind: type[Way] | None) -> dict[str, Any]:
    if kind is None:
        return {"way": name, "package": None, "version": None, "calls": {}, "note": ""}
    package = "lib_locon" if name.startswith("ours") else kind.package
    return {"way": name, "package": package, "version": kind.version(), "calls": dict(kind.calls), "note": kind.note}


def _row(name: str, dtype: str, rank: int, found: Figures) -> dict[str, Any]:
    floor = median(found.floors)
    seconds = {step: median(times) for step, times in found.seconds.items()}
    share, largest = found.different
    return {
        "way": name,
        "dtype": dtype,
        "rank": rank,
        "floor_seconds": floor,
        "seconds": seconds,
        "ratio": {step: value / floor for step, value in seconds.items()},
        "peak_mib": _mib(found.peak),
        "held_mib": _mib(found.held),
        "agreement": {step: checked.as_json() for step, checked in found.agreements.items()},
        "different_share": share,
        "largest_difference": largest,
        "why": None,
    }


def unable(name: str, dtype: str, ranks: Iterable[int], why: str, kind: type[Way] | None = None) -> dict[str, Any]:
    """What stands for a way that gave no numbers: the same rows, empty but for the reason."""
    nothing: dict[str, Any] = dict.fromkeys(_row(name, dtype, 0, _NOTHING))
    rows = [{**nothing, "way": name, "dtype": dtype, "rank": rank, "why": why} for rank in ranks]
    return {**_about(name, kind), "rows": rows}


_NOTHING = Figures({step: [math.nan] for step in STEPS}, [math.nan])


def _mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 1)


def main(arguments: list[str] | None = None) -> int:
    """Prints one JSON object; what the libraries print goes to stderr."""
    parser = argparse.ArgumentParser("python -m benchmarks.compared_worker", description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--rank", type=int, action="append", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    options = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):
        found = measure(options.way, options.model, options.dtype, options.rank, options.rounds)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
