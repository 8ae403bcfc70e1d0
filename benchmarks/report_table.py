"""Tables in Markdown, and what stands where one is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> Iterator[str]:
    """Lines of a table; so many columns are text, the others are numbers."""
    yield _row(head)
    yield _row(["---" if column < text else "---:" for column in range(len(head))])
    for row in rows:
        yield _row(row)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def missing(found: Mapping[str, Any] | None) -> str | None:
    """What stands where numbers are not there; None where they are."""
    if found is None:
        return "Not measured."
    return f"Not measured: {found['failed']}" if "failed" in found else None
