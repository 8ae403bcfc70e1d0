"""Small helpers of the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ._absent import absent

__getattr__ = absent(__name__)


def topological_sort(dependencies: Mapping[str, Iterable[str]]) -> list[str]:
    """The keys, each after those it depends on, otherwise in the order given. A circle is cut where it closes."""
    done: dict[str, None] = {}
    visiting: set[str] = set()

    def visit(name: str) -> None:
        if name in done or name in visiting or name not in dependencies:
            return
        visiting.add(name)
        for before in dependencies[name]:
            visit(before)
        done[name] = None

    for name in dependencies:
        visit(name)
    return list(done)
