"""The rows: what is held before, what is asked for, and how one round of it is timed beside the floor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

import lib_locon
from benchmarks import adapters
from benchmarks.memory import settle, watch, watch_gpu
from benchmarks.models import save_checkpoint
from lib_locon.patching.store import Policy
from lib_locon.products import multiplier

SIDE = 2048


class Tag(NamedTuple):
    """An adapter of a kind at a strength; `copy` tells several of one kind apart."""

    kind: str
    strength: float = 1.0
    copy: int = 0


class Row(NamedTuple):
    """A change from one set of adapters to another, or (with `steps`) a curve: so many changes of its strengths."""

    before: tuple[Tag, ...]
    after: tuple[Tag, ...]
    steps: int = 1

    @property
    def ranks(self) -> int:
        """Multiplications and additions for each number of the weights, in the products alone."""
        return 0 if self.after == self.before else self.steps * sum(adapters.RANKS[tag.kind] for tag in self.after)

    def at(self, step: int) -> tuple[Tag, ...]:
        """What is asked for at a step: the strengths fall in a line to what they are at the end."""
        share = 1 - step / (2 * self.steps)
        return (
            tuple(tag._replace(strength=tag.strength * share) for tag in self.after) if self.steps > 1 else self.after
        )


_R8 = (Tag("locon-r8"),)
_ALL: dict[str, Row] = {
    "locon-r8": Row((), _R8),
    "locon-r32": Row((), (Tag("locon-r32"),)),
    "locon-r32-x3": Row((), tuple(Tag("locon-r32", 0.8, copy) for copy in range(3))),
    "strength": Row(_R8, (Tag("locon-r8", 0.7),)),
    "schedule-20": Row((), (Tag("locon-r8"),), steps=20),
    "lokr-f8": Row((), (Tag("lokr-f8"),)),
    "loha-r32": Row((), (Tag("loha-r32"),)),
    "dora-r32": Row((), (Tag("dora-r32"),)),
    "remove": Row(_R8, ()),
    "same": Row(_R8, _R8),
}
ROWS = {name: row for name, row in _ALL.items() if all(tag.kind in adapters.KINDS for tag in row.before + row.after)}
"""The rows that this version of lib_locon can do."""
STARTS: dict[str, tuple[Tag, ...]] = {"base": (), "other": (Tag("locon-r8", copy=-1),)}
"""What the model holds before a row that applies: nothing, or an adapter that no row has."""


def row_from(name: str, start: str) -> Row:
    """The row with its start: `before` is what it says there, or the start where it says nothing."""
    row = ROWS[name]
    return row if row.before else row._replace(before=STARTS[start])


@dataclass
class Measured:
    """One row's figures, a number for each round; `floors` are those of the copies just before."""

    seconds: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    peak: int | None = None
    gpu_peak: int | None = None
    written: int = 0


