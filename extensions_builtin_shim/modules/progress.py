"""How much of the running job is done."""

from __future__ import annotations

from . import shared
from ._absent import absent

__getattr__ = absent(__name__)


def fraction() -> float:
    """0 to 1, as the host's progress route counts it: whole batches, and the steps of the one that runs."""
    state = shared.state
    if state.job_count <= 0:
        return 0.0
    done = state.job_no / state.job_count
    if state.sampling_steps > 0:
        done += state.sampling_step / state.sampling_steps / state.job_count
    return min(done, 1.0)
