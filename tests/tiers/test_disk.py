"""The disk tier delivers exactly the bytes of the extent, in order of urgency, or says why not."""

from __future__ import annotations

import logging
import os
import random
import shutil
import threading
import time
from dataclasses import replace

import pytest
from paging_samples import Unruly, make_store

from offload.errors import DiskError
from offload.tiers.aio import KernelReads, needs_no_caller
from offload.tiers.disk import DiskReader
from offload.tiers.host import SlotPool
from offload.tiers.reads import Read
from offload.types import ExpertId, Extent


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), lead=840)


@pytest.fixture
def readers():
    """Makes readers and closes them."""
    made = []

    def make(**options):
        made.append(DiskReader(**{"threads": 4, "part_nbytes": 4096, "backoff_s": 0.0005} | options))
        return made[-1]

    yield make
    for reader in made:
        if isinstance(reader._system, Unruly):
            reader._system.gate.set()
        reader.close()


def read_all(reader, store, pool, layer=2):
    """Read all experts of a layer at once, check the bytes, return the reads."""
    reads = {}
    for expert in range(12):
        extent = store.locate(ExpertId(layer, expert))
        reads[Read(extent, pool.buffer(expert), f"expert {expert} of layer {layer}", tag=expert)] = expert
    reader.submit(list(reads))
    ended = []
    while read := reader.completed():
        ended.append(read)
        expert = reads.pop(read)
        if read.error is None:
            data = bytes(read.buffer[read.skip : read.skip + read.extent.nbytes])
            assert data == store.bytes_of(ExpertId(layer, expert))
    assert not reads
    assert reader.idle
    return ended


def slots(store):
    return SlotPool(12, store.layout.stride + 2 * 4096)


@pytest.fixture(params=[False, True], ids=["threads", "kernel"])
def kernel(request):
    """Whether the kernel reads by itself; on a system without such reads there is nothing to test."""
    if request.param:
        try:
            KernelReads(1).close()
        except OSError as error:
            pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize(
    "misbehaviour",
    [
        {},
        {"delay_s": 0.01},
        {"short": 0.4, "delay_s": 0.002, "seed": 3},
        {"fail": 0.2, "seed": 5},
        {"refuse": "open"},
        {"refuse": "read", "short": 0.3},
        {"refuse": "submit", "short": 0.2, "fail": 0.2, "delay_s": 0.002},
    ],
    ids=["plain", "slow", "short", "eio", "no-direct-open", "no-direct-read", "few-taken"],
)
def test_every_extent_arrives_whole(store, readers, misbehaviour, kernel):
    pool = slots(store)
    system = Unruly(kernel=kernel, **misbehaviour)
    reader = readers(system=system)
    for _ in range(3):
        assert all(read.error is None for read in read_all(reader, store, pool))
    counters = reader.snapshot()
    assert counters.reads == 36
    assert counters.bytes_read == 36 * store.layout.stride
    assert counters.busy_s > 0
    refused = kernel and system.refuse == "read"  # by the kernel, after which a thread falls back
    assert (counters.retries > 0) == bool(system.short or system.fail or refused)
    assert bool(system.kernel_calls) == (kernel and system.refuse != "open")
    assert bool(system.calls) == (not kernel or misbehaviour not in ({}, {"delay_s": 0.01}))


@pytest.mark.parametrize("refuse", ["open", "read"])
def test_the_slow_path_is_announced_once(store, readers, refuse, kernel, caplog):
    with caplog.at_level(logging.WARNING, "expertpager"):
        reader = readers(system=Unruly(refuse=refuse, kernel=kernel))
        read_all(reader, store, slots(store))
        read_all(reader, store, slots(store), layer=1)
    assert len(caplog.records) == 1
    assert "direct I/O is refused" in caplog.text


