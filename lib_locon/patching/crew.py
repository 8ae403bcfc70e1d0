"""Two workers for one change on the CPU: each takes the next weight, and half of torch's threads make its sum.

The threads of one operation wait for each other at its end, and a sum is thousands of short ones: on two cores that are
far apart the waiting doubles a product of rank 8. Two weights at a time never wait, and while one of them waits for
memory the other multiplies. Not more than two: each has buffers of its own, the largest of a weight's size.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from queue import SimpleQueue
from typing import TypeAlias

import torch

WORTHWHILE = 1 << 23
"""Numbers to be written, from which on it pays to wake workers."""
HANDS = 2
_HERE = threading.local()
"""`job`: the one that this thread works at, if it is a worker."""


class Job:
    """Items that workers take, each the next one. Over when all are done, one has failed, or it is stopped."""

    def __init__(
        self, items: Iterable[str], begin: Callable[[], AbstractContextManager[Callable[[str], object]]]
    ) -> None:
        """`begin` is entered by each worker, which works within it, and gives what it does with an item."""
        self._todo = deque(items)
        self._begin = begin
        self._inside = [threading.Lock() for _ in range(HANDS)]
        self._over = [threading.Event() for _ in range(HANDS)]
        self._errors: list[BaseException] = []

    def work(self, hand: int) -> None:
        """Called by the worker of that number. Raises nothing."""
        _HERE.job = self
        try:
            with self._inside[hand]:
                if self._todo:
                    self._work()
        except BaseException as error:  # noqa: BLE001  raised where the job is waited for
            self._todo.clear()
            self._errors.append(error)
        finally:
            _HERE.job = None
            self._over[hand].set()

    def _work(self) -> None:
        with self._begin() as do:
            while self._todo:
                try:
                    item = self._todo.popleft()
                except IndexError:  # the other worker had it
                    return
                do(item)

    def wait(self) -> None:
        """Until it is over. Raises what the first item that failed has raised."""
        for over in self._over:
            over.wait()
        if self._errors:
            raise self._errors[0]

    def stop(self) -> None:
        """Ends it: when this returns, nothing is being done and nothing will be. May be interrupted, and called again.

        A worker that comes to it later finds nothing to do: so it matters not whether any was told of it yet.
        """
        self._todo.clear()
        for inside in self._inside:
            with inside:
                pass


_Queue: TypeAlias = "SimpleQueue[tuple[Job, int] | None]"


class Crew:
    """Workers with a fixed number of torch's threads each. They live as long as this does, and sleep when idle.

    Plain threads: an executor's refuse work once the process's first thread has ended, while others still serve.
    """

    def __init__(self, threads: int) -> None:
        """Raises RuntimeError where the system gives no more threads."""
        queues: list[_Queue] = [SimpleQueue() for _ in range(HANDS)]
        self._queues = queues
        weakref.finalize(self, _dismiss, queues).atexit = False  # others may still change a model at their exit
        told: SimpleQueue[int] = SimpleQueue()
        # one after the other. What a worker says of its own threads, torch also takes as said for every thread that has
        # not asked yet; the first worker found what the process had before
        found = [_start(queue, share, told) for queue, share in zip(queues, _shares(threads), strict=True)]
        sayer = threading.Thread(target=_limit, args=(found[0],), daemon=True)
        sayer.start()
        sayer.join()

    def do(self, job: Job) -> None:
        """Until it is over. Raises what an item raises; an interrupt leaves it running, to be stopped."""
        for hand, queue in enumerate(self._queues):
            queue.put((job, hand))
        job.wait()


def can_share() -> bool:
    """Whether there are threads to share out, and each of torch's callers may have a number of them to itself."""
    return torch.get_num_threads() >= HANDS and _counts_by_thread() and working_at() is None


def crew_for(numbers: int) -> Crew | None:
    """Who is to make sums of so many numbers; None: the caller, as well as anybody."""
    if numbers < WORTHWHILE or not can_share():
        return None
    try:
        return _crew(torch.get_num_threads(), os.getpid())
    except RuntimeError:  # the system gives no more threads
        return None


def working_at() -> Job | None:
    """The job that the calling thread is a worker of."""
    job: Job | None = getattr(_HERE, "job", None)
    return job


@lru_cache(maxsize=1)
def _crew(threads: int, process: int) -> Crew:
    del process  # a forked one has none of its parent's threads
    return Crew(threads)


@lru_cache(maxsize=1)
def _counts_by_thread() -> bool:
    """Not where torch keeps one pool for all."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def _shares(threads: int) -> list[int]:
    return [threads // HANDS + (hand < threads % HANDS) for hand in range(HANDS)]


def _start(queue: _Queue, share: int, told: SimpleQueue[int]) -> int:
    """A worker, ready; and the number of threads that one has which nobody told anything."""
    threading.Thread(target=_serve, args=(queue, share, told), name="locon-sum", daemon=True).start()
    return told.get()


def _serve(queue: _Queue, share: int, told: SimpleQueue[int]) -> None:
    told.put(_limit(share))
    while (task := queue.get()) is not None:
        job, hand = task
        job.work(hand)
        del job, task  # while it sleeps, a worker keeps nothing alive


def _limit(threads: int) -> int:
    before = torch.get_num_threads()  # the first question in a thread sets the process's number: not to come later
    torch.set_num_threads(threads)
    return before


def _dismiss(queues: Sequence[_Queue]) -> None:
    for queue in queues:
        queue.put(None)
