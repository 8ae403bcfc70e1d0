"""What it costs to change a model's adapters, as multiples of the least that any change could cost.

    python -m benchmarks.switch                                   SD1.5's true shapes, fp32, a table
    python -m benchmarks.switch --dtype fp32,bf16,fp16 --json     the same in three dtypes, one JSON object on stdout
    python -m benchmarks.switch --model tiny --rows locon-r8,same a few seconds
    python -m benchmarks.switch --model sdxl --dtype fp16 --device cuda --policy device   on a GPU, the base kept there
    python -m benchmarks.switch --model sdxl-small                its weights cut to 16 along each axis: with next to
                                                                  nothing to add, what 1052 weights cost anyway

The floor is one plain copy of the weights that the adapters touch (read the base, write the weight), timed before every
row. A ratio is the median of row over floor, each with the floor just before it. Each row is one `Session.apply`
(schedule-20: twenty). Rows that apply start from another LoCon, whose base is kept already; with `--start base` they
start from nothing, and so pay for looking whether the kept copies still are the base. With `--policy checkpoint` there
are no copies: each change reads the base from the model's file, as the webui does by default, here from the system's
cache; the file is as large as the model.
On a GPU each time is taken when it has done all. The floor is then as much of its memory's bandwidth as a plain copy
gets (`floor_gbs`, read and written), and one over a row's ratio is the share of that which the change gets. `gpu_mib`
is the most of its memory above the resting state.
All adapters touch the 350 modules that kohya trains as C3Lier (SD1.5); files are fp16, read and matched beforehand.
`anon_mib` is the most anonymous memory (RssAnon) above the resting state, looked at in a round of its own; null where
the system does not tell. `arithmetic` is the share of the ratio that the row's products alone take at the rate of
large ones: what a processor cannot do, no engine can.

    locon-r8, locon-r32   apply a LoCon of that rank            lokr-f8    apply a LoKr, factor 8, both matrices whole
    locon-r32-x3          apply three at once                   loha-r32   apply a LoHa, rank 32
    strength              locon-r8 held at 1, asked for at 0.7  remove     locon-r8 held, nothing asked for
    schedule-20           locon-r8 at 20 strengths, one after the other: the steps of an image with a curve
    dora-r32              where lib_locon reads it              same       locon-r8 held and asked for again

Memory: three times the model. fp32 SD1.5 takes 12 GiB, fp32 SDXL 42 GiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import settle
from benchmarks.models import DTYPES, MODELS, random_model
from benchmarks.rows import ROWS, STARTS, Rig, as_json
from lib_locon.patching.store import POLICIES, Policy


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    options = _parse(arguments)
    try:
        result = measure(
            options.model, options.dtype, options.rows, options.rounds, options.start, options.policy, options.device
        )
    except MemoryError as error:
        print(f"not enough memory: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1) if options.json else table(result))
    return 0


def measure(
    model: str,
    dtypes: list[str],
    rows: list[str],
    rounds: int,
    start: str,
    policy: Policy = "ram",
    device: str = "cpu",
) -> dict[str, Any]:
    """The JSON object: one model in memory at a time, one dtype after the other."""
    floors: dict[str, float] = {}
    bandwidths: dict[str, float] = {}
    found: list[dict[str, Any]] = []
    for dtype in dtypes:
        print(f"{model} {dtype}: {', '.join(rows)}; {rounds} rounds from {start}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="locon-benchmark-") as folder:
            rig = Rig(random_model(model, DTYPES[dtype]).to(device), rows, Path(folder), start, policy)
            floors[dtype], measured = rig.run(rounds)
            bandwidths[dtype] = 2e-9 * sum(weight.nbytes for weight in rig.touched) / floors[dtype]
        found += [as_json(name, dtype, figures, rig.arithmetic(name)) for name, figures in measured.items()]
        del rig
        gc.collect()
        settle()
    return {
        "model": model,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "start": start,
        "policy": policy,
        "floor_seconds": floors,
        "floor_gbs": bandwidths,
        "rows": found,
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    how = f"from {result['start']}, base kept by {result['policy']}"
    where = f"{result['threads']} threads" if result["device"] == "cpu" else result["device"]
    yield f"{result['model']}, torch {result['torch']}, {where}, {how}"
    for dtype, floor in result["floor_seconds"].items():
        yield f"\n{dtype:<14}{'seconds':>10}{'ratio':>10}{'MiB':>8}{'weights':>9}"
        yield f"{'floor':<14}{floor:>10.4f}{1:>10.3f}    ({result['floor_gbs'][dtype]:.0f} GB/s)"
        for row in result["rows"]:
            if row["dtype"] == dtype:
                most = row["anon_mib"] if result["device"] == "cpu" else row["gpu_mib"]
                memory = "?" if most is None else f"{most:.0f}"
                yield f"{row['name']:<14}{row['seconds']:>10.4f}{row['ratio']:>10.3f}{memory:>8}{row['written']:>9}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.switch", description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--dtype", action="append", metavar=",".join(DTYPES), help="repeat, or with commas; fp32")
    parser.add_argument("--rows", action="append", metavar="NAME,…", help=f"of {', '.join(ROWS)}; all of them")
    parser.add_argument("--rounds", type=int, default=3, help="times that each row is timed; 3")
    parser.add_argument("--start", choices=STARTS, default="other", help="what the rows that apply start from; other")
    parser.add_argument("--policy", choices=POLICIES, default="ram", help="what keeps the base; ram")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model is; cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    options.dtype = names(parser, options.dtype or ["fp32"], DTYPES)
    options.rows = names(parser, options.rows or [",".join(ROWS)], ROWS)
    return options


def names(parser: argparse.ArgumentParser, given: list[str], known: Collection[str]) -> list[str]:
    """The names of an option that may be repeated or have commas; ends the program at an unknown one."""
    chosen = list(dict.fromkeys(name.strip() for part in given for name in part.split(",")))
    for name in chosen:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
