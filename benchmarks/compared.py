"""What it costs to merge one LoCon and to take it back: this project beside the ways that a user has from PyPI.

    python -m benchmarks.compared                                 SD1.5's true shapes, fp32, a table
    python -m benchmarks.compared --dtype fp32,bf16,fp16 --json   the same in three dtypes, one JSON object on stdout
    python -m benchmarks.compared --model tiny --ways ours-ram,peft --rounds 1

Every way gets random weights of the same shapes, the same factors (fp16, on the modules that kohya trains as C3Lier) in
a file of the names that it reads, and a process of its own, one after the other: they do not fit into memory together,
and would disturb each other's. So each is timed beside its own floor, one plain copy of the touched weights before and
after each round, and ratios to it can be compared where the machine's speed changes between two ways.

    load     the file is read and made ready; a library that wraps layers does it here
    apply    strength 1, from the base; a way that keeps the base pays for that here
    change   strength 0.7 asked for while 1 is merged
    remove   taken back
    again    applied once more after that, nothing loaded anew

In a round of its own that is not timed: the most anonymous memory over rest (the model without adapter), what is held
while the adapter is merged, whether the weights agree with sums in fp64, and how many elements differ, in any bit, from
the base after one `apply` and one `remove`. A way that cannot run here has null, and the reason in `why`.

    ours-ram         base copied to RAM              lycoris          merge_to(s), taken back with merge_to(-s)
    ours-checkpoint  base read from the checkpoint   lycoris-precise  the same with precise=True
    peft             merge_adapter, unmerge_adapter  lycoris-onfly    onfly_merge, onfly_restore
    diffusers        fuse_lora, unfuse_lora

Memory: three times the model. fp32 SD1.5 takes 12 GiB, and the model's size on disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import adapters
from benchmarks.compared_worker import FULL, OTHER, RANKS, STEPS, WAYS, unable
from benchmarks.models import DTYPES, skeleton
from benchmarks.switch import names
from lib_locon.models.table import TargetTable

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("tiny", "sd15")


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    options = _parse(arguments)
    result = measure(options.model, options.dtype, options.ways, options.ranks, options.rounds)
    print(json.dumps(result, indent=1) if options.json else "\n".join(lines(result)))
    return 0


def measure(model: str, dtypes: list[str], ways: list[str], ranks: list[int], rounds: int) -> dict[str, Any]:
    """The JSON object."""
    about: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        for way in ways:
            print(f"{model} {dtype}: {way}", file=sys.stderr)
            found = _in_a_process(way, model, dtype, ranks, rounds)
            rows += found.pop("rows")
            about[way] = found
    table = TargetTable.of_model(skeleton(model))
    elements = sum(torch.Size(table.shapes[path]).numel() for path in adapters.trained(table).values())
    return {
        "model": model,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "strengths": {"apply": FULL, "change": OTHER},
        "touched_mib": {dtype: round(elements * DTYPES[dtype].itemsize / 2**20, 1) for dtype in dtypes},
        "ways": list(about.values()),
        "rows": rows,
    }


def _in_a_process(way: str, model: str, dtype: str, ranks: list[int], rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compared_worker", way, "--model", model, "--dtype", dtype]
    command += ["--rounds", str(rounds), *(part for rank in ranks for part in ("--rank", str(rank)))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode < 0:  # what the system does to a process that takes all memory
        return unable(way, dtype, ranks, f"its process was killed by signal {-done.returncode}")
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RuntimeError(f"{way} failed in {dtype} with status {done.returncode}; what it said is above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def lines(result: dict[str, Any]) -> Iterator[str]:
    """For people: seconds, and after each its multiple of the floor."""
    yield "{model}, torch {torch}, {threads} threads, {rounds} rounds".format(**result)
    steps = "".join(f"{step:>15}" for step in STEPS)
    for dtype, rank in dict.fromkeys((row["dtype"], row["rank"]) for row in result["rows"]):
        yield f"\n{f'{dtype} rank {rank}':<16}{'floor':>8}{steps}{'peak MiB':>10}{'differ':>9}  right"
        for row in result["rows"]:
            if (row["dtype"], row["rank"]) == (dtype, rank):
                yield _line(row)


def _line(row: dict[str, Any]) -> str:
    if row["why"] is not None:
        return f"{row['way']:<16}{row['why']}"
    times = "".join(f"{row['seconds'][step]:>8.3f}{row['ratio'][step]:>6.1f}×" for step in STEPS)
    peak = "?" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    wrong = [step for step, checked in row["agreement"].items() if not checked["agrees"]]
    right = f"not after {', '.join(wrong)}" if wrong else "yes"
    return f"{row['way']:<16}{row['floor_seconds']:>8.3f}{times}{peak:>10}{row['different_share']:>9.2%}  {right}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.compared", description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--dtype", action="append", metavar=",".join(DTYPES), help="repeat, or with commas; fp32")
    parser.add_argument("--ways", action="append", metavar="NAME,…", help=f"of {', '.join(WAYS)}; all of them")
    known = ",".join(map(str, RANKS))
    parser.add_argument("--ranks", action="append", metavar=known, help=f"of {known}; all of them")
    parser.add_argument("--rounds", type=int, default=3, help="times that each step is timed; 3")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    options.dtype = names(parser, options.dtype or ["fp32"], DTYPES)
    options.ways = names(parser, options.ways or [",".join(WAYS)], WAYS)
    options.ranks = [int(rank) for rank in names(parser, options.ranks or [known], known.split(","))]
    return options


if __name__ == "__main__":
    sys.exit(main())