def test_aligned_extents_are_cut_for_queue_depth(tmp_path, readers, kernel):
    store = make_store(tmp_path, codec="bf16", hidden=128, lead=4096)
    assert store.layout.stride % 8192 == 0
    system = Unruly(kernel=kernel)
    reader = readers(system=system, part_nbytes=8192)
    read_all(reader, store, SlotPool(12, store.layout.stride))
    calls = system.kernel_calls if kernel else system.calls
    assert len(calls) == 12 * store.layout.stride // 8192
    assert {nbytes for _, nbytes in calls} == {8192}


def test_a_file_that_ends_early_is_an_error_that_names_everything(store, readers, tmp_path):
    store = replace(store, path=shutil.copytree(store.path, tmp_path / "copy"))
    path = store.path / "2.bin"
    with path.open("r+b") as file:
        file.truncate(store.locate(ExpertId(2, 7)).offset + 100)
    pool = slots(store)
    reader = readers()
    failed = []
    for slot in range(12):
        extent = store.locate(ExpertId(2, slot))
        reader.submit([Read(extent, pool.buffer(slot), f"expert {slot} of layer 2", tag=slot)])
        read = reader.completed()
        if read.error:
            failed.append(slot)
            assert isinstance(read.error, DiskError)
            for part in (str(path), f"expert {slot} of layer 2", str(extent.offset), "bytes arrived", "verify"):
                assert part in str(read.error)
    assert failed == [7, 8, 9, 10, 11]


def test_a_broken_drive_fails_and_recovers(store, readers, kernel):
    system = Unruly(kernel=kernel)
    reader = readers(system=system)
    pool = slots(store)
    system.broken.add(str(store.path / "2.bin"))
    errors = [read.error for read in read_all(reader, store, pool)]
    assert all(isinstance(error, DiskError) for error in errors)
    assert "Input/output error" in str(errors[0])
    assert all(read.error is None for read in read_all(reader, store, pool, layer=1))
    system.broken.clear()
    assert all(read.error is None for read in read_all(reader, store, pool))


def test_a_missing_file_is_not_tried_again(store, readers, tmp_path):
    reader = readers()
    pool = slots(store)
    read = Read(Extent(tmp_path / "none.bin", 0, 4096), pool.buffer(0), "expert 0 of layer 9")
    reader.submit([read])
    assert reader.completed() is read
    assert "No such file" in str(read.error)
    assert reader.snapshot().retries == 0


def test_demand_overtakes_prefetch_and_prefetch_can_be_withdrawn(store, readers, kernel):
    system = Unruly(kernel=kernel)
    system.gate.clear()
    reader = readers(system=system, threads=1, part_nbytes=1 << 20)
    pool = slots(store)

    def read(expert):
        return Read(store.locate(ExpertId(1, expert)), pool.buffer(expert), str(expert), tag=expert)

    reader.submit([read(0)])
    while reader.queued_parts:
        time.sleep(0.001)
    ahead = [read(expert) for expert in (1, 2, 3)]
    assert all(reader.prefetch(item) for item in ahead)
    demands = [read(expert) for expert in (4, 5)]
    reader.submit(demands)
    assert reader.cancel(ahead[1])
    assert not reader.cancel(ahead[1])
    assert not reader.cancel(demands[0])
    reader.promote(ahead[2])
    system.gate.set()
    order = []
    while item := reader.completed():
        order.append(item.tag)
    assert order == [0, 4, 5, 3, 1]
    assert not reader.cancel(ahead[0])


def test_the_prefetch_queue_is_bounded(store, readers, kernel):
    system = Unruly(kernel=kernel)
    system.gate.clear()
    reader = readers(system=system, threads=1, prefetch_limit=2, part_nbytes=1 << 20)
    pool = slots(store)
    taken = [reader.prefetch(Read(store.locate(ExpertId(1, e)), pool.buffer(e), str(e), tag=e)) for e in range(8)]
    assert 2 <= sum(taken) <= 3
    system.gate.set()
    assert len(list(iter(reader.completed, None))) == sum(taken)


