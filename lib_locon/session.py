"""A session: one model and the adapters that it holds now."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lib_locon.errors import LoconError
from lib_locon.families import combine
from lib_locon.files.adapter import Adapter
from lib_locon.matching import Match, Matched, match
from lib_locon.models.table import TargetTable
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import Patch, make_plan
from lib_locon.patching.sidepath import SidePath
from lib_locon.patching.storage import logical_shapes
from lib_locon.prompt.request import Strengths
from lib_locon.report import AdapterReport, Report


@dataclass(frozen=True, eq=False)
class Use:
    """An adapter with its strengths. `dyn` keeps the first ranks only; `name` is how the user called it."""

    adapter: Adapter
    strengths: Strengths = Strengths()
    dyn: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.strengths, Strengths):
            raise LoconError(f"strengths must be Strengths, such as Strengths.both(0.8), not {self.strengths!r}")
        if self.dyn is not None and (not isinstance(self.dyn, int) or self.dyn < 1):
            raise LoconError(f"dyn keeps the first ranks of an adapter: a whole number from 1 on, not {self.dyn!r}")

    def report(self, found: Match) -> AdapterReport:
        """What this use did to a model that it matched so."""
        report = AdapterReport.of(self.name or self.adapter.name, self.strengths, found)
        deaf = {item.layer.label for item in found.matched if not item.layer.family.truncates}
        if self.dyn is None or not deaf:
            return report
        return replace(report, notes=(*report.notes, f"dyn has no meaning for {', '.join(sorted(deaf))}"))

    def patch(self, item: Matched) -> Patch:
        """What this use does to one weight.

        Equal sources mean equal ΔW: the same file (path, size, time of change), module, family and `dyn`. One file may
        change a weight twice, by two families in one module or under two names.
        """
        layer = item.layer if self.dyn is None else item.layer.truncated(self.dyn)
        source = f"{self.adapter.identity}|{item.module}|{item.layer.family.name}|{self.dyn}"
        return Patch(source, item.view, self.strengths.of(item.component), layer)


class Session:
    """Applies sets of adapters to a model, in place. Each `apply` replaces the set before.

    Works for any `nn.Module` whose parameters an adapter names, with or without the webui's structure around it.
    Weights that cannot hold the sum (fp8, packed integers) stay as they are, and the change is added to the output of
    their layer where its family allows it; with `side_path` that is done wherever it can be.
    """

    def __init__(self, model: nn.Module, *, side_path: bool = False) -> None:
        self.side_path = side_path
        self._state = _state_of(model)

    @property
    def table(self) -> TargetTable:
        """The names by which adapters know the model's modules."""
        return self._state.table

    @property
    def engine(self) -> Engine:
        """What writes the weights."""
        return self._state.engine

    @property
    def side(self) -> SidePath:
        """What runs beside the layers."""
        return self._state.side

    def apply(self, uses: Sequence[Use]) -> Report:
        """Makes the model hold base + Σ strength · ΔW of these, whatever it held before. The order does not matter.

        Raises PatchError when that fails anywhere; the model then has its base values, and no adapter.
        """
        asked = (self.side_path, *((id(use.adapter), use.strengths, use.dyn, use.name) for use in uses))
        last = self._state.last
        if last is not None and last[0] == asked and self.engine.unchanged():
            return last[1]
        self._state.last = None
        try:
            matches = [self.match(use.adapter) for use in uses]
            pairs = list(zip(uses, matches, strict=True))
            plan = make_plan(use.patch(item) for use, found in pairs for item in found.matched)
            merged, beside = self.side.split(plan, side=self.side_path)
            written = self.side.set(beside) + self.engine.apply(merged)
        except BaseException:
            self.restore()  # half of a set is no set, and neither is the one before
            raise
        report = Report(tuple(use.report(found) for use, found in pairs), written=written)
        # the uses are kept beside their ids: while they live, no other adapter can get one of these
        self._state.last = asked, replace(report, written=0), tuple(uses)
        return report

    def restore(self) -> None:
        """Gives the model its base values back, bit for bit, and takes every hook off."""
        self._state.last = None
        self.side.clear()
        self.engine.restore()

    @property
    def active(self) -> bool:
        """Whether the model holds, or may hold, any adapter."""
        return self.engine.active or self.side.active

    def match(self, adapter: Adapter) -> Match:
        """What of the adapter fits the model; worked out once per adapter."""
        found = self._state.matches.get(adapter)
        if found is None:
            found = self._state.matches[adapter] = match(adapter, self.table, self.side.unusable)
        return found


@dataclass(eq=False)
class _State:
    """What is known of one model object: one for all its sessions, or each would take the other's work for the base."""

    table: TargetTable
    engine: Engine
    side: SidePath
    last: tuple[object, Report, tuple[Use, ...]] | None = None
    matches: weakref.WeakKeyDictionary[Adapter, Match] = field(default_factory=weakref.WeakKeyDictionary)


_STATES: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
"""Freed with the model: nothing in a state holds on to the model or its modules."""


def _state_of(model: nn.Module) -> _State:
    shapes = logical_shapes(model)
    state = _STATES.get(model)
    if state is None or (dict(state.table.shapes) != dict(shapes) and not (state.engine.active or state.side.active)):
        table = TargetTable.of_shapes(shapes)
        state = _STATES[model] = _State(table, Engine(model), SidePath(model, combine))
    return state