class Rig:
    """One model with its session, its adapters (read and matched beforehand, once per file), and the floor's copy."""

    def __init__(
        self, model: nn.Module, rows: Sequence[str], folder: Path, start: str = "base", policy: Policy = "ram"
    ) -> None:
        self.rows = {name: row_from(name, start) for name in rows}
        self.model = model  # a session does not keep its model
        self.session = lib_locon.Session(model)
        self.session.engine.store.policy = policy
        if policy == "checkpoint":
            self.session.read_bases_from(save_checkpoint(model, folder / "model.safetensors"))
        parameters = dict(model.named_parameters())
        self.touched = [parameters[path] for path in adapters.trained(self.session.table).values()]
        self.device = self.touched[0].device
        self.pristine: list[Tensor] = [weight.detach().clone() for weight in self.touched]
        self.adapters: dict[tuple[str, int], lib_locon.Adapter] = {}
        for tag in sorted({(tag.kind, tag.copy) for row in self.rows.values() for tag in (*row.before, *row.after)}):
            kind, copy = tag
            file = adapters.write(folder / f"{kind}-{copy}.safetensors", kind, self.session.table, seed=copy + 1)
            self.adapters[tag] = lib_locon.load(file)
            found = self.session.match(self.adapters[tag])
            if found.unmatched or found.used != len(self.touched):
                raise RuntimeError(
                    f"{kind}: {found.used} of {len(self.touched)} modules matched: {found.unmatched[:3]}"
                )

    def uses(self, tags: Iterable[Tag]) -> list[lib_locon.Use]:
        """What the session is to hold."""
        return [
            lib_locon.Use(self.adapters[tag.kind, tag.copy], lib_locon.Strengths.both(tag.strength)) for tag in tags
        ]

    def floor(self) -> float:
        """Seconds for one plain copy of the touched weights; the model must hold its base, and does so after."""
        start = self.now()
        with torch.no_grad():
            for weight, base in zip(self.touched, self.pristine, strict=True):
                weight.copy_(base)
        return self.now() - start

    def now(self) -> float:
        """In seconds, when a GPU has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def arithmetic(self, row: str) -> float:
        """Seconds that the products of a row take at the rate of large ones: no change can be faster than that."""
        return self.rows[row].ranks * sum(weight.numel() for weight in self.touched) / self.rate

    @cached_property
    def rate(self) -> float:
        """Multiplications with addition per second in fp32, of the best of some large products."""
        left, right = torch.rand(2, SIDE, SIDE, device=self.device)
        multiply, best = multiplier(right), math.inf
        for _ in range(5):
            start = self.now()
            multiply(left)
            best = min(best, self.now() - start)
        return SIDE**3 / best

    def change(self, row: str, into: Measured, *, memory: bool = False) -> None:
        """One change, timed, or (with `memory`) watched; never both."""
        steps = [self.uses(self.rows[row].at(step)) for step in range(self.rows[row].steps)]
        self.session.apply(self.uses(self.rows[row].before))
        settle()
        with watch(memory) as peak, watch_gpu(self.device, memory) as gpu_peak:
            start = self.now()
            written = sum(self.session.apply(uses).written for uses in steps)
            seconds = self.now() - start
        into.written = written
        if memory:
            into.peak, into.gpu_peak = peak.over_rest, gpu_peak.over_rest
        else:
            into.seconds.append(seconds)

    def round(self, into: dict[str, Measured], *, memory: bool = False) -> None:
        """Every row once, a floor before each: what else the machine does falls on both."""
        for row in self.rows:
            self.session.apply(())
            floor = self.floor()
            self.change(row, into[row], memory=memory)
            if not memory:
                into[row].floors.append(floor)
        self.session.apply(())

    def run(self, rounds: int) -> tuple[float, dict[str, Measured]]:
        """The floor in seconds, and the rows. The first round warms up and tells the memory; the others the time."""
        into = {row: Measured() for row in self.rows}
        self.round(into, memory=True)
        for _ in range(rounds):
            self.round(into)
        self.check()
        return median(floor for found in into.values() for floor in found.floors), into

    def check(self) -> None:
        """Raises unless the model holds its base again: a ratio of a change that went wrong is worth nothing."""
        if not all(torch.equal(weight, base) for weight, base in zip(self.touched, self.pristine, strict=True)):
            raise RuntimeError("the model does not hold its base again")


def as_json(name: str, dtype: str, found: Measured, arithmetic: float) -> dict[str, object]:
    """A row as the JSON has it. `written` counts the weights that the change touched; `arithmetic` is the share of the
    ratio that the products would take at the processor's best.

    The ratio is the median of those of the rounds: the memory of a shared machine has fast and slow minutes, and a row
    of one must not be held against the floor of another.
    """
    anon, gpu = (None if peak is None else round(peak / 2**20, 1) for peak in (found.peak, found.gpu_peak))
    ratios = [
        seconds / floor if floor else math.inf for seconds, floor in zip(found.seconds, found.floors, strict=True)
    ]
    return {
        "name": name,
        "dtype": dtype,
        "seconds": median(found.seconds),
        "ratio": median(ratios),
        "arithmetic": arithmetic / median(found.floors) if found.floors and median(found.floors) else math.inf,
        "anon_mib": anon,
        "gpu_mib": gpu,
        "written": found.written,
    }
