"""The devices do what GPUs do, so that a test on them can fail."""

from __future__ import annotations

import pytest
import torch

from tests.second_device.device import DEVICES, Event, counted


def test_an_operation_takes_the_numbers_of_one_device_only() -> None:
    here, there = (torch.ones(3, device=device) for device in DEVICES)
    assert (here + 1).device == DEVICES[0]
    assert (there * torch.tensor(2.0)).device == DEVICES[1]
    for other in (there, torch.ones(3)):
        with pytest.raises(RuntimeError, match="at least two devices"):
            here + other


def test_a_copy_from_pinned_memory_that_nobody_waits_for_reads_what_is_there_later() -> None:
    pinned, there = torch.empty(4, pin_memory=True).fill_(1), torch.empty(4, device="cuda")
    there.copy_(pinned, non_blocking=True)
    pinned.fill_(2)
    assert there.tolist() == [2, 2, 2, 2]
    there.copy_(pinned, non_blocking=True)
    done = Event()
    done.record()
    done.synchronize()
    pinned.fill_(3)
    assert there.tolist() == [2, 2, 2, 2]


def test_a_copy_into_pinned_memory_comes_when_it_is_waited_for() -> None:
    pinned, there = torch.empty(4, pin_memory=True).fill_(1), torch.full((4,), 2.0, device="cuda")
    pinned.copy_(there, non_blocking=True)
    there.fill_(3)  # after it, in the device's order
    assert pinned.tolist() == [1, 1, 1, 1]
    torch.cuda.synchronize()
    assert pinned.tolist() == [2, 2, 2, 2]


def test_it_is_counted_what_makes_the_processor_wait() -> None:
    pinned = torch.ones(1000, pin_memory=True)
    counted()
    there = pinned.to("cuda", non_blocking=True)
    there += 1
    assert "waits" not in counted()
    assert bool((there == 2).all())
    there.cpu()
    pinned.to("cuda")
    torch.ones(1000).to("cuda", non_blocking=True)
    torch.equal(there, there)
    torch.cuda.synchronize()
    assert counted()["waits"] == 6


def test_pinned_memory_is_given_by_the_power_of_two() -> None:
    before = torch.ops.second_device.pinned_bytes()
    held = torch.empty(5 << 10, dtype=torch.uint8, pin_memory=True)
    assert held.is_pinned()
    assert held[1:].is_pinned()
    assert not torch.empty(10).is_pinned()
    assert torch.ops.second_device.pinned_bytes() - before == 8 << 10
    del held
    assert torch.ops.second_device.pinned_bytes() == before


def test_memory_can_run_out() -> None:
    torch.ops.second_device.fail_after(1)
    try:
        torch.empty(4, device="cuda")
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.empty(4, device="cuda")
    finally:
        torch.ops.second_device.fail_after(-1)
