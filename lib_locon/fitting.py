"""How much of an adapter's file fits a model: worked out from both headers, and kept for each file and model."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lib_locon.errors import LoconError
from lib_locon.files.adapter import read_adapter
from lib_locon.files.reader import FileIdentity
from lib_locon.matching import match
from lib_locon.models.table import TargetTable
from lib_locon.report import summary
from lib_locon.session import Session

MOST_KEPT = 20_000
"""Answers per model; each is a few hundred bytes."""


@dataclass(frozen=True)
class Fit:
    """`used` of `total` layers of a file would change something. `why` says what is with the others."""

    used: int
    total: int
    why: str = ""


class Fits:
    """Answers by model and file. They go with the model, and where its modules become others."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, _OfModel] = weakref.WeakKeyDictionary()

    def of(self, path: Path, model: nn.Module, session: Session, *, allow_pickle: bool = False) -> Fit | None:
        """How the file at `path` fits; reads its header, the first time. None for one that cannot be read."""
        mine = self._known.get(model)
        if mine is None or mine.table is not session.table:
            mine = self._known[model] = _OfModel(session.table)
        try:
            identity = FileIdentity.of(path)
            answer = mine.answers.get(identity)
            if answer is None:
                identity, answer = _fit(path, session, allow_pickle=allow_pickle)
                mine.keep(identity, answer)
        except LoconError:
            return None
        return answer


class _OfModel:
    def __init__(self, table: TargetTable) -> None:
        self.table = table
        self.answers: OrderedDict[FileIdentity, Fit] = OrderedDict()

    def keep(self, identity: FileIdentity, fit: Fit) -> None:
        self.answers[identity] = fit
        if len(self.answers) > MOST_KEPT:
            self.answers.popitem(last=False)


def _fit(path: Path, session: Session, *, allow_pickle: bool) -> tuple[FileIdentity, Fit]:
    """With the identity of the file that was read: that of the name may be another by then."""
    # not `session.match`: that keeps what it finds, for adapters whose factors are there
    adapter = read_adapter(path, header_only=True, allow_pickle=allow_pickle)
    found = match(adapter, session.table, session.side.judge())
    if not found.used and found.made_for:
        why = f"it was made for {found.made_for}; {summary(found.unmatched)}"
    else:
        why = summary(found.unmatched)
    return adapter.identity, Fit(found.used, found.total, why)
