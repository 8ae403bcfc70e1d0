"""A session: one model and the adapters that it holds now."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lib_locon.errors import LoconError
from lib_locon.files.adapter import Adapter
from lib_locon.matching import Match, Matched, match
from lib_locon.models.table import TargetTable
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import Patch, make_plan
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
        if self.dyn is not None and self.dyn < 1:
            raise LoconError(f"dyn keeps the first ranks of an adapter: at least 1, not {self.dyn}")

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
    """

    def __init__(self, model: nn.Module) -> None:
        self.table = TargetTable.of_model(model)
        self.engine = Engine(model)
        self._last: tuple[object, Report, tuple[Use, ...]] | None = None
        self._matches: weakref.WeakKeyDictionary[Adapter, Match] = weakref.WeakKeyDictionary()

    def apply(self, uses: Sequence[Use]) -> Report:
        """Makes the model hold base + Σ strength · ΔW of these, whatever it held before. The order does not matter.

        Raises PatchError when that fails half way; the model then has its base values.
        """
        asked = tuple((id(use.adapter), use.strengths, use.dyn, use.name) for use in uses)
        if self._last is not None and self._last[0] == asked and self.engine.unchanged():
            return self._last[1]
        self._last = None
        matches = [self.match(use.adapter) for use in uses]
        plan = make_plan(use.patch(item) for use, found in zip(uses, matches, strict=True) for item in found.matched)
        written = self.engine.apply(plan)
        reports = (
            AdapterReport.of(use.name or use.adapter.name, use.strengths, found)
            for use, found in zip(uses, matches, strict=True)
        )
        report = Report(tuple(reports), written=written)
        # the uses are kept beside their ids: while they live, no other adapter can get one of these
        self._last = asked, replace(report, written=0), tuple(uses)
        return report

    def restore(self) -> None:
        """Gives the model its base values back, bit for bit."""
        self._last = None
        self.engine.restore()

    def match(self, adapter: Adapter) -> Match:
        """What of the adapter fits the model; worked out once per adapter."""
        found = self._matches.get(adapter)
        if found is None:
            found = self._matches[adapter] = match(adapter, self.table, self.engine.unwritable)
        return found
