"""Measures everything that docs/performance.md shows, and writes that page.

    python -m benchmarks.report                           all measurements, then the page: about an hour, quiet machine
    python -m benchmarks.report --measure switch-base     one of them anew, the others as they are in the folder
    python -m benchmarks.report --measure none            only the page, from what the folder holds

Each measurement is a benchmark of this folder, run as its own help says with `--json`. What it said is kept with the
machine, the date and the command in `benchmarks/results/NAME.json`; the page is made of these files alone. `python
install.py bench` prepares the versions that are pinned for it and does the same.

    switch-other       benchmarks.switch while another LoCon is merged
    switch-base        the same from the base
    switch-checkpoint  as switch-other, with the base read from the checkpoint file
    switch-avx2        as switch-other, on a processor without AVX-512; left out where there is more
    switch-sdxl        SDXL's true shapes in bf16; 24 GiB
    memory             benchmarks.memory_bars
    compared           benchmarks.compared
    cards              benchmarks.cards with 10,000 files
    gpu-sd15, gpu-sdxl benchmarks.switch in fp16 on a GPU with the base beside the model; left out where there is none
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import lib_locon
from benchmarks.report_page import GPU, page
from benchmarks.switch import names

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
_ALL_DTYPES = ("--dtype", "fp32,bf16,fp16")
MEASUREMENTS: dict[str, tuple[str, ...]] = {
    "switch-other": ("benchmarks.switch", *_ALL_DTYPES, "--rounds", "5", "--start", "other"),
    "switch-base": ("benchmarks.switch", *_ALL_DTYPES, "--rounds", "5", "--start", "base"),
    "switch-checkpoint": ("benchmarks.switch", *_ALL_DTYPES, "--rounds", "5", "--policy", "checkpoint"),
    "switch-avx2": ("benchmarks.switch", *_ALL_DTYPES, "--rounds", "5", "--start", "other"),
    "switch-sdxl": ("benchmarks.switch", "--model", "sdxl", "--dtype", "bf16", "--start", "other"),
    "memory": ("benchmarks.memory_bars",),
    "compared": ("benchmarks.compared", *_ALL_DTYPES),
    "cards": ("benchmarks.cards", "--files", "10000"),
}
WITHOUT_MODEL = ("cards",)
"""Those that need none, and so take no `--model`."""
_GPU = ("--dtype", "fp16", "--rounds", "20", "--device", "cuda", "--policy", "device")
ON_A_GPU = {name: ("benchmarks.switch", "--model", name.removeprefix("gpu-"), *_GPU) for name in GPU}
MEASUREMENTS.update(ON_A_GPU)


def main(arguments: list[str] | None = None) -> int:
    """Measures what is asked for, writes the page, and returns the exit code."""
    options = _parse(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.measure:
        if why := why_not_here(name):
            print(f"{name}: left out, {why}", file=sys.stderr)
            continue
        command = [*MEASUREMENTS[name], "--json"]
        if options.model and "--model" not in command and name not in WITHOUT_MODEL:
            command += ["--model", options.model]
        found = measure(command)
        (options.results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    results = read(options.results)
    if not results:
        print(f"there is no measurement in {options.results}: nothing to write a page of", file=sys.stderr)
        return 1
    options.out.write_text(page(results), encoding="utf8")
    print(f"written: {options.out}")
    return 0


def why_not_here(name: str) -> str:
    """Why a measurement means nothing on this machine; "" where it does."""
    if name in ON_A_GPU and not torch.cuda.is_available():
        return "torch finds no GPU here"
    if name == "switch-avx2" and _instructions() != "AVX2":
        return f"this processor's instructions are {_instructions()}"
    return ""


def measure(command: list[str]) -> dict[str, Any]:
    """What a benchmark said, with everything that one must know to read it; `failed` instead of `result` where it said
    nothing. (A benchmark whose bar is missed has a status of its own, and says everything nevertheless.)"""
    print(f"python -m {' '.join(command)}", file=sys.stderr)
    last = "it said nothing"
    with tempfile.TemporaryFile("w+", encoding="utf8") as said:
        run = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=said, stderr=subprocess.PIPE, text=True
        )
        for line in run.stderr or ():  # shown at once: some of them take half an hour
            sys.stderr.write(line)
            last = line.strip() or last
        status = run.wait()
        said.seek(0)
        text = said.read()
    about = {"command": f"python -m {' '.join(command)}", "machine": machine()}
    try:
        return {**about, "result": json.loads(text)}
    except json.JSONDecodeError:
        return {**about, "failed": f"{last} (exit status {status})"}


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "instructions": _instructions(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": _memory(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": _system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sd-webui-locon": lib_locon.__version__,
        "commit": _commit(),
    }


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Measurement → what its file holds, of those that are there."""
    files = {name: folder / f"{name}.json" for name in MEASUREMENTS}
    return {name: json.loads(file.read_text(encoding="utf8")) for name, file in files.items() if file.exists()}


def _commit() -> str:
    """Of the engine that was measured; a `+` where files of the package differ from it."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        clean = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "lib_locon"], cwd=ROOT, capture_output=True)
    except OSError:
        return ""
    return found.stdout.strip() + "+" * bool(clean.returncode) if found.returncode == 0 else ""


def _instructions() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _memory() -> str:
    kib = _line("/proc/meminfo", "MemTotal")
    return f"{int(kib.split()[0]) / 2**20:.1f} GiB" if kib else "unknown"


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()} {platform.machine()}"


def _line(file: str, field: str) -> str:
    try:
        lines = Path(file).read_text(encoding="utf8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__, formatter_class=raw)
    known = f"of {', '.join(MEASUREMENTS)}, or none; all of them"
    parser.add_argument("--measure", action="append", metavar="NAME,…", help=known)
    parser.add_argument("--model", choices=("tiny", "sd15"), help="tiny: to try it out; sd15")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the measurements")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page; docs/performance.md")
    options = parser.parse_args(arguments)
    given = options.measure or [",".join(MEASUREMENTS)]
    options.measure = [] if given == ["none"] else names(parser, given, MEASUREMENTS)
    return options


if __name__ == "__main__":
    sys.exit(main())
