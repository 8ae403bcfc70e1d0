"""Fuzzing by hand: `python -m tests.fuzz --minutes 10`. Failing cases are kept, with the line that repeats each."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from tests.fuzz.adapter_files import AdapterFiles
from tests.fuzz.prompts import Prompts
from tests.fuzz.requests import Requests
from tests.fuzz.runner import fuzz, opened, run_case
from tests.fuzz.sidecars import Sidecars

TARGETS: dict[str, type] = {
    "adapter-files": AdapterFiles,
    "sidecars": Sidecars,
    "prompts": Prompts,
    "requests": Requests,
}


def main() -> int:
    """Exit status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=TARGETS, action="append", help="these kinds of input only")
    parser.add_argument("--case", help="this case only, as a failure prints it")
    parser.add_argument("--folder", type=Path, help="where failing cases are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(exist_ok=True)
    with opened(TARGETS, options.only or list(TARGETS)) as targets:
        if options.case:
            for name, target in targets.items():
                sys.stdout.write(f"{name}: {run_case(name, target, options.case, folder)}\n")
            return 0
        found = fuzz(targets, options.minutes * 60, options.seed, folder)
    lines = [f"{count:8} {name}" for name, count in sorted(found.counts.items())]
    slowest = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.slowest.items())
    lines += [f"{sum(found.counts.values())} cases, {len(found.failures)} failures; slowest: {slowest}; {folder}"]
    sys.stdout.write("\n".join([*found.failures, *lines]) + "\n")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
