"""Runs `tests/second_device`: two GPUs that are none, in a process of their own, for torch has them for good then."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.environments import ROOT, run_tests
from tests.second_device import device


@pytest.mark.long
@pytest.mark.timeout(600)
def test_on_a_second_device() -> None:
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch has GPUs of its own")
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to make the device with")
    try:
        library = device.compiled(compiler, ROOT / ".venv-second-device")
    except RuntimeError as error:  # another torch than ours, say
        (pytest.fail if os.environ.get("LOCON_ENVIRONMENTS") == "required" else pytest.skip)(str(error))
    run_tests(Path(sys.executable), "tests/second_device", LOCON_SECOND_DEVICE=str(library))
