"""What a prompt would do to a model: from the headers of its adapters, with no weight written and none read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lib_locon.errors import FileError, LoconError
from lib_locon.families import combine
from lib_locon.files.adapter import Adapter, read_adapter
from lib_locon.library import Entry
from lib_locon.matching import Match, match_model
from lib_locon.models.table import TargetTable
from lib_locon.patching.parameters import uncompiled
from lib_locon.patching.plan import make_plan
from lib_locon.patching.sidepath import SidePath
from lib_locon.patching.storage import logical_shapes
from lib_locon.prompt.request import Problem, Request
from lib_locon.report import Report
from lib_locon.session import Session, Use

_T = TypeVar("_T")


@dataclass(frozen=True)
class DryRun:
    """`weights` would be written, `weight_bytes` in all: as much is copied where bases are kept in memory.

    `beside` would keep their weight, with the change run beside their layer. `adapter_bytes` are the adapters' files.
    """

    report: Report
    weights: int = 0
    weight_bytes: int = 0
    beside: int = 0
    adapter_bytes: int = 0


class Trial:
    """A model to look at. Neither it nor its session are changed: others may be making images with both.

    `session` is the model's own where it has one; none is made.
    """

    def __init__(self, model: nn.Module, session: Session | None = None) -> None:
        model = uncompiled(model)
        self._model = model
        self._table = session.table if session else TargetTable.of_shapes(logical_shapes(model))
        self._side = session.side if session else SidePath(model, combine)

    def run(
        self,
        requests: Iterable[Request],
        find: Callable[[str], Entry],
        *,
        side: bool = False,
        allow_pickle: bool = False,
    ) -> DryRun:
        """What the first step of the first pass would find; `side` as a session's `side_path`.

        Never raises for what a prompt may hold: what fails is a problem in the report.
        """
        files = _Files(find, self._matched, allow_pickle)
        pairs: list[tuple[Use, Match]] = []
        problems: list[Problem] = []
        for request in requests:
            try:
                adapter, found = files.of(request.called)
                pairs.append((Use(adapter, request.strengths, request.dyn, request.name), found))
            except LoconError as error:
                problems.append(Problem(f"{error}; {request.name!r} was skipped"))
        report = Report(tuple(use.report(found) for use, found in pairs), tuple(problems))
        try:
            plan = make_plan(patch for use, found in pairs for patch in use.patches(found))
            merged, beside = self._side.split(plan, side=side)
        except LoconError as error:
            return DryRun(Report(report.adapters, (*report.problems, Problem(str(error)))))
        identities = {use.adapter.identity for use, _ in pairs}
        written = self._sizes(merged)
        return DryRun(report, len(written), sum(written.values()), len(beside), sum(file.size for file in identities))

    def _matched(self, adapter: Adapter) -> Match:
        # not `session.match`: that keeps what it finds, for adapters whose factors are there
        return match_model(adapter, self._table, self._side)

    def _sizes(self, paths: Iterable[str]) -> dict[int, int]:
        """Bytes of each weight; one that goes by several names is one."""
        weights = dict(self._model.named_parameters(remove_duplicate=False))
        return {id(weights[path]): weights[path].nbytes for path in paths if path in weights}


class _Files:
    """What tags name, each file read once however often it is named."""

    def __init__(self, find: Callable[[str], Entry], matched: Callable[[Adapter], Match], allow_pickle: bool) -> None:
        self._find, self._matched, self._allow_pickle = find, matched, allow_pickle
        self._by_name: dict[str, Entry | LoconError] = {}
        self._by_entry: dict[Entry, tuple[Adapter, Match] | LoconError] = {}

    def of(self, name: str) -> tuple[Adapter, Match]:
        """Raises UnknownName and FileError, with nobody's folders in the sentence."""
        if name not in self._by_name:
            self._by_name[name] = _tried(lambda: self._find(name))
        entry = self._by_name[name]
        if isinstance(entry, LoconError):
            raise entry
        if entry not in self._by_entry:
            self._by_entry[entry] = _tried(lambda: self._read(entry))
        found = self._by_entry[entry]
        if isinstance(found, LoconError):
            raise FileError(entry.without_folder(str(found))) from found
        return found

    def _read(self, entry: Entry) -> tuple[Adapter, Match]:
        adapter = read_adapter(entry.path, header_only=True, allow_pickle=self._allow_pickle)
        return adapter, self._matched(adapter)


def _tried(act: Callable[[], _T]) -> _T | LoconError:
    try:
        return act()
    except LoconError as error:
        return error
