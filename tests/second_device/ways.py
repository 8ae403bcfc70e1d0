"""How a session on these devices keeps its bases."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

import lib_locon
from tests.test_store import checkpoint, source_of

WAYS = ("ram", "device", "checkpoint", "checkpoint, opened each time")
"""The policies; the last as on Windows."""


def keep(session: lib_locon.Session, way: str, folder: Path, known: dict[str, Tensor]) -> None:
    """`known`: what the model's file holds."""
    policy, _, opened = way.partition(",")
    store = session.engine.store
    store.policy = policy
    store.source = source_of(checkpoint(folder / "model.safetensors", known), hold=not opened)
