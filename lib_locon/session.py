"""A session: one model and the adapters that it holds now."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from lib_locon.errors import LoconError
from lib_locon.families import combine
from lib_locon.families.layer import Layer, send
from lib_locon.files.adapter import Adapter
from lib_locon.files.pristine import CheckpointSource
from lib_locon.files.reader import SafetensorsFile
from lib_locon.matching import Match, Matched, match_model
from lib_locon.models.blocks import place_of
from lib_locon.models.checkpoint_keys import checkpoint_keys
from lib_locon.models.table import TargetTable
from lib_locon.patching.eight_bits import Cost
from lib_locon.patching.engine import Engine
from lib_locon.patching.parameters import uncompiled
from lib_locon.patching.plan import Patch, Plan, make_plan
from lib_locon.patching.rounding import Rounding, rounding_named
from lib_locon.patching.sidepath import SidePath
from lib_locon.patching.storage import Findings, logical_shapes
from lib_locon.prompt.request import Problem, Strengths
from lib_locon.report import AdapterReport, Report

MUCH_LOST = 0.1
"""The part of a change that rounding to 8 bits may take before it is said with each image."""


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
        notes: list[str] = []
        deaf = {item.layer.label for item in found.matched if not item.layer.family.truncates}
        if self.dyn is not None and deaf:
            notes.append(f"dyn has no meaning for {', '.join(sorted(deaf))}")
        if self.strengths.blocks is not None:
            places = (place_of(item.component, item.view.path) for item in found.matched)
            notes += self.strengths.blocks.notes(place.block for place in places)
        return replace(report, notes=(*report.notes, *notes)) if notes else report

    def report_after(self, found: Match, plan: Plan, costs: Mapping[str, Cost], least: float = 0) -> AdapterReport:
        """As `report`, once `plan` was written, with what rounding took of it; to be said from the part `least` on.

        `costs` are by path, of the weights that do not hold a sum as it is.
        """
        report = self.report(found)
        if not costs:
            return report
        mine = {(patch.source, patch.view) for patch in self.patches(found) if patch.strength}
        written = {(patch.source, patch.view) for path in costs for patch in plan.get(path, ())}
        rounded = {view.path for _, view in mine & written}
        return report.with_costs([costs[path] for path in rounded], len(mine - written), least)

    def patches(self, found: Match) -> list[Patch]:
        """What this use does to a model that it matched so, in the order of what matched.

        Equal sources mean equal ΔW: the same file (path, size, time of change), module, family and `dyn`. One file may
        change a weight twice, by two families in one module or under two names.
        """
        file = str(self.adapter.identity)
        return [
            Patch(
                f"{file}|{item.module}|{item.layer.family.name}|{self.dyn}",
                item.view,
                self.strength_of(item),
                item.layer if self.dyn is None else item.layer.truncated(self.dyn),
            )
            for item in found.matched
        ]

    def strength_of(self, item: Matched) -> float:
        """How strongly it changes one weight."""
        place = place_of(item.component, item.view.path) if self.strengths.by_layer else ()
        return self.strengths.of(item.component, *place)


class Session:
    """Applies sets of adapters to a model, in place. Each `apply` replaces the set before.

    Works for any `nn.Module` whose parameters an adapter names, with or without the webui's structure around it.
    Weights that cannot hold the sum (fp8, packed integers) stay as they are, and the change is added to the output of
    their layer where its family allows it; with `side_path` that is done wherever it can be. `rounding` is once for the
    whole sum, or `builtin`: after each use, in their order, as the webui's built-in Lora rounds; ValueError for others.
    """

    def __init__(self, model: nn.Module, *, side_path: bool = False, rounding: Rounding = "exact") -> None:
        self.side_path = side_path
        self.rounding = rounding_named(rounding)
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

    def read_bases_from(self, checkpoint: Path) -> None:
        """Lets pristine weights be read back from the file that the model came from. Raises FileError if it cannot be.

        No weight is taken from there that was not found equal to the model's, bit for bit, before its first change.
        """
        file = SafetensorsFile(checkpoint)
        self.engine.store.source = CheckpointSource(file, checkpoint_keys(self.table.shapes, file.entries))

    def apply(self, uses: Sequence[Use]) -> Report:
        """Makes the model hold base + Σ strength · ΔW of these, whatever it held before.

        The order does not matter, unless it is rounded after each.

        Raises PatchError when that fails anywhere; the model then has its base values, and no adapter.
        """
        state = self._state
        with state.alone():  # one set after the other: hooks of one and weights of another are no set
            rounding = self.rounding
            asked = (self.side_path, rounding, *((id(use.adapter), use.strengths, use.dyn, use.name) for use in uses))
            last = state.last
            if last is not None and last.holds(asked, self.engine):
                return last.report
            state.last = None
            try:
                matches = self._matches([use.adapter for use in uses])
                pairs = list(zip(uses, matches, strict=True))
                patches = (patch for use, found in pairs for patch in use.patches(found))
                plan = make_plan(patches, as_given=rounding == "builtin")
                reports = tuple(use.report(found) for use, found in pairs)
                findings = Findings()
                merged, beside = self.side.split(plan, side=self.side_path, findings=findings)
                for rival in state.living_rivals():
                    state.engine.refuse_changed_by(rival.engine, merged)
                used = {id(item.layer): item.layer for found in matches for item in found.matched}
                state.layers.update(used)
                written = self.side.set(beside) + self.engine.apply(merged, rounding, findings)
                # a weight that was not written again keeps what it lost
                state.costs = {p: cost for p, cost in {**state.costs, **findings.costs}.items() if p in merged}
                if state.costs:
                    reports = tuple(use.report_after(found, merged, state.costs, MUCH_LOST) for use, found in pairs)
            except BaseException:
                self.restore()  # half of a set is no set, and neither is the one before
                raise
            # the uses are kept beside their ids: while they live, no other adapter can get one of these
            warnings = (Problem(COPIED),) if state.is_copy and uses else ()
            state.last = _Last(asked, Report(reports, warnings=warnings), tuple(uses), self.engine.generation)
            state.let_go(used)
            return Report(reports, written=written, warnings=warnings)

    def restore(self) -> None:
        """Gives the model its base values back, bit for bit, and takes every hook off."""
        with self._state.alone():
            self._state.last = None
            try:
                self.side.clear()
            finally:
                try:
                    self.engine.restore()
                finally:
                    self._state.let_go()

    @property
    def active(self) -> bool:
        """Whether the model holds, or may hold, any adapter."""
        return self.engine.active or self.side.active

    def match(self, adapter: Adapter) -> Match:
        """What of the adapter fits the model; worked out once per adapter, as long as the weights keep their form."""
        return self._matches([adapter])[0]

    def _matches(self, adapters: Sequence[Adapter]) -> list[Match]:
        state = self._state
        with state.lock:
            forms = self.engine.forms()
            if forms != state.forms:  # another dtype: what could be merged may not be any more, and the other way round
                state.forms, state.matches, state.costs = forms, weakref.WeakKeyDictionary(), {}
            for adapter in adapters:
                if adapter not in state.matches:
                    state.matches[adapter] = match_model(adapter, self.table, self.side)
            return [state.matches[adapter] for adapter in adapters]


@dataclass(frozen=True, eq=False)
class _Last:
    """What was asked for last, and what came of it."""

    asked: object
    report: Report
    uses: tuple[Use, ...]
    generation: int

    def holds(self, asked: object, engine: Engine) -> bool:
        """Whether this is asked for again, and the model holds it still."""
        return self.asked == asked and self.generation == engine.generation and engine.unchanged()


@dataclass(eq=False)
class _State:
    """What is known of one model object: one for all its sessions, or each would take the other's work for the base."""

    table: TargetTable
    engine: Engine
    side: SidePath
    last: _Last | None = None
    layers: dict[int, Layer] = field(default_factory=dict)
    """By id, those that may have factors on the model's device."""
    forms: object = None
    """How the weights were stored when these were worked out."""
    matches: weakref.WeakKeyDictionary[Adapter, Match] = field(default_factory=weakref.WeakKeyDictionary)
    costs: dict[str, Cost] = field(default_factory=dict)
    """By path, what was lost in the weights that were rounded to 8 bits for the set that the model holds."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    is_copy: bool = False
    """True for a copy of a model that held adapters: they are in what counts as its base."""
    rivals: tuple[weakref.ref[_State], ...] = ()
    """Of other models that share weights with this one: a pipeline, and the UNet in it."""

    def living_rivals(self) -> list[_State]:
        """Those that are still there."""
        return [rival for known in self.rivals if (rival := known()) is not None]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With no change of this model, and of none that shares weights with it, in between."""
        with ExitStack() as held:
            # one order for all: nobody waits for who waits for him
            for state in sorted([self, *self.living_rivals()], key=id):
                held.enter_context(state.lock)
            yield

    def meet(self, others: Iterable[_State]) -> None:
        """Makes all that share weights with it known to each other."""
        for other in others:
            if self.engine.shares(other.engine):
                # others may be going through the old ones
                self.rivals = (*self.rivals, weakref.ref(other))
                other.rivals = (*map(weakref.ref, other.living_rivals()), weakref.ref(self))

    def fits(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the model is still what it was: others may have put other modules into it."""
        return dict(self.table.shapes) == dict(shapes) and self.engine.is_of(model)

    def end(self) -> None:
        """Another takes its place."""
        self.let_go()
        self.engine.store.forget()

    def let_go(self, but: Collection[int] = ()) -> None:
        """Frees the factors on other devices of all layers but these (by id)."""
        for known in self.layers.keys() - but:
            layer = self.layers.pop(known, None)
            if layer is not None:
                layer.release()


COPIED = (
    "this model was copied from one that held adapters, and they stay in it, below those of this set: copy a model "
    "before adapters are applied to it, or load its weights again"
)
_STATES: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
"""Freed with the model: nothing in a state holds on to the model or its modules."""
_MAKING = threading.Lock()
"""Images and pages ask from threads of their own: two states of one model would take each other's work for the base."""


def _state_of(model: nn.Module) -> _State:
    model = uncompiled(model)
    shapes = logical_shapes(model)
    with _MAKING:
        state = _STATES.get(model)
        if state is not None and (state.fits(model, shapes) or state.engine.active or state.side.active):
            return state
        if state is not None:
            state.end()
        state = _State(TargetTable.of_shapes(shapes), Engine(model, send), SidePath(model, combine))
        state.is_copy = any(other.engine.is_copied_in(state.engine) for other in _STATES.values())
        state.meet(_STATES.values())
        _STATES[model] = state
        weakref.finalize(model, state.let_go)  # its adapters may live on
        return state
