"""The section about the cards of a large collection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.report_table import missing, table

WHAT: Mapping[str, str] = {
    "cold": "no index yet: every header is read, in the background",
    "warm": "with the index on disk: no adapter file is opened",
    "changed": "the same, after one file in a hundred was written anew",
}


def section(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Its lines."""
    yield "## Cards"
    yield ""
    yield "The page of a large collection, each listing in a process of its own. Seconds are the processor's, but for"
    yield "the list that comes first, in which cards that wait for their header say so: those are seconds of the clock."
    yield "In brackets multiples of reading and parsing the headers and nothing more. `memory` is what listing, page"
    yield "and five searches added to the process."
    yield ""
    if (why := missing(found)) is not None:
        yield from (why, "")
        return
    assert found is not None
    result = found["result"]
    sizes = f"index {result['index_mib']:.1f} MiB; page {result['rows']['warm']['page_mib']:.1f} MiB."
    yield f"{result['files']} files. Headers alone {result['floor_seconds']:.1f} s; {sizes}"
    yield ""
    rows = [[WHAT[name], *_cells(row)] for name, row in result["rows"].items()]
    yield from table(["start", "first list after", "all cards complete", "page's HTML", "a search", "memory"], rows)
    yield ""


def _cells(row: Mapping[str, Any]) -> list[str]:
    memory = "?" if row["rss_mib"] is None else f"{row['rss_mib']:.0f} MiB"
    complete = f"{row['all']:.2f} s ({row['ratio']:.2f} ×)"
    return [f"{row['first']:.2f} s", complete, f"{row['page']:.2f} s", f"{row['search']:.2f} s", memory]
