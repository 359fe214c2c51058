"""The simulated device finds what it is there to find."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from offload.errors import BudgetError, DeviceError
from offload.tiers.simulated import RaceError, SimulatedDevice


@pytest.fixture
def device():
    simulated = SimulatedDevice(memory=4096)
    with simulated.guard():
        yield simulated


def buffers(device):
    source = torch.arange(8, dtype=torch.uint8)
    return source, device.empty((8,), torch.uint8), device.empty((8,), torch.uint8)


def test_nothing_happens_before_its_event(device):
    source, there, _ = buffers(device)
    device.copies.copy(there, source)
    event = device.copies.record()
    assert not event.done()
    assert not torch.equal(there, source)
    event.wait()
    assert event.done()
    assert torch.equal(there, source)


def test_waiting_orders_streams_and_lets_both_go_on(device):
    source, there, result = buffers(device)
    device.copies.copy(there, source)
    device.compute.wait(device.copies.record())
    device.compute.launch(lambda: result.copy_(there + 1), reads=[there], writes=[result])
    device.compute.record().wait()
    assert torch.equal(result, source + 1)
    device.host_access(source, write=True)


def test_reading_a_slot_before_its_copy_is_over_is_a_race(device):
    source, there, _ = buffers(device)
    device.copies.copy(there, source)
    with pytest.raises(RaceError, match="read by the compute stream .* write by the copy stream"):
        device.compute.launch(lambda: None, reads=[there])


def test_overwriting_a_slot_that_a_kernel_reads_is_a_race(device):
    source, there, _ = buffers(device)
    device.compute.launch(lambda: None, reads=[there])
    with pytest.raises(RaceError, match="write by the copy stream .* read by the compute stream"):
        device.copies.copy(there, source)


@pytest.mark.parametrize("part", [slice(0, 1), slice(7, 8), slice(2, 5)])
def test_any_common_byte_counts(device, part):
    source, there, _ = buffers(device)
    device.compute.launch(lambda: None, reads=[there])
    with pytest.raises(RaceError):
        device.copies.copy(there[part], source[part])


def test_an_event_recorded_too_early_does_not_help(device):
    source, there, _ = buffers(device)
    early = device.copies.record()
    device.copies.copy(there, source)
    device.compute.wait(early)
    with pytest.raises(RaceError):
        device.compute.launch(lambda: None, reads=[there])


def test_order_passes_through_the_host(device):
    source, there, _ = buffers(device)
    device.compute.launch(lambda: None, reads=[there])
    device.compute.record().wait()
    device.copies.copy(there, source)  # the host has seen the kernel end


def test_the_host_must_not_refill_the_source_of_a_copy(device):
    source, there, _ = buffers(device)
    device.copies.copy(there, source)
    device.host_access(source, write=False)
    with pytest.raises(RaceError, match="write by the host"):
        device.host_access(source, write=True)


def test_streams_run_in_any_order_that_is_allowed():
    orders = set()
    for seed in range(20):
        device = SimulatedDevice(seed=seed)
        happened: list[str] = []
        with device.guard():
            for stream, name in ((device.compute, "a"), (device.copies, "b")):
                for number in range(2):
                    stream.launch(partial(happened.append, f"{name}{number}"))
            device.synchronize()
        orders.add(tuple(happened))
        assert [h for h in happened if h[0] == "a"] == ["a0", "a1"]
    assert len(orders) > 2


def test_memory_is_counted_and_ends(device):
    device.limit(1024)
    kept = device.empty((1000,), torch.uint8)
    assert kept.eq(255).all()
    assert device.memory() == (4096 - 1000, 4096)
    with pytest.raises(BudgetError, match="25 B cannot be allocated, 24 B are free"):
        device.empty((25,), torch.uint8)
    device.seal()
    with pytest.raises(AssertionError):
        device.empty((1,), torch.uint8)


def test_calls_outside_of_guard_and_on_a_lost_device_are_refused():
    device = SimulatedDevice()
    with pytest.raises(AssertionError, match="outside of guard"):
        device.compute.record()
    device.lost = True
    with device.guard(), pytest.raises(DeviceError, match="must be loaded again"):
        device.copies.record()
