"""Trace files: what is written is read, what is broken is refused; a replay repeats a run."""

from __future__ import annotations

import errno
import json
import math
import random
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from routing_samples import SHAPE, routing

import cli
from offload.cache.policy import CacheShape, create_policy
from offload.cache.report import simulate
from offload.cache.residency import Residency
from offload.cache.simulator import Machine, Replay, replay, sweep
from offload.cache.trace import Prefetch, Trace, TraceRecorder
from offload.errors import DiskError, UsageError


def recorded(steps: int = 12, seed: int = 0) -> Trace:
    recorder = TraceRecorder(SHAPE)
    recorder.begin_session()
    chunk = routing(1, seed, tokens=9)
    for number, step in enumerate(chunk + routing(steps, seed)):
        recorder.begin_step([number] * len(step[0]))
        for layer, ids in enumerate(step):
            recorder.route(layer, ids)
    return recorder.trace(model="tiny")


def test_round_trip(tmp_path):
    trace = recorded()
    trace.save(tmp_path / "t.npz")
    again = Trace.load(tmp_path / "t.npz")
    assert again.shape == trace.shape
    assert again.header["model"] == "tiny"
    assert np.array_equal(again.experts, trace.experts)
    assert np.array_equal(again.tokens, trace.tokens)
    assert list(again.passes()) == list(trace.passes())
    passes = list(again.passes())
    assert [len(tokens) for tokens, _ in passes] == [9] + [1] * 12
    assert passes[1][1] == routing(12, 0)[0]


def test_an_interrupted_step_is_left_out():
    recorder = TraceRecorder(SHAPE)
    recorder.begin_step([1])
    for layer, ids in enumerate(routing(1, 0)[0]):
        recorder.route(layer, ids)
    recorder.begin_step([2])
    recorder.route(0, [[0, 1, 2, 3]])
    assert recorder.trace().tokens.tolist() == [1]


def test_a_trace_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "t.npz"
    (tmp_path / "real.npz").touch()
    path.symlink_to("real.npz")
    recorded().save(path)
    before = path.read_bytes()
    assert path.is_symlink() and Trace.load(path).header["model"] == "tiny"

    def full(file, **_):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full)
        with pytest.raises(DiskError, match=r"t\.npz cannot be written: No space left"):
            recorded().save(path)
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["real.npz", "t.npz"]
    with pytest.raises(DiskError, match="/dev/full cannot be written: No space left"):
        recorded().save("/dev/full")


