"""The pure helpers of the page's scripts, run by node."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = sorted((Path(__file__).parent / "javascript").glob("*.test.mjs"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_helpers(path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        message = "the scripts' helpers are not tested: node is not installed (on Debian: apt-get install nodejs)"
        (pytest.fail if os.environ.get("LOCON_BROWSER") == "required" else pytest.skip)(message)
    done = subprocess.run([node, "--test", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "# pass 0\n" not in done.stdout


def test_there_are_some() -> None:
    assert [path.name for path in TESTS] == ["completion.test.mjs", "grid.test.mjs", "tags.test.mjs", "texts.test.mjs"]
