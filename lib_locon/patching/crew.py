"""Two workers for one change on the CPU: each takes the next weight, and half of torch's threads make its sum.

The threads of one operation wait for each other at its end, and a sum is thousands of short ones: on two cores that are
far apart the waiting doubles a product of rank 8. Two weights at a time never wait, and while one of them waits for
memory the other multiplies. Not more than two: each has buffers of its own, the largest of a weight's size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

WORTHWHILE = 1 << 23
"""Numbers to be written, from which on it pays to wake workers."""
T = TypeVar("T")


class Crew:
    """Workers with a fixed number of torch's threads each. They live as long as this does, and wait when idle."""

    def __init__(self, threads: int) -> None:
        shares = (threads - threads // 2, threads // 2)
        self._workers = [
            ThreadPoolExecutor(1, f"locon-{number}", _limit, (share,)) for number, share in enumerate(shares)
        ]
        try:
            self._rest()  # so that they start now
        finally:
            # what a worker says of its own threads, torch also takes as said for threads that begin later
            torch.set_num_threads(threads)

    def run(self, items: Iterable[T], begin: Callable[[], Callable[[T], object]]) -> None:
        """Does each item, in this order, two at a time; `begin` is called by each worker and gives what it does.

        What an item raises is raised, once the other worker has ended its own; the items after it are not begun. So it
        is with an interrupt: whatever happens, nothing is being done any more when this ends.
        """
        todo = deque(items)
        ends: list[Future[None]] = []
        try:
            ends += [worker.submit(_take, todo, begin) for worker in self._workers]
            wait(ends)
        except BaseException:
            todo.clear()
            self._rest()
            raise
        for end in ends:
            end.result()

    def _rest(self) -> None:
        """Waits for each worker to be idle. An interrupt meanwhile is raised after that."""
        interrupt: BaseException | None = None
        waiting = True
        while waiting:
            try:
                for worker in self._workers:
                    worker.submit(bool).result()  # behind whatever it has to do
                waiting = False
            except RuntimeError:  # the process ends, or the system gives no thread: there is none to wait for
                raise
            except BaseException as error:  # noqa: BLE001  raised below
                interrupt = error
        if interrupt is not None:
            raise interrupt


def can_share() -> bool:
    """Whether there are threads to share out, and each of torch's callers may have a number of them to itself."""
    return torch.get_num_threads() > 1 and _counts_by_thread()


def crew_for(numbers: int) -> Crew | None:
    """Who is to make sums of so many numbers; None: the caller, as well as anybody."""
    if numbers < WORTHWHILE or not can_share():
        return None
    try:
        return _crew(torch.get_num_threads(), os.getpid())
    except RuntimeError:  # the system gives no more threads
        return None


@lru_cache(maxsize=1)
def _crew(threads: int, process: int) -> Crew:
    del process  # a forked one has none of its parent's threads
    return Crew(threads)


@lru_cache(maxsize=1)
def _counts_by_thread() -> bool:
    """Not where torch keeps one pool for all."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def _limit(threads: int) -> None:
    torch.get_num_threads()  # the first question in a thread sets the process's number, so it must not come later
    torch.set_num_threads(threads)


def _take(todo: deque[T], begin: Callable[[], Callable[[T], object]]) -> None:
    try:
        do = begin()
        while todo:
            try:
                item = todo.popleft()
            except IndexError:  # the other worker had it
                return
            do(item)
    except BaseException:
        todo.clear()
        raise