def rewrite(path, **changes):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays["header"].tobytes()) | changes.pop("header", {})
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    for name, value in changes.items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": {"version": 9}}, "version 9"),
        ({"header": {"format": "other"}}, "header"),
        ({"header": {"experts": 4}}, "experts holds .* not from 0 to 3"),
        ({"experts": -np.ones((21, 5, 4), np.int32)}, "experts holds -1"),
        ({"sessions": np.array([0, 14], np.int32)}, "sessions holds 14"),
        ({"sessions": np.zeros((1, 1), np.int32)}, "sessions has shape"),
        ({"prefetches": np.array([[0, 0, 7, 0, 0]], np.int32)}, "kind of prefetches holds 7"),
        ({"prefetches": np.array([[0, 0, 0, 5, 0]], np.int32)}, "layer of prefetches holds 5"),
        ({"header": {"layers": 0}}, "layers"),
        ({"header": {"top_k": 5}}, "shape"),
        ({"tokens": np.zeros(3, np.int32)}, "shape"),
        ({"steps": np.ones(5, np.int32)}, "5 of 21"),
        ({"experts": None}, "no experts"),
        ({"experts": np.zeros((21, 5, 4), np.uint16)}, "twice"),
        ({"experts": np.zeros((21, 5, 4), np.float32)}, "integers"),
        ({"prefetches": np.zeros((2, 3), np.int32)}, "prefetches"),
        ({"header": {"experts": 10**9}}, "experts and top_k are .*1000000000"),
        ({"header": {"layers": True}}, "layers, experts and top_k are"),
        ({"header": {"expert_bytes": "many"}}, "expert_bytes of its header is 'many'"),
        ({"header": {"expert_bytes": math.nan}}, "expert_bytes"),
        ({"header": {"expert_bytes": -1}}, "expert_bytes"),
        ({"header": {"slots": 1.5}}, "slots of its header is 1.5"),
        ({"header": {"half_life": 0}}, "half_life of its header is 0"),
        ({"header": {"half_life": 10**400}}, "half_life"),
        ({"header": {"policy": ["lru"]}}, "policy of its header"),
        ({"tokens": np.full(21, 2**40)}, "tokens holds 1099511627776"),
        ({"tokens": np.full(21, -1)}, "tokens holds -1"),
        ({"tokens": np.int32(21)}, "tokens has shape"),
        ({"steps": np.int32(21)}, "steps must be a row"),
        ({"steps": np.array([2**62, 2**62, 2**62, 2**62 + 21])}, "18446744073709551637 of 21"),
        ({"sessions": np.array([3, 0], np.int32)}, "sessions does not rise"),
    ],
)
def test_malformed_traces_are_refused(tmp_path, changes, message):
    path = tmp_path / "t.npz"
    recorded().save(path)
    rewrite(path, **changes)
    with pytest.raises(UsageError, match=message) as caught:
        Trace.load(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_trace(tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(UsageError, match="no trace"):
        Trace.load(path)
    path.write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(UsageError, match="not a"):
        Trace.load(path)
    recorded().save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UsageError, match="not a"):
        Trace.load(path)


def test_a_damaged_trace_is_told_whatever_is_damaged(tmp_path):
    path = tmp_path / "t.npz"
    trace = recorded()
    trace.save(path)
    whole, draw = path.read_bytes(), random.Random(0)
    refused = []
    for _ in range(150):  # bytes of the archive itself, of zlib's streams, of numpy's headers
        at = draw.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        try:
            assert np.array_equal(Trace.load(path).experts, trace.experts)
        except UsageError as fault:
            refused.append(str(fault))
    assert len(refused) > 50 and all(str(path) in text and "\n" not in text for text in refused)


def test_other_files_of_arrays(tmp_path):
    path = tmp_path / "t.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UsageError, match="no .npz file"):
        Trace.load(path)
    with path.open("wb") as file:
        np.savez(file, tokens=np.array([{}], object))
    with pytest.raises(UsageError, match="allow_pickle"):
        Trace.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header", b"hello")
    with pytest.raises(UsageError, match="its part header is no array"):
        Trace.load(path)
    recorded().save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **arrays | {"header": np.frombuffer(b"[" * 100_000, np.uint8)})
    with pytest.raises(UsageError, match="not a usable"):
        Trace.load(path)


@pytest.mark.parametrize("policy", ["lru", "lfu", "ema", "ema+tokens", "belady"])
def test_a_replay_repeats_the_events_of_the_run(policy, tmp_path):
    trace = recorded(30, seed=4)
    options = {"future": [r for _, r in trace.passes()]} if policy == "belady" else {}
    live = Residency(create_policy(policy, SHAPE, **options), 33, floor=4)
    driver = Replay(live)
    for tokens, layers in trace.passes():
        live.begin_step(tokens)
        for layer, ids in enumerate(layers):
            driver.layer(layer, ids)
    trace.save(tmp_path / "t.npz")
    result = replay(Trace.load(tmp_path / "t.npz"), policy, 33)
    assert result.events == live.events
    assert result.events.misses > 50
    assert result.events.evictions > 0


@pytest.mark.parametrize("policy", ["ema", "ema+tokens"])
def test_a_replay_has_the_half_life_of_the_run(policy, tmp_path):
    run = recorded(60, seed=4)
    own, short = replay(run, policy, 33), replay(run, policy, 33, half_life=1.5)
    assert own.events != short.events and short.settings["half_life"] == 1.5
    for header, expected in (({"half_life": 1.5}, short), ({}, own), ({"half_life": None}, own)):
        run.header = {"policy": policy, "slots": 33} | header
        run.save(tmp_path / "t.npz")
        trace = Trace.load(tmp_path / "t.npz")
        assert replay(trace, policy, 33).events == expected.events
        assert replay(trace, policy, 33, half_life=1.5).events == short.events
        assert replay(trace, policy, 33, half_life=None).events == own.events
        (again,) = simulate(tmp_path / "t.npz", policies=[policy], sizes=[33]).results
        assert again.events == expected.events
        # It is no other policy's.
        assert replay(trace, "lru", 33).events == replay(recorded(60, seed=4), "lru", 33).events


