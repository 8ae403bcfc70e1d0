"""What a pass of a run uses, between the host's call of the tags and the pass's last step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lib_locon.hosts.legacy import Shown
from lib_locon.prompt.blocks import BASE, T5
from lib_locon.report import Report
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


@dataclass(frozen=True, eq=False)
class Place:
    """Where a run is, to come back to it after another one."""

    scheduled: Scheduled | None
    step: tuple[int, int]
    suspended: bool
    running: bool
    used: tuple[Use, ...]
    report: Report
    shown: list[Shown]
    """What other extensions see, with what they changed there."""


def on_text(use: Use) -> tuple[object, ...]:
    """All of a use that can change a text encoder; comparable."""
    mine = use.strengths
    blocks = None if mine.blocks is None else (mine.blocks.of(BASE), mine.blocks.of(T5))
    return use.adapter.identity, use.dyn, mine.te, mine.encoders, blocks, mine.elements, mine.layers
