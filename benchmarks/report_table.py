"""Tables in Markdown, and what stands where one is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> Iterator[str]:
    """Lines of a table; so many columns are text, the others are numbers."""
    yield _row(head)
    yield _row(["---" if column < text else "---:" for column in range(len(head))])
    for row in rows:
        yield _row(row)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def section(
    title: str, intro: str, found: Mapping[str, Any] | None, body: Callable[[Mapping[str, Any]], Iterable[str]]
) -> Iterator[str]:
    """Lines of a part of the page: what is shown, then the result as `body` writes it, or why there is none."""
    yield from (f"## {title}", "", *intro.splitlines(), "")
    why = missing(found)
    yield from body(found["result"]) if found is not None and why is None else [why or ""]
    yield ""


def missing(found: Mapping[str, Any] | None) -> str | None:
    """What stands where numbers are not there; None where they are."""
    if found is None:
        return "Not measured."
    return f"Not measured: {found['failed']}" if "failed" in found else None