@pytest.mark.parametrize("recorded_with", [None, 8.0])
def test_simulate_takes_a_half_life_for_all_that_have_one(recorded_with, tmp_path):
    run = recorded(60, seed=4)
    run.header = {"policy": "ema", "slots": 33, "half_life": recorded_with}
    run.save(tmp_path / "t.npz")
    asked = simulate(tmp_path / "t.npz", policies=["lru", "ema", "ema+tokens"], sizes=[33], half_life=1.5)
    assert [result.settings["half_life"] for result in asked.results] == [None, 1.5, 1.5]
    for result in asked.results[1:]:
        assert result.events == replay(run, result.policy, 33, half_life=1.5).events
    plain = simulate(tmp_path / "t.npz", policies=["ema", "ema+tokens"], sizes=[33]).results
    assert [result.settings["half_life"] for result in plain] == [recorded_with or 32.0, 60.0]
    assert plain[0].events != asked.results[1].events
    with pytest.raises(UsageError, match="--slots 121: it must be 1 to 120"):  # a billion took all memory
        simulate(tmp_path / "t.npz", sizes=[33, 121])
    twice = simulate(tmp_path / "t.npz", policies=["lru", "lru"], sizes=[33, 33]).results
    assert [(result.policy, result.slots) for result in twice] == [("lru", 33)]
    with pytest.raises(UsageError, match="lru has none"):
        simulate(tmp_path / "t.npz", policies=["lru", "lfu"], half_life=1.5)
    with pytest.raises(UsageError, match="number of tokens"):
        simulate(tmp_path / "t.npz", half_life=-1.0)
    arguments = ["--policy", "ema", "--slots", "33", "--half-life", "1.5", "--json"]
    done = CliRunner().invoke(cli.cli, ["simulate", str(tmp_path / "t.npz"), *arguments])
    (told,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert told["half_life"] == 1.5 and told["misses"] == asked.results[1].events.misses


def test_reads_ahead_are_repeated_with_the_recorded_half_life_only():
    run = recorded(20)
    run.prefetches = [Prefetch(1, 0, kind, 2, 23) for kind in (0, 1)]
    for header, half_life in (({"half_life": 8}, 8), ({}, 32.0)):
        run.header = {"policy": "ema", "slots": 33} | header
        issued = {h: replay(run, "ema", 33, half_life=h).events.prefetch_issued for h in (8, 9, 32.0)}
        assert issued == {h: int(h == half_life) for h in (8, 9, 32.0)}


def test_simulated_time_adds_up():
    trace = recorded(40, seed=1)
    machine = Machine(expert_bytes=1000, drive_bytes_per_s=1e6, drive_latency_s=0.0, memory_bytes_per_s=1e9)
    few, many = sweep(trace, ["lru"], [30, 120], machine=machine)
    assert few.bytes_read == 1000 * few.events.misses
    assert many.events.evictions == 0
    compute = 1e-6 * (few.events.hits + few.events.misses)
    assert few.time_s == pytest.approx(few.stall_s + compute)
    assert few.stall_s > many.stall_s > 0
    # The drive works all the time that nothing else is left to do, and never faster than it can.
    assert few.events.misses * 1e-3 >= few.stall_s
    assert few.time_s >= few.events.misses * 1e-3
    assert json.dumps(few.as_dict())


def test_shape_of_a_replay_follows_the_trace():
    trace = recorded(3)
    assert trace.shape == CacheShape(5, 24, 4)
    result = replay(trace, "ema", 500)
    assert result.events.evictions == 0
    assert result.tokens == 12


def test_a_grid_is_told_as_table_values_and_page(tmp_path):
    recorded(20).save(tmp_path / "t.npz")
    report = simulate(tmp_path / "t.npz", policies=["lru", "ema+tokens", "belady"], sizes=[30, 60])
    lines = list(report.lines())
    assert [line.split()[:2] for line in lines[2:]] == [
        [policy, str(size)] for policy in ("lru", "ema+tokens", "belady") for size in (30, 60)
    ]
    results = report.to_dict()["results"]
    assert len(results) == 6
    best = {r["slots"]: r["hit_rate"] for r in results if r["policy"] == "belady"}
    assert all(r["hit_rate"] <= best[r["slots"]] for r in results)
    page = report.page().html()
    assert page.count("<svg") == 3
    for result in results:
        assert f"{result['hit_rate']:.1%}" in page
