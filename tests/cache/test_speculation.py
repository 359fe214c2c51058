"""Reads ahead in a replay: what routers applied early foretell, and what becomes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offload.cache.lookahead import LookAhead
from offload.cache.policy import CacheShape, create_policy
from offload.cache.residency import Residency
from offload.cache.simulator import replay
from offload.cache.speculation import LOOKAHEAD_LAYERS, LOOKAHEAD_READS, RIGHT, foreseen, granted, right_share
from offload.cache.trace import Trace

SHAPE = CacheShape(4, 32, 4)


def routed(tokens: int, seed: int = 0) -> Trace:
    """Some experts far more often than others, every pass of one token."""
    rng = np.random.default_rng(seed)
    heat = 1 / np.arange(1, 33) / np.sum(1 / np.arange(1, 33))
    picks = [[rng.choice(32, 4, replace=False, p=heat) for _ in range(4)] for _ in range(tokens)]
    return Trace(SHAPE, rng.integers(0, 50, tokens), np.ones(tokens, np.int32), np.array(picks, np.uint16))


def told(right: float | None, tokens: int = 200) -> Trace:
    return replace(routed(tokens), header={"foretold_right": right})


def test_early_routers_are_as_right_as_asked() -> None:
    trace = routed(300)
    assert (foreseen(trace, 1.0) == trace.experts).all()
    for right in (0.5, 0.8):
        guessed = foreseen(trace, right)
        same = (guessed == trace.experts).mean()
        assert right < same < right + 0.1 * (1 - right) / 0.2  # some wrong guesses are right by chance
        # What is wrong is right for some other token, in the same layer.
        for layer in range(4):
            assert set(guessed[:, layer].ravel()) <= set(trace.experts[:, layer].ravel())
    assert (foreseen(trace, 0.8) == foreseen(trace, 0.8)).all()


@pytest.mark.parametrize(("said", "taken"), [(0.9, 0.9), (0, 0.0), (None, RIGHT), ("x", RIGHT), (1.5, RIGHT)])
def test_a_trace_says_how_often_they_were_right(said: object, taken: float) -> None:
    assert right_share(replace(routed(3), header={"foretold_right": said})) == taken
    assert right_share(routed(3)) == RIGHT


@pytest.mark.parametrize("policy", ["ema+tokens", "lru"])
def test_reads_ahead_serve_demands_and_cost_reads(policy: str) -> None:
    plain = replay(told(1.0), policy, 64)
    assert plain.decode_ahead == 0 and plain.decode_reads == plain.decode_misses == plain.events.misses
    ahead = replay(told(1.0), policy, 64, prefetch_depth=1)
    assert 0 < ahead.decode_ahead == ahead.events.prefetch_useful
    assert ahead.decode_hits + ahead.decode_misses == plain.decode_hits + plain.decode_misses
    assert ahead.decode_reads == ahead.decode_misses + ahead.events.prefetch_issued
    # What is always right reads nothing that is not needed; what is served ahead would have been a miss.
    assert ahead.decode_misses < plain.decode_misses
    assert ahead.decode_reads == pytest.approx(plain.decode_reads, rel=0.05)
    assert replay(told(1.0), policy, 64, prefetch_depth=1).events == ahead.events


def test_bad_guesses_are_wasted_until_they_are_given_up() -> None:
    good, bad = (replay(told(right), "ema+tokens", 64, prefetch_depth=1).events for right in (0.95, 0.3))
    assert good.prefetch_useful > 2 * bad.prefetch_useful
    assert bad.prefetch_wasted / bad.prefetch_issued > 2 * good.prefetch_wasted / good.prefetch_issued
    assert bad.prefetch_issued < good.prefetch_issued


def test_passes_of_many_tokens_read_nothing_ahead() -> None:
    trace = replace(told(1.0, 64), steps=np.array([32, 32], np.int32))
    assert replay(trace, "ema", 64, prefetch_depth=1).events.prefetch_issued == 0


def test_grants_stop_at_the_room_that_is_left() -> None:
    policy = create_policy("lru", SHAPE)
    residency, lookahead = Residency(policy, 64, floor=4), LookAhead(policy, prefetch_depth=1)
    lookahead.begin_step([1])
    for layer in range(4):
        lookahead.expect(layer, [layer, layer + 1])
    found = [(layer, load.expert) for layer, load in granted(lookahead, residency, 1, 1)]
    assert found == [(1, 1), (1, 2), (2, 2)] and len(found) == LOOKAHEAD_READS - 1
    assert [layer for layer, _ in granted(lookahead, residency, 0, 2)] == [0, 0] and LOOKAHEAD_LAYERS == 3
    assert not list(granted(lookahead, Residency(policy, 4, floor=4), 0, 0))


def test_what_was_foretold_is_compared_with_what_was_chosen() -> None:
    lookahead = LookAhead(create_policy("lru", SHAPE), prefetch_depth=1)
    assert lookahead.right is None
    lookahead.begin_step([1])
    lookahead.expect(0, [1, 2, 3, 4])
    lookahead.routed(0, [4, 3, 9, 1])
    lookahead.routed(1, [1, 2, 3, 4])  # nothing was said of it
    assert lookahead.right == 0.75


def test_what_is_known_is_not_asked_for_again() -> None:
    policy = create_policy("ema+tokens", SHAPE)
    for _ in range(30):
        policy.begin_step([7])
        for layer in range(SHAPE.layers):
            policy.observe(layer, [[0, 1, 2, 3]])
    policy.begin_step([7])
    lookahead = LookAhead(policy)
    lookahead.begin_step([7])
    assert sorted(lookahead.candidates(2)) == [0, 1, 2, 3]
    lookahead.forget(lambda layer, expert: layer != 2 or expert > 1)
    assert [sorted(lookahead.candidates(layer)) for layer in range(SHAPE.layers)] == [[], [], [0, 1], []]
    assert not lookahead.idle
    lookahead.expect(3, [9])
    lookahead.forget(lambda layer, expert: True)
    assert lookahead.candidates(3) == [9] and lookahead.candidates(2) == []
    lookahead.begin_step([7])
    lookahead.forget(lambda layer, expert: True)
    assert lookahead.idle
