"""The section about the cards of a large collection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.report_table import section, table

WHAT: Mapping[str, str] = {
    "cold": "no index yet: every header is read, in the background",
    "warm": "with the index on disk: no adapter file is opened",
    "changed": "the same, after one file in a hundred was written anew",
}


_INTRO = """\
The page of a large collection, each listing in a process of its own. Seconds are the processor's, but for
the list that comes first, in which cards that wait for their header say so: those are seconds of the clock.
In brackets multiples of reading and parsing the headers and nothing more. `memory` is what listing, page
and five searches added to the process."""


def cards(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Its lines."""
    return section("Cards", _INTRO, found, _listings)


def _listings(result: Mapping[str, Any]) -> Iterator[str]:
    sizes = f"index {result['index_mib']:.1f} MiB; page {result['rows']['warm']['page_mib']:.1f} MiB."
    yield f"{result['files']} files. Headers alone {result['floor_seconds']:.1f} s; {sizes}"
    yield ""
    rows = [[WHAT[name], *_cells(row)] for name, row in result["rows"].items()]
    yield from table(["start", "first list after", "all cards complete", "page's HTML", "a search", "memory"], rows)


def _cells(row: Mapping[str, Any]) -> list[str]:
    memory = "?" if row["rss_mib"] is None else f"{row['rss_mib']:.0f} MiB"
    complete = f"{row['all']:.2f} s ({row['ratio']:.2f} ×)"
    return [f"{row['first']:.2f} s", complete, f"{row['page']:.2f} s", f"{row['search']:.2f} s", memory]
