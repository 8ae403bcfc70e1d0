"""Gives the process its devices before any test asks for one."""

from __future__ import annotations

import os
from pathlib import Path

from tests.second_device import device

device.load(Path(os.environ["LOCON_SECOND_DEVICE"]))
