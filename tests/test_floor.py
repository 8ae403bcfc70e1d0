"""The oldest that is promised: Python 3.10 and torch 2.1.

On every Python: no newer syntax and no newer name of the standard library. Where LOCON_FLOOR names a Python 3.10, tests
run under it and torch 2.1.2 too, as in the webui. That environment takes 5 GB, so nobody gets it without asking for it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import ROOT, environment, run_tests

FLOOR = (3, 10)
IN_THE_WEBUI = ["lib_locon", "scripts", "install.py", "extensions_builtin_shim/Lora"]
"""What runs under the webui's Python; the last answers to the built-in's names there."""
TESTS = ("engine", "laws", "store", "faults", "arithmetic", "session", "one_at_a_time", "reader", "pickled", "dialects")
TESTS += ("layers", "rounding", "side_path", "grammar", "schedule", "infotext", "options", "api", "shim_host")
TESTS += ("install", "readback", "shared_weights")


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [ROOT / name for name in listed.stdout.splitlines()]
    return found or [path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.parts)]


def test_every_file_parses_as_python_310() -> None:
    files = sources()
    assert len(files) > 100
    for path in files:
        if path.exists():
            ast.parse(path.read_text(encoding="utf8"), str(path), feature_version=FLOOR)


def test_that_test_can_fail() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* OSError:\n    pass", feature_version=FLOOR)


def vermin(*paths: str) -> subprocess.CompletedProcess[str]:
    code = "import vermin; vermin.main()"  # it has no `python -m`
    command = [sys.executable, "-c", code, "--target=3.10-", "--violations", "--no-tips", *paths]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_nothing_newer_of_the_standard_library_is_used() -> None:
    done = vermin(*IN_THE_WEBUI)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Minimum required versions: 3." in done.stdout


@pytest.mark.parametrize("newer", ["import tomllib", "from datetime import UTC", "from enum import StrEnum"])
def test_something_newer_would_be_found(newer: str, tmp_path: Path) -> None:
    file = tmp_path / "newer.py"
    file.write_text(newer)
    done = vermin(str(file))
    assert done.returncode == 1
    assert "requires !2, 3.11" in done.stdout


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_under_python_310_and_torch_21() -> None:
    python = os.environ.get("LOCON_FLOOR")
    if not python:
        pytest.skip("LOCON_FLOOR names no Python 3.10 (the environment for it takes 5 GB)")
    found = environment("floor", python=python, sees_ours=False)
    code = "import sys, torch; print(sys.version_info[:2], torch.__version__[:4])"
    said = subprocess.run([str(found), "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["(3,", "10)", "2.1."]
    run_tests(found, *(f"tests/test_{name}.py" for name in TESTS), seconds=1000)
