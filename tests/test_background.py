"""Reading many files in a thread: in which order, how long others wait for it, and that nothing stops it for good."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from lib_locon.files.background import Background
from lib_locon.files.reader import FileIdentity


def files(*names: str) -> list[FileIdentity]:
    return [FileIdentity(name, 1, 1) for name in names]


class Slow:
    """Reads a file when the test lets it."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.may = threading.Semaphore(0)
        self.began = threading.Semaphore(0)

    def __call__(self, identity: FileIdentity) -> str:
        self.began.release()
        assert self.may.acquire(timeout=30)
        self.read.append(identity.path)
        return identity.path.upper()


def wait_until(done: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_whoever_asks_waits_for_his_own_files_and_not_for_all() -> None:
    slow = Slow()
    background = Background(slow)
    background.read(files(*(f"many{number}" for number in range(50))))
    slow.began.acquire()
    slow.may.release(2)
    began = time.monotonic()
    background.read(files("mine"), 20)
    assert time.monotonic() - began < 10
    assert background.known(files("mine")[0]) == "MINE"
    assert slow.read == ["many0", "mine"], "what somebody waits for comes first"
    assert background.waiting == 49
    background.close()
    slow.may.release(50)


def test_a_file_that_is_being_read_is_waited_for_and_not_read_twice() -> None:
    slow = Slow()
    background = Background(slow)
    background.read(files("a"))
    slow.began.acquire()
    threading.Timer(0.05, slow.may.release).start()
    background.read(files("a"), 20)
    assert background.known(files("a")[0]) == "A"
    assert slow.read == ["a"]


def test_time_is_up() -> None:
    slow = Slow()
    background = Background(slow)
    began = time.monotonic()
    background.read(files("a", "b"), 0.05)
    assert 0.04 < time.monotonic() - began < 10
    assert background.known(files("a")[0]) is None
    background.close()
    slow.may.release()


def test_an_error_ends_neither_the_thread_nor_the_next_one(caplog: pytest.LogCaptureFixture) -> None:
    def compute(identity: FileIdentity) -> str:
        if identity.path == "bad":
            raise ZeroDivisionError
        return identity.path

    background = Background(compute)
    background.read(files("a", "bad", "b"), 20)
    assert [background.known(file) for file in files("a", "bad", "b")] == ["a", None, "b"]
    background.read(files("c"), 20)
    assert background.known(files("c")[0]) == "c"
    assert "ZeroDivisionError" in caplog.text


def test_an_error_while_keeping_what_was_read_does_not_stop_it(caplog: pytest.LogCaptureFixture) -> None:
    def rested() -> None:
        raise OSError("the disk is full")

    background = Background(lambda identity: identity.path, rested=rested)
    for name in ("a", "b"):
        background.read(files(name), 20)
        assert background.known(files(name)[0]) == name
        wait_until(lambda: background._thread is None)
    assert [record.exc_text.count("the disk is full") for record in caplog.records if record.exc_text] == [2, 2]


def test_closing_stops_after_the_file_that_is_read_now() -> None:
    slow, rested = Slow(), threading.Event()
    background = Background(slow, rested=rested.set)
    background.read(files("a", "b", "c"))
    slow.began.acquire()
    waiter = threading.Thread(target=background.read, args=(files("c"), 60))
    waiter.start()
    background.close()
    slow.may.release(3)
    assert rested.wait(30)
    waiter.join(30)
    assert not waiter.is_alive()
    wait_until(lambda: background._thread is None)
    assert slow.read[0] == "a" and "b" not in slow.read


def test_many_ask_at_once() -> None:
    background = Background(lambda identity: identity.path.upper())
    everybody = files(*map(str, range(400)))
    missing: list[FileIdentity] = []

    def ask(start: int) -> None:
        mine = everybody[start : start + 100]
        background.read(mine, 30)
        missing.extend(file for file in mine if background.known(file) is None)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(0, 320, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert missing == []
