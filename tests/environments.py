"""Virtual environments beside `.venv` in which tests run once more: with the packages that a host pins, or older ones.

`tests/pins/NAME.txt` lists what is in `.venv-NAME`. It is made once, and anew where the list or the Python has changed.
With `sees_ours` it also sees what this Python has, behind its own: torch is too large to be there several times.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PINS = ROOT / "tests" / "pins"
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost"}


def environment(name: str, *, python: str = sys.executable, sees_ours: bool = True) -> Path:
    """Its Python. Skips the test where it cannot be made, or fails it where LOCON_ENVIRONMENTS says `required`."""
    folder, pins = ROOT / f".venv-{name}", PINS / f"{name}.txt"
    found = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ours = sysconfig.get_path("purelib") if sees_ours else ""
    stamp, wanted = folder / "made-of", hashlib.sha256(f"{python} {ours} {pins.read_text()}".encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == wanted and found.exists()):
        # no packages are built here: what has no wheel for this Python cannot be had in a minute
        packages = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", "-r", str(pins)]
        for command in (
            [python, "-m", "venv", "--clear", str(folder)],
            [str(found), "-m", "pip", "install", *packages],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
            if done.returncode:
                _cannot(f"{folder.name} cannot be made (is there a network?): {(done.stderr or done.stdout)[-1000:]}")
        if ours:
            _packages(found).joinpath("ours.pth").write_text(f"{ours}\n", encoding="utf8")
        stamp.write_text(wanted)
    return found


def run_tests(python: Path, *arguments: str, seconds: float = 600, **variables: str) -> None:
    """Runs pytest in an environment; fails with all its output where a test there fails."""
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **OFFLINE, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", pytrace=False)


def _packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def _cannot(why: str) -> None:
    (pytest.fail if os.environ.get("LOCON_ENVIRONMENTS") == "required" else pytest.skip)(why)
