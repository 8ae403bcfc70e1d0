"""What we put into the host's page and its web application, under each gradio that a host brings.

Each runs in an environment of its own (`tests/environments.py`), so the tests themselves are in other files.
"""

from __future__ import annotations

import pytest

from tests.environments import environment, run_tests

VERSIONS = {"3.41.2": "pydantic 1", "4.40.0": "pydantic 2", "6.31.0": "pydantic 2"}
"""Those of AUTOMATIC1111's webui 1.10, of Forge, and the current one."""
FILES = ("gradio_checks", "test_metadata_editor", "test_api", "test_options", "test_cards")
TESTS = tuple(f"tests/{name}.py" for name in FILES)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_page_and_the_addresses_under_gradio(version: str) -> None:
    expected = f"gradio {version}, {VERSIONS[version]}"
    run_tests(environment(f"gradio-{version}"), *TESTS, LOCON_EXPECTED=expected)
