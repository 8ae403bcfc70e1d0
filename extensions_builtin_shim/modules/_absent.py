"""What a module of the stand-in says to whoever asks it for something that it does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def absent(module: str) -> Callable[[str], NoReturn]:
    """A `__getattr__` for `module`. AttributeError, so that `getattr(…, default)` works as in the host."""

    def __getattr__(name: str) -> NoReturn:  # noqa: N807
        raise AttributeError(f"the headless stand-in for the webui has no {module}.{name}")

    return __getattr__
