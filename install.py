"""Set-up. The webui runs this file on each start, without arguments: it then only looks, and installs nothing.

By hand, with any Python from 3.10 on and nothing else installed:

    python install.py demo [OPTIONS]   the headless webui with its small model (`demo --help` lists the options)
    python install.py test [OPTIONS]   all tests (the options go to pytest)
    python install.py bench [OPTIONS]  all benchmarks, then docs/performance.md (`bench --help` lists the options)

All use a virtual environment of their own, `.venv` beside this file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NEEDED = ("torch", "safetensors")


def main(arguments: list[str]) -> int:
    """Runs what the arguments ask for and returns the exit status."""
    if not arguments:
        return check()
    command, *options = arguments
    if command == "demo":
        prepare("demo")
        return run("-m", "extensions_builtin_shim", *options)
    if command == "test":
        prepare("test")
        return test(options)
    if command == "bench":
        prepare("bench")
        return run("-m", "benchmarks.report", *options)
    print(__doc__)
    return 0 if command in ("-h", "--help", "help") else 2


def check() -> int:
    """What the host's start needs of us: nothing but what it has itself."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"sd-webui-locon needs {' and '.join(missing)}, which the webui brings: is this the webui's Python?")
    return 0


def prepare(extra: str) -> None:
    """Makes `.venv` and installs the pinned extra of pyproject.toml into it; no work where that has been done."""
    if sys.version_info < (3, 10):  # noqa: UP036  whoever runs this by hand may have an older one
        sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
    pins = ROOT / "pyproject.toml"
    stamp = VENV / f"{extra}.installed"
    wanted = hashlib.sha256(pins.read_bytes()).hexdigest()
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    # on stderr, with all that pip says: stdout belongs to the demo's --json
    print(f"Preparing {VENV} for `{extra}`, once (some minutes; torch is large) …", file=sys.stderr)
    if not PYTHON.exists():
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists())
        except (subprocess.CalledProcessError, ImportError):
            sys.exit("This Python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv")
    requirements = VENV / f"{extra}.txt"
    requirements.write_text("\n".join(pinned(pins, extra)) + "\n")
    # torch first and alone: with it there, no other package's open range can draw in a larger build of it
    for packages in ([line for line in pinned(pins, extra) if line.startswith("torch=")], ["-r", str(requirements)]):
        if run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages, stdout=sys.stderr):
            sys.exit(f"pip could not install what {extra} needs (its own words are above). Is there a network?")
    stamp.write_text(wanted)


def pinned(pins: Path, extra: str) -> list[str]:
    """The packages of one extra in pyproject.toml. Read by hand: Python 3.10 has no TOML reader."""
    lines = pins.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.replace(" ", "").startswith(f"{extra}=["))
    end = next(i for i, line in enumerate(lines[start:], start) if line.rstrip().endswith("]"))
    return [part for line in lines[start : end + 1] for part in line.split('"')[1::2]]


def test(options: list[str]) -> int:
    """Style, types and all tests; the test runner's closing line is the last of the output."""
    if not options:
        for step in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
            if code := run("-m", *step):
                return code
    # a test keeps one core busy; a file's tests stay together, for they share what takes long to make
    return run("-m", "pytest", *(options or ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]))


def run(*arguments: str, stdout: TextIO | None = None) -> int:
    """Runs the Python of `.venv` in the project's folder; `stdout` is where its output goes, if not to ours."""
    return subprocess.call([str(PYTHON), *arguments], cwd=ROOT, stdout=stdout)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
