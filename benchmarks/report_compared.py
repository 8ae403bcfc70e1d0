"""The page's section on the other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.report_table import section, table

OURS = ("ours-ram", "ours-checkpoint")
_WHAT: Mapping[str, str] = {
    "load": "load the file",
    "apply": "apply at 1",
    "change": "change to 0.7",
    "remove": "remove",
    "again": "apply again",
}
_CALLS: Mapping[str, str] = {"load": "loaded by", "apply": "applied by", "change": "changed by", "remove": "removed by"}
_INTRO = """\
One LoCon on the 350 modules that kohya trains as C3Lier, the same factors and shapes for all, each library used as its
own documentation does and in a process of its own. Seconds; in brackets multiples of a plain copy of the touched
weights, timed beside each: compare these where the machine was not quiet. `peak` is the most anonymous memory
over the loaded model, `held` what stays while the adapter is merged. `differ` is the share of elements with any other
bit than the base after one apply and one removal, `by` the largest difference. `right` says whether the merged weights
agree with sums in fp64, within the roundings of the dtype. The webui's built-in Lora is not here: it runs in the webui
only."""


def compared(found: Mapping[str, Any] | None) -> Iterator[str]:
    """The ways, their numbers, and who loses where."""
    return section("Beside what users have from PyPI", _INTRO, found, _all)


def _all(result: Mapping[str, Any]) -> Iterator[str]:
    yield from _ways(result)
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["dtype"], row["rank"]), []).append(row)
    for (dtype, rank), rows in groups.items():
        yield ""
        yield f"### {dtype}, rank {rank}"
        yield ""
        measured = [row for row in rows if row["why"] is None]
        yield from table(
            ["way", *_WHAT.values(), "peak", "held", "differ", "by", "right"], [_cells(row) for row in measured]
        )
        for row in rows:
            if row["why"] is not None:
                yield from ("", f"`{row['way']}`: not measured: {row['why']}.")
    yield ""
    yield from _duel(groups)


def _ways(result: Mapping[str, Any]) -> Iterator[str]:
    how = "each step once" if result["rounds"] == 1 else f"medians of {result['rounds']} rounds"
    yield f"{result['model']}, {result['threads']} threads, {how}."
    yield ""
    for way in result["ways"]:
        if not way["package"]:
            continue  # not installed: what is known of it is said with its rows
        calls = ", ".join(f"{what} `{way['calls'][step]}`" for step, what in _CALLS.items() if step in way["calls"])
        yield f"- `{way['way']}`, {way['package']} {way['version']}: {calls}. {way['note']}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row['seconds'][step]:.2f} s ({row['ratio'][step]:.1f} ×)" for step in _WHAT]
    differ = f"{row['different_share']:.2%}" if row["different_share"] else "0"
    by = f"{row['largest_difference']:.1e}" if row["largest_difference"] else "0"
    return [f"`{row['way']}`", *times, _mib(row["peak_mib"]), _mib(row["held_mib"]), differ, by, _right(row)]


def _mib(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f} MiB"


def _right(row: Mapping[str, Any]) -> str:
    """What the weights show where they are wrong: the strength, or how many roundings away they are."""
    wrong = [
        f"{_WHAT[step]}: strength {checked['strength']:.3f}, error {checked['error']:.1e} eps"
        for step, checked in row["agreement"].items()
        if not checked["agrees"]
    ]
    return f"**no** ({'; '.join(wrong)})" if wrong else "yes"


def _duel(groups: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    yield "### Who loses where"
    yield ""
    yield "Each of this project's two ways beside the best other one of those that are right; times as multiples of the"
    yield "floor. **Bold** where this project loses."
    yield ""
    figures: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
        **{what: lambda row, step=step: row["ratio"][step] for step, what in _WHAT.items()},
        "peak of memory": lambda row: row["peak_mib"],
        "differing elements": lambda row: row["different_share"],
    }
    rows = []
    for (dtype, rank), measured in groups.items():
        right = [row for row in measured if row["why"] is None and _right(row) == "yes"]
        for what, figure in figures.items():
            cells = [_against(ours, right, figure) for ours in OURS]
            rows.append([f"{dtype}, rank {rank}: {what}", *cells])
    yield from table(["", *(f"`{ours}`" for ours in OURS)], rows)


def _against(ours: str, rows: Sequence[Mapping[str, Any]], figure: Callable[[Mapping[str, Any]], float | None]) -> str:
    """Less is better in all figures. Nothing is compared with one that is missing."""
    own = next((figure(row) for row in rows if row["way"] == ours), None)
    others = {row["way"]: value for row in rows if row["way"] not in OURS and (value := figure(row)) is not None}
    if own is None or not others:
        return "–"
    best = min(others, key=others.__getitem__)
    other = others[best]
    if own == other:
        return f"equal to {best}"
    if own < other:
        return f"{other / own:.1f} × less than {best}" if own > 0 else f"none; {best} {other:.3g}"
    return f"**{own / other:.1f} × more than {best}**" if other > 0 else f"**{own:.3g}; {best} none**"
