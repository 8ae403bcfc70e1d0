"""Where the host keeps its user's data."""

from __future__ import annotations

from ._absent import absent

__getattr__ = absent(__name__)

data_path = ""
"""For the launcher: a folder for this run."""
