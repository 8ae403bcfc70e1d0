"""What a prompt would do to a model: from the headers of its adapters, with no weight written and none read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lib_locon.errors import FileError, LoconError
from lib_locon.files.adapter import read_adapter
from lib_locon.library import Library
from lib_locon.matching import match
from lib_locon.patching.plan import make_plan
from lib_locon.prompt.request import Problem, Request
from lib_locon.report import Report
from lib_locon.session import Session, Use


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


def dry_run(
    requests: Iterable[Request], model: nn.Module, session: Session, library: Library, *, side: bool = False
) -> DryRun:
    """What the first step of the first pass would find; `side` as a session's `side_path`.

    Never raises for what a prompt may hold: what fails is a problem in the report.
    """
    uses: list[Use] = []
    problems: list[Problem] = []
    for request in requests:
        try:
            uses.append(_use(request, library))
        except LoconError as error:
            problems.append(Problem(f"{error}; {request.name!r} was skipped"))
    # not `session.match`: that keeps what it finds, for adapters whose factors are there
    pairs = [(use, match(use.adapter, session.table, session.side.unusable)) for use in uses]
    report = Report(tuple(use.report(found) for use, found in pairs), tuple(problems))
    try:
        plan = make_plan(use.patch(item) for use, found in pairs for item in found.matched)
        merged, beside = session.side.split(plan, side=side)
    except LoconError as error:
        return DryRun(Report(report.adapters, (*report.problems, Problem(str(error)))))
    sizes = {path: weight.nbytes for path, weight in model.named_parameters(remove_duplicate=False)}
    files = {use.adapter.identity: use.adapter.identity.size for use in uses}
    return DryRun(report, len(merged), sum(sizes.get(path, 0) for path in merged), len(beside), sum(files.values()))


def _use(request: Request, library: Library) -> Use:
    """Raises UnknownName and FileError, with nobody's folders in the sentence."""
    entry = library.find(request.name)
    try:
        adapter = read_adapter(entry.path, header_only=True, allow_pickle=library.allow_pickle)
    except FileError as error:
        raise FileError(entry.without_folder(str(error))) from error
    return Use(adapter, request.strengths, request.dyn, request.name)
