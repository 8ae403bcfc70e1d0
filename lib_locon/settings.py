"""The extension's settings: one table, from which the host's settings page is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A setting: its key in the host's options, what the page says, and what it is when nobody has set it."""

    key: str
    label: str
    default: bool


ALLOW_PICKLE = Setting(
    "locon_allow_pickle",
    "Read adapters in pickled files (.pt, .ckpt) too: such a file can hold a program, so only from authors you trust",
    False,
)
SETTINGS: tuple[Setting, ...] = (ALLOW_PICKLE,)
