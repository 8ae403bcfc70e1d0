"""The log."""

from __future__ import annotations

import logging

logger = logging.getLogger("lib_locon")
