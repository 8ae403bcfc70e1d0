"""How far the running job is, and whether the user wants it to stop."""

from __future__ import annotations

from dataclasses import dataclass

from ._absent import absent

__getattr__ = absent(__name__)


@dataclass
class State:
    """One for the process: the host works on one job at a time. `job_count` is -1 until the job knows its batches."""

    job: str = ""
    job_no: int = 0
    job_count: int = 0
    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    sampling_step: int = 0
    sampling_steps: int = 0

    def begin(self, job: str = "(unknown)") -> None:
        """A new job starts; an interrupt was meant for the one before."""
        self.job, self.job_no, self.job_count, self.sampling_step = job, 0, -1, 0
        self.skipped = self.interrupted = self.stopping_generation = False

    def nextjob(self) -> None:
        """The next batch of the job starts."""
        self.job_no += 1
        self.sampling_step = 0

    def end(self) -> None:
        """The job is over."""
        self.job, self.job_count = "", 0

    def interrupt(self) -> None:
        """Asks the running job to stop at its next step."""
        self.interrupted = True

    def dict(self) -> dict[str, object]:
        """What the host's API tells of the job."""
        names = ("skipped", "interrupted", "stopping_generation", "job", "job_count", "job_no")
        return {name: getattr(self, name) for name in (*names, "sampling_step", "sampling_steps")}
