"""The default policy learns what follows what, and keeps it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from offload.cache.expected_use import ExpectedUse, Weights
from offload.cache.policy import CacheShape, DecayedFrequency, create_policy
from offload.cache.predictor import Successors, TokenTable
from offload.cache.residency import Residency
from offload.cache.simulator import Replay

SHAPE = CacheShape(layers=4, experts=64, top_k=3)


def scripted(tokens: list[int], seed: int = 0) -> list[list[list[int]]]:
    """[T][L][K]: mostly what the token id calls for, sometimes anything."""
    rng = random.Random(seed)
    wanted = {}
    steps = []
    for token in tokens:
        layers = []
        for layer in range(SHAPE.layers):
            key = (token, layer)
            wanted.setdefault(key, random.Random(1000 * token + layer).sample(range(SHAPE.experts), 3))
            chosen = wanted[key] if rng.random() < 0.9 else rng.sample(range(SHAPE.experts), 3)
            layers.append(list(chosen))
        steps.append(layers)
    return steps


def hits(policy, tokens, steps, slots, lookahead=False) -> int:
    residency = Residency(policy, slots, floor=3)
    replay = Replay(residency)
    for number, (token, layers) in enumerate(zip(tokens, steps, strict=True)):
        residency.begin_step([token], tokens[number + 1 : number + 2] if lookahead else ())
        for layer, ids in enumerate(layers):
            replay.layer(layer, [ids])
        residency.check()
    return residency.events.hits


def test_known_token_ids_are_worth_more_than_frequency_alone():
    rng = random.Random(3)
    tokens = [rng.randrange(12) for _ in range(400)]
    steps = scripted(tokens)
    plain = hits(DecayedFrequency(SHAPE), tokens, steps, 40)
    known = hits(ExpectedUse(SHAPE), tokens, steps, 40, lookahead=True)
    assert known > 1.06 * plain


def test_what_follows_is_learned_without_knowing_the_next_token():
    rng = random.Random(4)
    # Tokens 2n and 2n + 1 come together and want the same experts: keep them after 2n, drop them after 2n + 1.
    tokens = [token for _ in range(200) for n in [rng.randrange(30)] for token in (2 * n, 2 * n + 1)]
    steps = scripted([token // 2 for token in tokens])
    plain = hits(DecayedFrequency(SHAPE), tokens, steps, 14)
    learned = hits(ExpectedUse(SHAPE), tokens, steps, 14)
    assert learned > 1.06 * plain


def test_the_token_table_matches_exact_counts_while_everything_fits():
    table = TokenTable(SHAPE, capacity=8, width=64)
    rng = random.Random(0)
    exact = np.zeros((SHAPE.layers, SHAPE.experts))
    for _ in range(40):
        ids = np.array([rng.sample(range(64), 3) for _ in range(SHAPE.layers)])
        table.learn(7, ids)
        np.add.at(exact, (np.arange(SHAPE.layers)[:, None], ids), 1.0)
    rate = np.full((SHAPE.layers, SHAPE.experts), 3 / 64, np.float32)
    lift = np.zeros((SHAPE.layers, SHAPE.experts), np.float32)
    assert table.add_lift(lift, 7, rate, 2.0)
    assert lift == pytest.approx(2.0 * (exact - 40 * rate) / 44, abs=1e-5)
    assert not table.add_lift(lift, 9, rate, 2.0)
    likely = table.likely(7)
    assert likely[2][0][1] == exact[2].max() / 41
    assert dict(likely[2]) == {e: c / 41 for e, c in enumerate(exact[2]) if c}
    assert table.likely(8) == []


def test_the_token_table_keeps_the_frequent_and_forgets_the_oldest_ids():
    table = TokenTable(SHAPE, capacity=2, width=4)
    rng = random.Random(1)
    for _ in range(300):  # passes the limit of a byte
        ids = np.array([[0, 1, rng.randrange(2, 64)] for _ in range(SHAPE.layers)])
        table.learn(5, ids)
    assert {e for e, _ in table.likely(5)[3][:2]} == {0, 1}
    assert table.likely(5)[3][0][1] > 0.9
    table.learn(6, ids)
    table.learn(5, ids)
    table.learn(7, ids)
    assert table.likely(6) == []
    assert table.likely(5)


@pytest.mark.parametrize("capacity", [5, 40, 200])  # fewer rows than a chunk has ids, rows that are taken, rows for all
@pytest.mark.parametrize("experts", [64, 300])
def test_a_chunk_fills_the_token_table_as_its_tokens_one_by_one(capacity, experts):
    shape = CacheShape(layers=4, experts=experts, top_k=3)
    one, chunk = TokenTable(shape, capacity, width=5), TokenTable(shape, capacity, width=5)
    rng = random.Random(capacity)
    for length in (1, 30, 700, 300):
        tokens = [int(rng.paretovariate(1.0)) % 60 for _ in range(length)]  # some come hundreds of times
        steps = [[rng.sample(range(token % 7, token % 7 + 9), 3) for _ in range(4)] for token in tokens]
        for token, ids in zip(tokens, steps, strict=True):
            one.learn(token, np.array(ids))
        chunk.learn_all(tokens, np.array(steps))
        ours, theirs = chunk.state(), one.state()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert capacity < 40 or theirs["seen"].max() > 100
    assert (theirs["counts"] > 1).any()


def test_successors_correct_every_prediction_by_the_delta_rule():
    successors = Successors(SHAPE)
    rng = random.Random(2)
    steps = [[rng.sample(range(64), 3) for _ in range(SHAPE.layers)] for _ in range(30)]
    rate = np.full((SHAPE.layers, 64), 3 / 64, np.float32)
    weights = np.zeros((SHAPE.layers, successors.sources, 64, 64))
    rank = [1.0, 1.0 - 0.5 / 3, 1.0 - 1.0 / 3]

    def sources(layer, step):
        return [(s, step[layer - s][j], rank[j]) for s in range(min(successors.sources, layer + 1)) for j in range(3)]

    def predict(layer, step):
        return sum(weight * weights[layer, s, i] for s, i, weight in sources(layer, step))

    lifts = [[predict(layer, steps[0]) for layer in range(SHAPE.layers)]]
    for seen, (before, after) in enumerate(itertools.pairwise(steps)):
        part = 0.003 + 0.017 / (1 + seen / 1000)
        lifts.append([predict(layer, after) for layer in range(SHAPE.layers)])  # given before `after` is learned from
        for layer in range(SHAPE.layers):
            error = np.isin(np.arange(64), after[layer]) - rate[layer] - lifts[-2][layer]
            for s, i, weight in sources(layer, before):
                weights[layer, s, i] += part * weight * error
    for step, expected in zip(steps, lifts, strict=True):
        for layer, ids in enumerate(step):
            assert successors.lift(layer, ids) == pytest.approx(expected[layer], abs=1e-5)
        successors.learn(np.array(step), rate)
    assert np.abs(lifts[-1]).max() > 1e-3


def test_sources_that_say_the_same_share_what_they_say():
    successors = Successors(CacheShape(2, 16, 1))
    rate = np.full((2, 16), 1 / 16, np.float32)
    for n in range(3000):
        ids = [[n % 8], [n % 8]]
        for layer in range(2):
            successors.lift(layer, ids[layer])
        successors.learn(np.array(ids), rate)
    for layer in range(2):  # layer 1 hears it from both layers, and still no more than once
        lift = successors.lift(layer, [3])
        assert lift[4] + 1 / 16 == pytest.approx(1.0, abs=0.05)
        assert np.abs(np.delete(lift, 4) + 1 / 16).max() < 0.05


def test_layers_of_a_large_model_take_turns():
    large = Successors(CacheShape(layers=34, experts=256, top_k=2))
    rate = np.full((34, 256), 2 / 256, np.float32)
    assert large.nbytes > 16 << 20
    changed = np.zeros(34, int)
    for _ in range(10):
        for layer in range(34):
            large.lift(layer, [layer, layer + 1])
        before = large.weights.copy()
        large.learn(np.array([[layer, layer + 1] for layer in range(34)]), rate)
        changed += (large.weights != before).any((1, 2))
    # Nine of ten tokens have one before them, and eight groups of layers take turns.
    assert changed.tolist() == [2 if layer % 8 < 1 else 1 for layer in range(34)]


def test_a_chunk_teaches_the_same_as_its_tokens_one_by_one():
    tokens = [n % 7 for n in range(40)]
    steps = scripted(tokens)
    one, chunk = ExpectedUse(SHAPE), ExpectedUse(SHAPE)
    for token, layers in zip(tokens, steps, strict=True):
        one.begin_step([token])
        for layer, ids in enumerate(layers):
            one.observe(layer, [ids])
    chunk.begin_step(tokens)
    for layer in range(SHAPE.layers):
        chunk.observe(layer, [step[layer] for step in steps])
    ours, theirs = chunk.state(), one.state()
    assert chunk.long_run == pytest.approx(one.long_run, abs=1e-5)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-3), name


def test_state_survives_a_restart():
    tokens = [n % 10 for n in range(200)]
    steps = scripted(tokens)
    first = ExpectedUse(SHAPE)
    hits(first, tokens, steps, 40)
    again = ExpectedUse(SHAPE)
    again.restore(first.state())
    cold = hits(ExpectedUse(SHAPE), tokens[:50], steps[:50], 40)
    warm = hits(again, tokens[:50], steps[:50], 40)
    assert warm > 1.1 * cold


def test_an_unfinished_step_teaches_nothing():
    policy = ExpectedUse(SHAPE)
    policy.begin_step([3])
    policy.observe(0, [[1, 2, 3]])
    policy.begin_step([4])
    assert policy.table.likely(3) == []


def test_a_half_life_is_the_middle_one_of_three():
    tokens = [number % 7 for number in range(40)]
    given, fitted = create_policy("ema+tokens", SHAPE, half_life=300), create_policy("ema+tokens", SHAPE)
    weighted = ExpectedUse(SHAPE, Weights(half_lives=(12.0, 300, 4000.0)))
    for policy in (given, fitted, weighted):
        hits(policy, tokens, scripted(tokens), 40)
    assert np.array_equal(given.values, weighted.values) and not np.allclose(given.values, fitted.values)
    assert (given.half_life, fitted.half_life) == (300, 60.0)


@pytest.mark.parametrize("shape", [SHAPE, CacheShape(34, 256, 8)], ids=["small", "large"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "ema", "ema+tokens"])
def test_learning_behind_a_step_leaves_the_same_state(policy, shape):
    rng = np.random.default_rng(5)
    during, behind = create_policy(policy, shape), create_policy(policy, shape)
    for number in range(30):
        tokens = rng.integers(0, 9, 4 if number % 7 == 3 else 1).tolist()
        # Some steps break off, one of them before its first layer.
        layers = {11: 2, 17: 0, 18: shape.layers - 1}.get(number, shape.layers)
        routing = [
            [rng.choice(shape.experts, shape.top_k, replace=False).tolist() for _ in tokens] for _ in range(layers)
        ]
        if number % 10 == 9:  # now and then a step of the other kind
            behind.begin_step(tokens)
            for layer, ids in enumerate(routing):
                behind.observe(layer, ids)
        else:
            behind.learn(tokens, routing)
        during.begin_step(tokens)
        for layer, ids in enumerate(routing):
            during.observe(layer, ids)
        assert np.isfinite(behind.values).all()
    ours, theirs = behind.state(), during.state()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.array_equal(ours[name], theirs[name]), name
    if policy == "ema+tokens":  # all that the next tokens are learned with, in full precision
        assert np.array_equal(behind.successors.weights, during.successors.weights)
        assert np.array_equal(behind.recall._past, during.recall._past)
