"""How much memory adapters take, against the bars that this project holds.

    python -m benchmarks.memory_bars                              SD1.5's true shapes, fp32, 200 switches
    python -m benchmarks.memory_bars --model tiny --json          quickly, one JSON object on stdout; no bars
    python -m benchmarks.memory_bars --policy checkpoint --switches 20

Anonymous memory (RssAnon) only: pages of a mapped or cached file cost nobody anything. The resting state is the model,
loaded, with a session. Then one LoCon of rank 8 is read from its file and applied: `peak` is the most that was seen
over the resting state, `held` what stays, both as shares of the bytes of the weights that it touches. The bars: a peak
of 1.1 with `ram`, 0.1 with `checkpoint`. After it the session switches between five sets; `drift` is how much more is
held in the last round than in the second one, with the same set. Needs Linux, 3.5 times the model in memory, and the
model's size on disk. Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, get_args

import torch
from torch import nn

import lib_locon
from benchmarks import adapters
from benchmarks.memory import anonymous, settle, watch
from benchmarks.models import DTYPES, MODELS, random_model, save_checkpoint
from lib_locon.patching.store import Policy

BARS: dict[str, float] = {"ram": 1.1, "checkpoint": 0.1}
DRIFT = 0.01  # of the touched bytes: what allocators move to and fro
KINDS = ("locon-r8", "locon-r32")
SETS: tuple[tuple[tuple[str, float], ...], ...] = (
    (("locon-r8", 1.0),),
    (("locon-r8", 0.7),),
    (("locon-r32", 1.0),),
    (("locon-r8", 1.0), ("locon-r32", 0.5)),
    (),
)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.memory_bars", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model and its checkpoint file; fp32")
    parser.add_argument("--policy", action="append", choices=get_args(Policy), help="repeat; ram and checkpoint")
    parser.add_argument("--switches", type=int, default=200, help="200")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    options = parser.parse_args(arguments)
    if anonymous() is None:
        print("this system does not tell the anonymous memory of a process", file=sys.stderr)
        return 2
    result = measure(options.model, options.dtype, options.policy or list(BARS), options.switches)
    print(json.dumps(result, indent=1) if options.json else "\n".join(_lines(result)))
    return 0 if all(row["ok"] for row in result["rows"]) else 1


def measure(name: str, dtype: str, policies: Sequence[Policy], switches: int) -> dict[str, Any]:
    """The JSON object. One model for all policies; each gets it with its base values and leaves it so."""
    with tempfile.TemporaryDirectory(prefix="locon-benchmark-") as folder:
        model = random_model(name, DTYPES[dtype])
        path = save_checkpoint(model, Path(folder) / "model.safetensors")
        table = lib_locon.Session(model).table
        for kind in KINDS:
            adapters.write(Path(folder) / f"{kind}.safetensors", kind, table)
        parameters = dict(model.named_parameters())
        touched = sum(parameters[weight].nbytes for weight in adapters.trained(table).values())
        bars = {} if name == "tiny" else BARS  # its 10 MiB are no more than what the process itself moves
        rows = [_policy(model, policy, path, touched, switches, bars.get(policy)) for policy in policies]
    return {
        "model": name,
        "dtype": dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "touched_mib": round(touched / 2**20, 1),
        "rows": rows,
    }


def _policy(
    model: nn.Module, policy: Policy, path: Path, touched: int, switches: int, bar: float | None
) -> dict[str, Any]:
    session = lib_locon.Session(model)
    session.read_bases_from(path)
    store = session.engine.store
    store.policy = policy
    settle()
    rest = anonymous() or 0
    with watch() as peak:
        first = _apply(session, path.parent, SETS[0])
    kept = dict(store.report().weights)
    held = (anonymous() or 0) - rest
    uses = [_uses(path.parent, items) for items in SETS]  # as the host keeps them: read once
    levels, seconds = [], []
    for number in range(switches):
        start = perf_counter()
        session.apply(uses[number % len(SETS)])
        seconds.append(perf_counter() - start)
        levels.append(anonymous() or 0)
    session.restore()
    drift = _drift(levels)
    share = (peak.over_rest or 0) / touched
    return {
        "policy": policy,
        "peak": round(share, 4),
        "bar": bar,
        "held": round(held / touched, 4),
        "drift_mib": round(drift / 2**20, 1),
        "switches": switches,
        "first_seconds": round(first, 3),
        "switch_seconds": round(median(seconds), 3) if seconds else None,
        "weights": kept,
        "ok": bar is None or (share <= bar and drift <= DRIFT * touched),
    }


def _drift(levels: list[int]) -> int:
    """The most that any set takes more in its last round than in the second (the first fills caches)."""
    rounds = [levels[number :: len(SETS)][1:] for number in range(len(SETS))]
    return max((held[-1] - held[0] for held in rounds if held), default=0)


def _uses(folder: Path, items: Sequence[tuple[str, float]]) -> list[lib_locon.Use]:
    return [
        lib_locon.Use(lib_locon.load(folder / f"{kind}.safetensors"), lib_locon.Strengths.both(strength))
        for kind, strength in items
    ]


def _apply(session: lib_locon.Session, folder: Path, items: Sequence[tuple[str, float]]) -> float:
    """Seconds, with the reading of the files."""
    start = perf_counter()
    session.apply(_uses(folder, items))
    return perf_counter() - start


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield "{model} {dtype}, torch {torch}, {threads} threads; touched: {touched_mib:.0f} MiB".format(**result)
    yield f"{'policy':<12}{'peak':>8}{'bar':>6}{'held':>8}{'drift MiB':>11}{'first s':>9}{'switch s':>10}  weights kept"
    for row in result["rows"]:
        bar = "" if row["bar"] is None else row["bar"]
        kept = ", ".join(f"{count} {way}" for way, count in row["weights"].items())
        switch = "" if row["switch_seconds"] is None else f"{row['switch_seconds']:.2f}"
        yield (
            f"{row['policy']:<12}{row['peak']:>8.3f}{bar:>6}{row['held']:>8.3f}{row['drift_mib']:>11.1f}"
            f"{row['first_seconds']:>9.2f}{switch:>10}  {kept}{'' if row['ok'] else '  OVER THE BAR'}"
        )


if __name__ == "__main__":
    sys.exit(main())
