"""The usage file warms a start, and never gets in its way."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from offload.cache.expected_use import ExpectedUse
from offload.cache.lookahead import EARLY_ROUTERS, LookAhead, LookAheadLimits
from offload.cache.policy import CacheShape, create_policy
from offload.cache.usage import load_usage, save_usage

SHAPE = CacheShape(layers=3, experts=16, top_k=2)


def trained(policy="ema+tokens"):
    made = create_policy(policy, SHAPE)
    for token in [1, 2, 3, 1, 2, 3, 1]:
        made.begin_step([token])
        for layer in range(3):
            made.observe(layer, [[token + layer, token + 5]])
    return made


@pytest.mark.parametrize("policy", ["ema", "ema+tokens"])
def test_round_trip(tmp_path, policy):
    first = trained(policy)
    assert save_usage(first, tmp_path / "u", "m")
    again = create_policy(policy, SHAPE)
    assert load_usage(again, tmp_path / "u", "m")
    ours, theirs = again.state(), first.state()
    for name in theirs:
        assert np.array_equal(ours[name], theirs[name])
    assert [p.name for p in tmp_path.iterdir()] == ["u"]


def test_a_damaged_file_never_stops_a_run(tmp_path, caplog):
    path = tmp_path / "u"
    save_usage(trained(), path, "m")
    whole, loaded = path.read_bytes(), []
    for at in range(0, len(whole), 41):  # bytes of the archive itself, of zlib's streams, of numpy's headers
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        loaded.append(load_usage(ExpectedUse(SHAPE), path, "m"))
    assert loaded.count(False) > len(loaded) // 3 and len(caplog.records) == loaded.count(False)


def test_what_does_not_fit_is_ignored_with_a_notice(tmp_path, caplog):
    path = tmp_path / "u"
    fresh = ExpectedUse(SHAPE)
    before = fresh.values.copy()

    def ignored(reason: str) -> None:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "expertpager"):
            assert not load_usage(fresh, path, "m")
        assert (reason in caplog.text) if reason else not caplog.records
        assert np.array_equal(fresh.values, before)

    ignored("")
    save_usage(trained(), path, "other")
    ignored("another model")
    save_usage(trained("ema"), path, "m")
    ignored("another model, policy")
    save_usage(trained(), path, "m")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    ignored("is ignored")
    path.write_bytes(b"something else")
    ignored("is ignored")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    ignored("no .npz file")
    path.write_bytes(whole)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    with path.open("wb") as file:
        np.savez(file, **arrays | {"rates": arrays["rates"][:, :, :5]})
    ignored("rates")
    with path.open("wb") as file:
        np.savez(file, **arrays | {"recall_ids": arrays["recall_ids"][1:]})
    ignored("remembered tokens")
    with path.open("wb") as file:
        np.savez(file, **arrays | {"recall_ids": arrays["recall_ids"] + np.uint8(9)})
    ignored("remembered tokens")
    header = json.loads(arrays["header"].tobytes()) | {"version": 99}
    with path.open("wb") as file:
        np.savez(file, **arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)})
    ignored("version")


def test_a_place_that_cannot_be_written_is_reported(tmp_path, caplog):
    (tmp_path / "none").write_text("a file where a folder is needed")
    with caplog.at_level(logging.WARNING, "expertpager"):
        assert not save_usage(trained(), tmp_path / "none" / "u", "m")
    assert "cannot be kept" in caplog.text
    assert not save_usage(create_policy("lru", SHAPE), tmp_path / "u", "m")


def test_routers_are_applied_early_only_while_experts_are_missing():
    ahead = LookAhead(trained())
    absent = 0

    def steps(count, missing, tokens=(1,)):
        nonlocal absent
        for _ in range(count):
            ahead.begin_step(tokens, absent)
            absent += missing
        ahead.begin_step([1], absent)
        return ahead.early_routers

    assert steps(1, 0) == EARLY_ROUTERS  # one step says little
    assert steps(30, 0) == 0
    assert steps(30, SHAPE.layers) == EARLY_ROUTERS
    assert steps(30, 0) == 0
    assert steps(3, 100 * SHAPE.layers, tokens=(1, 2)) == 0  # what a prefill misses says nothing about decoding
    unknown = LookAhead(trained())
    for _ in range(30):
        unknown.begin_step([1])
    assert unknown.early_routers == EARLY_ROUTERS


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_routers_are_applied_as_far_ahead_as_asked_for(depth):
    policy = trained()
    policy.begin_step([9])
    ahead = LookAhead(policy, LookAheadLimits(start=0.5), prefetch_depth=depth)
    ahead.begin_step([1])
    assert ahead.early_routers == depth
    assert ahead.candidates(1) == [2, 6]  # the token table does not depend on it


def test_speculation_asks_for_more_and_gives_up_when_wasted():
    policy = trained()
    policy.begin_step([9])
    ahead = LookAhead(policy, LookAheadLimits(start=0.5, step=0.2, last=0.7, useful=0.9, sample=10))
    ahead.begin_step([1])
    assert ahead.candidates(1) == [2, 6]
    assert ahead.candidates(3) == []
    ahead.expect(2, [11, 6])
    assert ahead.candidates(2) == [11, 6, 3]
    ahead.outcome(useful=5, wasted=4)  # too few to judge
    ahead.outcome(useful=10, wasted=0)
    assert ahead.candidates(1)
    ahead.outcome(useful=15, wasted=5)
    assert ahead.off_reason is None
    assert ahead.candidates(2) == [11, 3, 6]  # of an early router's choice only the first still count
    ahead.outcome(useful=20, wasted=10)
    assert ahead.off_reason == "prefetch switched off: only 50% of the last 10 reads ahead were used"
    assert ahead.candidates(2) == []
    costly = LookAhead(policy, LookAheadLimits(useful=0.5, waste=0.1, sample=10))
    for reads in (100, 150, 160, 170, 180, 190):  # from the second on more than a tenth of all reads is wasted
        costly.outcome(useful=reads - 90, wasted=(reads - 90) // 2, reads=reads)
    assert costly.off_reason is not None and "% of all reads were wasted" in costly.off_reason
    unseen = LookAhead(policy)
    unseen.begin_step([77])
    assert unseen.candidates(0) == []
    many = LookAhead(policy)
    many.begin_step([1, 2])
    assert many.candidates(0) == []
