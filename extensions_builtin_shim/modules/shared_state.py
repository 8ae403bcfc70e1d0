"""How far the running job is, and whether the user wants it to stop."""

from __future__ import annotations

from dataclasses import dataclass

from ._absent import absent

__getattr__ = absent(__name__)


@dataclass
class State:
    """One for the process: the host works on one job at a time."""

    job: str = ""
    interrupted: bool = False
    sampling_step: int = 0
    sampling_steps: int = 0

    def begin(self, job: str = "(unknown)") -> None:
        """A new job starts; an interrupt was meant for the one before."""
        self.job, self.interrupted, self.sampling_step = job, False, 0

    def end(self) -> None:
        """The job is over."""
        self.job = ""

    def interrupt(self) -> None:
        """Asks the running job to stop at its next step."""
        self.interrupted = True
