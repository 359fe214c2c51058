"""Passages that repeat are found, and what followed them is foretold."""

from __future__ import annotations

import random

import numpy as np
import pytest

from offload.cache.policy import CacheShape
from offload.cache.recall import Likeness, Recall

SHAPE = CacheShape(layers=6, experts=40, top_k=3)


def passage(seed: int, length: int) -> list[tuple[int, np.ndarray]]:
    """Tokens with their routing [L, K]."""
    rng = random.Random(seed)
    return [
        (rng.randrange(1000), np.array([rng.sample(range(SHAPE.experts), SHAPE.top_k) for _ in range(SHAPE.layers)]))
        for _ in range(length)
    ]


def remember(recall: Recall, *passages: list[tuple[int, np.ndarray]]) -> None:
    for tokens in passages:
        for token, ids in tokens:
            recall.add(token, ids)


def multi_hot(ids: np.ndarray) -> np.ndarray:
    hot = np.zeros((SHAPE.layers, SHAPE.experts))
    np.put_along_axis(hot, ids, 1.0, 1)
    return hot


@pytest.mark.parametrize("capacity", [64, 100, 1000])
def test_a_repeated_passage_foretells_its_continuation(capacity):
    recall = Recall(SHAPE, capacity)
    known = passage(1, 20)
    remember(recall, passage(2, 300), known, passage(3, 30), known[:10])
    recall.begin(known[10][0])
    places, weights = recall.neighbours()
    assert weights.sum() == pytest.approx(1.0)
    assert recall.present(places, weights) == pytest.approx(multi_hot(known[10][1]), abs=0.02)
    expected = sum(d * multi_hot(known[11 + n][1]) for n, d in enumerate(Likeness().discounts))
    assert recall.future(places, weights) == pytest.approx(expected, abs=0.05)
    assert recall.present(places, weights, 4) == pytest.approx(multi_hot(known[10][1])[4:], abs=0.02)


def test_the_first_layers_of_a_token_tell_two_continuations_apart():
    start, one, other = passage(1, 6), passage(2, 4), passage(3, 4)
    one[0], other[0] = (5, one[0][1]), (5, other[0][1])  # the same token id, routed differently
    recall = Recall(SHAPE, 200)
    remember(recall, start, one, passage(4, 20), start, other, passage(5, 20), start)
    recall.begin(5)
    undecided = recall.present(*recall.neighbours())
    assert undecided[multi_hot(one[0][1]) > 0].min() > 0.3
    assert undecided[multi_hot(other[0][1]) > 0].min() > 0.3
    recall.refine(one[0][1][:3])
    recall.refine(one[0][1][:5])
    assert recall.future(*recall.neighbours())[multi_hot(one[1][1]) > 0].min() > 0.9


def test_refining_step_by_step_is_refining_at_once():
    tokens = passage(1, 50)
    scores = []
    for stops in ([5], [1, 2, 4, 5]):
        recall = Recall(SHAPE, 32)
        remember(recall, tokens[:-1])
        recall.begin(tokens[-1][0])
        for stop in stops:
            recall.refine(tokens[20][1][:stop])
        scores.append(dict(zip(*recall.neighbours(), strict=True)))
    assert scores[0] == pytest.approx(scores[1])


def test_a_full_memory_forgets_the_oldest_and_never_joins_it_to_the_newest():
    recall = Recall(SHAPE, 16)
    remember(recall, passage(1, 16))
    tokens = passage(2, 16)
    remember(recall, tokens)
    assert len(recall) == 16
    recall.begin(tokens[3][0])
    places, _ = recall.neighbours()
    ages = {int((recall._head - 1 - place) % 16) for place in places}
    assert ages == set(range(16))
    newest = np.array([(recall._head - 1) % 16])
    assert recall.present(newest, np.ones(1)) == pytest.approx(multi_hot(tokens[-1][1]))
    assert not recall.future(newest, np.ones(1)).any()
    state = recall.state()
    assert state["tokens"].tolist() == [token for token, _ in tokens]
    assert np.array_equal(state["ids"], [ids for _, ids in tokens])
    again = Recall(SHAPE, 10)
    again.restore(state)
    assert again.state()["tokens"].tolist() == [token for token, _ in tokens[-10:]]


def test_an_upcoming_token_decides_between_places():
    recall = Recall(SHAPE, 100)
    tokens = passage(1, 30)
    twice = [(7, tokens[5][1]), (100, tokens[6][1]), *tokens[10:20], (7, tokens[5][1]), (200, tokens[7][1])]
    remember(recall, twice, tokens[20:])
    for upcoming, ids in ((100, tokens[6][1]), (200, tokens[7][1])):
        recall.begin(7, [upcoming])
        future = recall.future(*recall.neighbours())
        assert future[multi_hot(ids) > 0].min() > 0.6


@pytest.mark.parametrize("capacity", [64, 100, 1000])
def test_a_chunk_is_remembered_as_its_tokens_one_by_one(capacity):
    one, chunk = Recall(SHAPE, capacity), Recall(SHAPE, capacity)
    for tokens in (passage(1, 150), passage(2, 7), passage(3, 220), passage(1, 150)[:40]):
        remember(one, tokens)
        chunk.add_all([token for token, _ in tokens], np.array([ids for _, ids in tokens]))
    ours, theirs = chunk.state(), one.state()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    following = passage(1, 150)[40]
    for recall in (one, chunk):
        recall.begin(following[0])
    for left, right in zip(chunk.neighbours(), one.neighbours(), strict=True):
        assert np.sort(left) == pytest.approx(np.sort(right), abs=1e-5)
    places = chunk.neighbours()
    assert chunk.present(*places) == pytest.approx(one.present(*one.neighbours()), abs=1e-5)
    assert chunk.future(*places) == pytest.approx(one.future(*one.neighbours()), abs=1e-5)
