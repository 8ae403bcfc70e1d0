"""What a pass of a run uses, between the host's call of the tags and the pass's last step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lib_locon.resolve import Found
from lib_locon.session import Use


@dataclass(frozen=True, eq=False)
class Scheduled:
    """What the pass that runs now uses: it may depend on the step, and other extensions may change it."""

    model: weakref.ref[nn.Module]
    found: Found
    uses: list[Use]
    """Those of the first step."""
    hires: bool
    comment: Callable[[str], object]
    checkpoint: Path | None
    by_step: bool
    """Whether the prompt asks for other strengths at other steps."""
