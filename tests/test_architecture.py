"""Imports point inward only. The rule is checked on the source, and so is that the check can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lib_locon"
RINGS = {
    "errors": 0, "naming": 0, "folders": 0, "terminal": 0, "untrusted_json": 0, "arithmetic": 0, "products": 0,
    "uploads": 0, "families": 0, "prompt": 0, "settings": 0,
    "files": 1, "models": 1, "patching": 1, "library": 1, "absent": 1, "layers": 1,
    "matching": 2, "report": 2, "resolve": 2, "session": 2, "checkpoint": 2, "inspection": 2, "bake": 2,
    "facts": 2, "cards": 2, "user_metadata": 2, "names": 2, "fitting": 2, "index": 2, "dryrun": 2,
    "hosts": 3, "progress": 3, "__main__": 3,
    "__init__": 2,  # the public names of the library; no host among them
}  # fmt: skip
ONLY_IN_RING_3 = {"modules", "gradio"}
FORBIDDEN = {"patching": {"files", "families", "prompt"}, "hosts": {"families"}}
RUN_TIME = {"torch", "safetensors"}


def violations(source: str, unit: str) -> list[str]:
    """The imports in `source`, a file of the unit `unit` (first name below lib_locon), that break a rule."""
    found = []
    for name in imported(ast.parse(source)):
        top, *rest = name.split(".")
        if top in ONLY_IN_RING_3 and RINGS[unit] < 3:
            found.append(f"{unit} imports {name}, which only ring 3 may")
        if top not in RUN_TIME | ONLY_IN_RING_3 | {"lib_locon"} and top not in sys.stdlib_module_names:
            found.append(f"{unit} imports {name}: the extension's run-time needs are torch and safetensors")
        if top == "lib_locon" and rest and rest[0] in RINGS:
            if RINGS[rest[0]] > RINGS[unit]:
                found.append(f"{unit} (ring {RINGS[unit]}) imports {name} (ring {RINGS[rest[0]]})")
            if rest[0] in FORBIDDEN.get(unit, ()):
                found.append(f"{unit} must not know {rest[0]}")
    return found


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            # `from lib_locon import x` names a unit, or a public name of the package
            names += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "lib_locon" else []
            names.append(str(node.module))
    return names


def test_imports_point_inward() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    found = []
    for path in files:
        unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert unit in RINGS, f"{unit} has no ring yet: add it to RINGS"
        found += [f"{path.name}: {line}" for line in violations(path.read_text(encoding="utf8"), unit)]
    assert found == []


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("families", "from lib_locon.files.reader import Entry"),
        ("files", "import lib_locon.session"),
        ("session", "from lib_locon import hosts"),
        ("patching", "from lib_locon.families.layer import Layer"),
        ("hosts", "from lib_locon.families import FAMILIES"),
        ("models", "import gradio as gr"),
        ("session", "def f():\n    from modules import shared"),
        ("files", "import numpy"),
    ],
)
def test_the_check_can_fail(unit: str, source: str) -> None:
    assert violations(source, unit)


def test_the_library_loads_no_host_and_nothing_heavy() -> None:
    heavy = ("modules", "gradio", "transformers", "diffusers", "peft", "lycoris", "PIL", "lib_locon.hosts")
    code = f"import sys, lib_locon; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_that_test_can_fail() -> None:
    code = "import sys, lib_locon, lib_locon.hosts; print('lib_locon.hosts' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_entry_holds_no_logic() -> None:
    scripts = list((PACKAGE.parent / "scripts").glob("*.py"))
    assert [path.name for path in scripts] == ["locon.py"], "the host executes every file there as a script"
    assert len(scripts[0].read_text(encoding="utf8").splitlines()) <= 15
