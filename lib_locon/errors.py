"""Every error this package raises on purpose. Each message is a sentence for the user: what, where, what to do."""

from __future__ import annotations


class LoconError(Exception):
    """Base of all of them; catching it catches bad input and nothing else."""


class FileError(LoconError):
    """A file that cannot be read as what it should be."""


class ShapeError(LoconError):
    """Factors that do not fit each other, or a ΔW that does not fit its weight."""


class Unusable(LoconError):
    """Factors of the right shape that cannot be applied to this weight, and why."""


class UnknownName(LoconError):
    """A name that is no adapter, or more than one."""


class PatchError(LoconError):
    """A change of weights that failed half way. The weights are back at their base values."""