def test_a_mirror_shares_the_load_and_covers_for_the_first_copy(store, readers, tmp_path, kernel):
    mirror = shutil.copytree(store.path, tmp_path / "mirror")
    system = Unruly(delay_s=0.003, kernel=kernel)
    reader = readers(system=system, mirror=mirror)
    assert all(read.error is None for read in read_all(reader, store, slots(store)))
    assert set(system.names.values()) == {str(store.path / "2.bin"), str(mirror / "2.bin")}
    system.broken.add(str(store.path / "2.bin"))
    assert all(read.error is None for read in read_all(reader, store, slots(store)))
    system.broken.add(str(mirror / "2.bin"))
    assert all(read.error is not None for read in read_all(reader, store, slots(store)))


def test_reads_can_be_abandoned_and_the_reader_used_again(store, readers, kernel):
    pool = slots(store)
    reader = readers(system=Unruly(delay_s=0.003, kernel=kernel, seed=2))
    for round in range(10):
        reads = [Read(store.locate(ExpertId(1, e)), pool.buffer(e), str(e), tag=e) for e in range(12)]
        reader.submit(reads)
        for _ in range(round):
            reader.completed()
        reader.abandon()
        assert reader.idle and reader.completed() is None and reader.completed(wait=False) is None
        assert all(read.error is None for read in read_all(reader, store, pool))


def test_an_interrupt_anywhere_leaves_a_reader_that_can_go_on(store, readers, kernel, interrupted):
    pool = slots(store)
    reader = readers(system=Unruly(kernel=kernel), threads=2)

    def run():
        extents = [store.locate(ExpertId(1, expert)) for expert in range(4)]
        reads = [Read(extent, pool.buffer(slot), str(slot), tag=slot) for slot, extent in enumerate(extents)]
        reader.prefetch(reads[0])
        reader.submit(reads[1:])
        reader.promote(reads[0])
        while reader.completed():
            pass

    at = 1
    while interrupted(run, at, "/offload/tiers/"):
        reader.abandon()
        assert all(read.error is None for read in read_all(reader, store, pool))
        at += 1 if at < 150 else 7
    assert at > 100, "the lines that were interrupted are those of the reader"


def test_reads_that_nobody_waits_for_end_all_the_same(store, readers, kernel):
    pool = slots(store)
    reader = readers(system=Unruly(kernel=kernel), threads=2)
    reader.submit([Read(store.locate(ExpertId(1, e)), pool.buffer(e), str(e), tag=e) for e in range(12)])
    until = time.monotonic() + 10
    while reader.snapshot().reads < 12:  # asking whether it is idle would take their ends
        assert time.monotonic() < until
        time.sleep(0.001)
    ended = [reader.completed(wait=False) for _ in range(13)]
    assert sorted(read.tag for read in ended[:12]) == list(range(12)) and ended[12] is None
    assert reader.snapshot().busy_s < 10


def test_closing_ends_every_thread(store, readers, kernel):
    before = threading.active_count()
    for threads in (1, 4):
        reader = readers(system=Unruly(kernel=kernel, fail=0.3), threads=threads)
        read_all(reader, store, slots(store))
        reader.submit([Read(store.locate(ExpertId(1, 0)), slots(store).buffer(0), "0", tag=0)])
        reader.close()
        reader.close()
    assert threading.active_count() == before


def test_files_that_would_stop_the_caller_are_left_to_threads():
    fd = os.open("/proc/version", os.O_RDONLY)
    try:
        assert not needs_no_caller(fd)
    finally:
        os.close(fd)


def test_slots_are_separate_aligned_and_resident():
    pool = SlotPool(5, 5000)
    assert pool.stride == 8192
    assert pool.nbytes == 5 * 8192
    rng = random.Random(0)
    data = [rng.randbytes(8192) for _ in range(5)]
    for slot in range(5):
        assert pool.tensor(slot).data_ptr() % 4096 == 0
        pool.buffer(slot)[:] = data[slot]
    assert [bytes(pool.tensor(slot).numpy()) for slot in range(5)] == data
