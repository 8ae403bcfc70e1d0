"""The page: every number on it comes from a benchmark's JSON; only the bars are written here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import report_cards, report_compared
from benchmarks.report_table import missing, section, table

BARS: Mapping[str, tuple[float, float, float]] = {
    "locon-r8": (2.5, 4, 6),
    "locon-r32": (3, 4, 7),
    "locon-r32-x3": (4.5, 7, 9),
    "strength": (2.5, 4, 6),  # held and asked for at rank 8
    "lokr-f8": (2, 5, 6),
    "loha-r32": (8, 12, 12),
    "dora-r32": (6, 9, 10),
    "remove": (1.2, 1.2, 1.2),
}
"""Row → the most multiples of the floor that it may take, in fp32, bf16, fp16."""
SAME_SECONDS = 0.001
"""The bar of the row `same`, which may write nothing either."""
DTYPES = ("fp32", "bf16", "fp16")
GPU = ("gpu-sd15", "gpu-sdxl")
"""The measurements on one."""
WHAT: Mapping[str, str] = {
    "locon-r8": "one LoCon, rank 8",
    "locon-r32": "one LoCon, rank 32",
    "locon-r32-x3": "three LoCon, rank 32, at once",
    "strength": "strength changed only (LoCon, rank 8)",
    "schedule-20": "20 strengths of one LoCon, rank 8, one after the other",
    "lokr-f8": "LoKr, factor 8",
    "loha-r32": "LoHa, rank 32",
    "dora-r32": "DoRA on rank 32",
    "remove": "remove everything",
    "same": "the same set again",
}
_MEMORY = """\
Anonymous memory (RssAnon) over the loaded model, as a share of the bytes of the touched weights: one LoCon
of rank 8 read and applied, then switches between five sets. `drift` is how much more the last round holds
than the second."""
_MACHINE = ("processor", "instructions", "cores", "memory", "gpu", "system", "python", "torch", "sd-webui-locon")

Results = Mapping[str, Mapping[str, Any]]


def page(results: Results) -> str:
    """The whole page, as Markdown."""
    parts = [_head(results), _speed(results), section("Memory", _MEMORY, results.get("memory"), _memory)]
    parts += [report_compared.compared(results.get("compared")), report_cards.cards(results.get("cards"))]
    parts.append(_gpu(results))
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(results: Results) -> Iterator[str]:
    yield "# Performance"
    yield ""
    yield "Written by `python -m benchmarks.report` from the files in `benchmarks/results/`; not by hand. `python"
    yield "install.py bench` measures everything again and writes it anew."
    yield ""
    machines = {
        name: {field: found["machine"].get(field, "–") for field in _MACHINE} for name, found in results.items()
    }
    distinct = [dict(items) for items in dict.fromkeys(tuple(machine.items()) for machine in machines.values())]
    titles = [", ".join(name for name in machines if machines[name] == machine) for machine in distinct]
    yield from table(
        ["", *(titles if len(distinct) > 1 else ["all measurements"])],
        [[field, *(machine[field] for machine in distinct)] for field in _MACHINE],
        text=1 + len(distinct),
    )
    yield ""
    rows = [
        [name, found["machine"]["date"], found["machine"].get("commit") or "–", f"`{found['command']}`"]
        for name, found in results.items()
    ]
    yield from table(["measurement", "date", "commit", "command"], rows, text=4)
    yield ""


def _speed(results: Results) -> Iterator[str]:
    yield "## Speed"
    yield ""
    yield "Multiples of the floor, which is one plain copy of the touched weights (read the base, write the weight) in"
    yield "the same run. Medians. In brackets the bar that this project holds itself to; what is over it is **bold**."
    yield "In square brackets what the products of the change take at the rate of large ones in the same run, in floors"
    yield "too: where that comes near the bar, it is the processor that misses it."
    yield ""
    yield "The cores of a virtual machine may lie side by side in one process and far apart in the next: then copies"
    yield "are faster, small products slower, and ratios up to twice as high, on both sides of a bar. So look at the"
    yield "floors in seconds before you compare two columns."
    for name, title in (
        ("switch-other", "From another LoCon, whose base is kept already"),
        ("switch-base", "From the base: no adapter is merged before"),
        ("switch-checkpoint", "From another LoCon, with the base in the checkpoint file (the webui's default)"),
        ("switch-avx2", "From another LoCon, on a processor without AVX-512"),
        ("switch-sdxl", "SDXL, from another LoCon; no bars"),
    ):
        yield ""
        yield f"### {title}"
        yield ""
        yield from _switch(results.get(name))
    yield ""


def _switch(found: Mapping[str, Any] | None) -> Iterator[str]:
    if (why := missing(found)) is not None:
        yield why
        return
    assert found is not None
    result = found["result"]
    # neither of the two has bars: they are for SD1.5's shapes
    bars = BARS if result["model"] == "sd15" else {}
    cells = {(row["name"], row["dtype"]): row for row in result["rows"]}
    dtypes = list(result["floor_seconds"])
    judged = [met(row, bars) for row in result["rows"]]
    floors = ", ".join(f"{dtype} {seconds:.3f} s" for dtype, seconds in result["floor_seconds"].items())
    yield f"{result['model']}, {result['threads']} threads. Floor: {floors}. " + _count(judged)
    yield ""
    rows = [
        [WHAT.get(name, name), *(_cell(cells.get((name, dtype)), bars) for dtype in dtypes)]
        for name in dict.fromkeys(row["name"] for row in result["rows"])
    ]
    yield from table(["change", *dtypes], rows)


def met(row: Mapping[str, Any], bars: Mapping[str, Sequence[float]]) -> bool | None:
    """Whether a row of `benchmarks.switch` holds its bar; None where it has none."""
    if row["name"] == "same" and bars:
        return bool(row["written"] == 0 and row["seconds"] < SAME_SECONDS)
    bar = _bar(row, bars)
    return None if bar is None else bool(row["ratio"] <= bar)


def _bar(row: Mapping[str, Any], bars: Mapping[str, Sequence[float]]) -> float | None:
    return bars[row["name"]][DTYPES.index(row["dtype"])] if row["name"] in bars else None


def _cell(row: Mapping[str, Any] | None, bars: Mapping[str, Sequence[float]]) -> str:
    if row is None:
        return "–"
    if row["name"] == "same":
        text = f"{row['seconds'] * 1000:.2f} ms, {row['written']} written"
        bar = f" (≤ {SAME_SECONDS * 1000:g} ms, 0)" if bars else ""
    else:
        limit = _bar(row, bars)
        text, bar = f"{row['ratio']:.2f} ×", "" if limit is None else f" (≤ {limit:g})"
        if row["arithmetic"] >= 0.05:
            bar += f" [{row['arithmetic']:.1f}]"
    return f"**{text}**{bar}" if met(row, bars) is False else text + bar


def _count(judged: Iterable[bool | None]) -> str:
    judged = [one for one in judged if one is not None]
    return f"**{sum(judged)} of {len(judged)} bars are met.**" if judged else "No bars."


def _memory(result: Mapping[str, Any]) -> Iterator[str]:
    judged = [None if row["bar"] is None else row["ok"] for row in result["rows"]]
    yield f"{result['model']} {result['dtype']}, {result['touched_mib']:.0f} MiB touched. {_count(judged)}"
    yield ""
    rows = []
    for row in result["rows"]:
        peak = f"{row['peak']:.3f}" if row["ok"] else f"**{row['peak']:.3f}**"
        bar = "" if row["bar"] is None else f" (≤ {row['bar']:g})"
        drift = f"{row['drift_mib']:.1f} MiB in {row['switches']} switches"
        rows.append([f"`{row['policy']}`", peak + bar, f"{row['held']:.3f}", drift, f"{row['first_seconds']:.2f} s"])
    yield from table(["base kept by", "peak", "held", "drift", "first adapter, with its file"], rows)


def _gpu(results: Results) -> Iterator[str]:
    yield "## GPU"
    yield ""
    found = {name: results[name] for name in GPU if name in results}
    if not found:
        yield "None measured. Where there is one: `python -m benchmarks.report --measure gpu-sd15,gpu-sdxl`. What a"
        yield "change asks of a GPU is tested without one: it is waited for once, and factors are sent once"
        yield "(`tests/second_device`)."
        return
    yield "fp16, the base kept on the GPU. Milliseconds of one change, medians; after them the share of the memory's"
    yield "bandwidth that it gets, where a plain copy of the touched weights (the floor) gets all that it can."
    for name, measured in found.items():
        yield ""
        if (why := missing(measured)) is not None:
            yield f"{name}: {why}"
            continue
        result = measured["result"]
        (dtype,) = result["floor_seconds"]
        floor, speed = result["floor_seconds"][dtype], result["floor_gbs"][dtype]
        yield f"{result['model']} on {result['device']}. Floor: {1000 * floor:.2f} ms, {speed:.0f} GB/s."
        yield ""
        rows = [
            [
                WHAT.get(row["name"], row["name"]),
                f"{1000 * row['seconds']:.2f} ms",
                "–" if not row["written"] else f"{1 / row['ratio']:.0%}",
                "?" if row["gpu_mib"] is None else f"{row['gpu_mib']:.0f} MiB",
            ]
            for row in result["rows"]
        ]
        yield from table(["change", "time", "share", "more memory"], rows)
