"""install.py: quiet and harmless when the webui runs it, and no word of its own on the demo's stdout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "install.py"), *arguments], capture_output=True, text=True, check=False
    )


def test_the_webui_runs_it_without_arguments() -> None:
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unknown_command_prints_the_help() -> None:
    done = run("upgrade")
    assert done.returncode == 2
    assert "install.py demo" in done.stdout


def pinned(extra: str) -> list[str]:
    sys.path.insert(0, str(ROOT))
    try:
        import install
    finally:
        sys.path.remove(str(ROOT))
    return install.pinned(ROOT / "pyproject.toml", extra)


@pytest.mark.parametrize("extra", ["demo", "test", "bench"])
def test_every_package_of_ours_is_pinned(extra: str) -> None:
    packages = pinned(extra)
    assert packages[0] == "torch==2.13.0"
    assert all("==" in package for package in packages)


def test_a_package_has_one_version() -> None:
    """All commands share one .venv: with two versions each would undo what the other installed."""
    packages = {package.partition(";")[0] for extra in ("demo", "test", "bench") for package in pinned(extra)}
    assert len({package.partition("==")[0] for package in packages}) == len(packages)


def test_preparing_says_nothing_on_stdout(tmp_path: Path) -> None:
    """With a pip that only talks, in a copy of its own."""
    (tmp_path / "install.py").write_text((ROOT / "install.py").read_text(encoding="utf8"), encoding="utf8")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf8"), encoding="utf8")
    talk = "import install, sys; install.PYTHON = install.Path(sys.executable); install.VENV.mkdir()\n"
    talk += "install.subprocess.call = lambda a, cwd, stdout=None: print('pip talks', file=stdout) or 0\n"
    talk += "install.prepare('demo')"
    done = subprocess.run([sys.executable, "-c", talk], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "pip talks" in done.stderr
