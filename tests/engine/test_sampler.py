from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.engine import sampler
from offload.engine.request import SamplingParams
from offload.engine.sampler import Sampler, candidates, log_probabilities, most_probable, uniform
from offload.errors import OffloadError

COUNT = 3000


def row_of(seed: int, size: int, scale: float = 3.0, ties: bool = False) -> np.ndarray:
    row = np.random.default_rng(seed).normal(scale=scale, size=size).astype(np.float32)
    return np.round(row) if ties else row


def kept_by_definition(row: np.ndarray, params: SamplingParams) -> list[int]:
    """The filters as their definitions read, on a fully sorted list."""
    ranked = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
    highest = float(row.max())
    weight = {i: float(np.float32(np.exp((float(row[i]) - highest) / params.temperature))) for i in ranked}
    likely = [i for i in ranked if weight[i] >= 2.0**-24 / len(row)]
    if 2 * len(likely) <= len(row):  # the others together weigh less than fp32 tells of the best
        ranked = likely
    if params.top_k:
        ranked = ranked[: params.top_k]
    total, kept, mass = sum(weight[i] for i in ranked), [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weight[i]
        if params.top_p < 1 and mass >= params.top_p * total:
            break
    return sorted(i for i in kept if weight[i] >= np.float32(params.min_p))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 300),
    ties=st.booleans(),
    temperature=st.sampled_from([0.05, 0.6, 1.0, 4.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_filters_do_what_their_definitions_say(
    seed: int, size: int, ties: bool, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    row = row_of(seed, size, ties=ties)
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    ids, _ = candidates(row, params)
    expected = kept_by_definition(row, params)
    if not ties:
        assert ids.tolist() == expected
    else:  # sums of equal weights may reach a boundary one term earlier or later
        assert abs(len(ids) - len(expected)) <= 1
    assert len(ids) >= 1
    assert (np.diff(ids) > 0).all()
    assert int(row.argmax()) in ids
    chosen = Sampler(SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed))
    assert chosen.sample(row, 3) in ids


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 8.0])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_a_large_vocabulary_is_cut_where_a_full_sort_cuts_it(scale: float, temperature: float) -> None:
    row = row_of(1, 20_000, scale=scale).round(2)  # with equal logits
    ids, weights = candidates(row, SamplingParams(temperature=temperature, top_p=0.9))
    every = np.exp((row.astype(np.float64) - row.max()) / temperature)
    ranked = np.lexsort((np.arange(row.size), -row))
    held = np.cumsum(every[ranked])
    wanted = ranked[: int(np.searchsorted(held, 0.9 * held[-1])) + 1]
    assert np.array_equal(ids, np.sort(wanted))
    np.testing.assert_allclose(weights, every[ids], rtol=1e-6)


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 50, "top_p": 0.9}])
def test_filters_keep_what_transformers_keeps(options: dict[str, float]) -> None:
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    params = SamplingParams(**{"temperature": 0.8, "top_p": 1.0, **options})
    for seed in range(20):
        row = row_of(seed, 400)
        scores = TemperatureLogitsWarper(0.8)(None, torch.from_numpy(row)[None])
        if params.top_k:
            scores = TopKLogitsWarper(params.top_k)(None, scores)
        if params.top_p < 1:
            scores = TopPLogitsWarper(params.top_p)(None, scores)
        if params.min_p:
            scores = MinPLogitsWarper(params.min_p)(None, scores)
        ids, weights = candidates(row, params)
        assert torch.isfinite(scores[0]).nonzero()[:, 0].tolist() == ids.tolist()
        probabilities = torch.softmax(scores[0].double(), -1)[ids].numpy()
        assert np.allclose(weights / weights.sum(), probabilities, atol=1e-6)


def test_greedy_takes_the_highest_logit_and_the_lowest_id_on_ties() -> None:
    greedy = Sampler(SamplingParams(temperature=0, top_p=0.5, top_k=2))
    assert greedy.sample(np.array([1.0, 5.0, -2.0, 5.0]), 0) == 1
    assert greedy.sample(torch.tensor([0.0, 0.0, 0.0]), 9) == 0
    assert greedy.sample([-3.0], 0) == 0


def test_equal_logits_are_ranked_by_id() -> None:
    row = np.repeat(np.array([2.0, 1.0, 2.0], dtype=np.float32), 400)
    best = [*range(400), *range(800, 1200)]
    for count in (1, 30, 399, 400, 401, 800):
        ids, _ = candidates(row, SamplingParams(temperature=1.0, top_p=1.0, top_k=count))
        assert ids.tolist() == sorted(best[:count])
    ids, _ = candidates(row, SamplingParams(temperature=1.0, top_p=0.25))
    assert ids.tolist() == best[: len(ids)]
    assert len(ids) < 300


def test_the_choice_depends_on_seed_step_and_logits_only() -> None:
    row = row_of(5, 1000)
    one, other = (Sampler(SamplingParams(temperature=1.5, seed=11)) for _ in range(2))
    tokens = [one.sample(row, step) for step in range(50)]
    assert [other.sample(row, step) for step in reversed(range(50))] == tokens[::-1]
    assert [one.sample(torch.from_numpy(row), step) for step in range(50)] == tokens
    assert [Sampler(SamplingParams(temperature=1.5, seed=12)).sample(row, s) for s in range(50)] != tokens
    assert len(set(tokens)) > 10


def test_draws_are_those_recorded() -> None:
    """The same on every platform and release: these are the project's numbers, not numpy's mood."""
    assert [uniform(0, 0), uniform(0, 1), uniform(2**64 - 1, 7)] == RECORDED_UNIFORM
    row = row_of(3, 5000)
    drawn = [Sampler(SamplingParams(temperature=1.2, top_p=0.9, seed=42)).sample(row, s) for s in range(8)]
    assert drawn == RECORDED_TOKENS


def test_frequencies_follow_the_probabilities() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    draw = Sampler(SamplingParams(temperature=1.0, top_p=1.0, seed=1))
    count = np.bincount([draw.sample(row, step) for step in range(COUNT)], minlength=4)
    assert np.allclose(count / COUNT, [0.5, 0.3, 0.15, 0.05], atol=0.02)
    cold = Sampler(SamplingParams(temperature=0.5, top_p=1.0, seed=1))
    squared = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    count = np.bincount([cold.sample(row, step) for step in range(COUNT)], minlength=4)
    assert np.allclose(count / COUNT, squared, atol=0.02)


def test_tokens_without_weight_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, step: 1.0 - 2.0**-53)
    row = np.array([0.0, 0.5, -1e9, -1e9], dtype=np.float32)
    assert Sampler(SamplingParams(temperature=1.0, top_p=1.0)).sample(row, 0) == 1
    monkeypatch.setattr(sampler, "uniform", lambda seed, step: 0.0)
    assert Sampler(SamplingParams(temperature=1.0, top_p=1.0)).sample(row[::-1], 0) == 2


def test_a_minute_temperature_is_greedy() -> None:
    row = row_of(8, 500)
    for temperature in (1e-6, 1e-300, 5e-324):
        assert Sampler(SamplingParams(temperature=temperature, seed=0)).sample(row, 0) == int(row.argmax())


def test_an_open_seed_is_drawn_once_and_can_be_repeated() -> None:
    row = row_of(6, 3000, scale=0.5)
    first = Sampler(SamplingParams(temperature=2.0, top_p=1.0))
    again = Sampler(SamplingParams(temperature=2.0, top_p=1.0, seed=first.seed))
    assert [first.sample(row, s) for s in range(20)] == [again.sample(row, s) for s in range(20)]
    assert Sampler(SamplingParams()).seed != first.seed


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_are_refused(temperature: float) -> None:
    row = row_of(2, 100)
    row[[3, 5]] = np.nan
    row[7] = np.inf
    row[8] = -np.inf
    with pytest.raises(OffloadError, match=r"2 NaN and 2 infinite logits among 100 at generated token 4"):
        Sampler(SamplingParams(temperature=temperature)).sample(row, 4)


def test_log_probabilities_are_those_of_the_unmodified_logits() -> None:
    row = row_of(4, 700)
    expected = torch.log_softmax(torch.from_numpy(row).double(), -1)
    got = log_probabilities(row)
    assert np.allclose(got, expected.numpy(), atol=1e-12)
    top = most_probable(got, 3)
    assert [i for i, _ in top] == expected.topk(3).indices.tolist()
    assert most_probable(np.zeros(4), 2) == ((0, 0.0), (1, 0.0))


RECORDED_UNIFORM = [0.011546754286331562, 0.5023796042735054, 0.6865660636114761]
RECORDED_TOKENS = [4253, 1966, 4633, 242, 4932, 4808, 4440, 1966]


def test_a_tail_that_weighs_nothing_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    row = np.concatenate([rng.normal(0.0, 2.0, 30000), rng.normal(30.0, 3.0, 400)]).astype(np.float32)
    for options in ({"top_p": 0.95}, {"top_p": 1.0}, {"top_k": 300, "top_p": 0.9}, {"top_p": 1.0, "min_p": 0.001}):
        params = SamplingParams(temperature=0.7, seed=3, **options)
        ids, weights = candidates(row, params)
        whole, theirs = sampler._filtered(row, params)
        kept = np.isin(whole, ids)
        assert ids.max() >= 30000 and np.array_equal(whole[kept], ids) and np.array_equal(theirs[kept], weights)
        assert theirs[~kept].sum() <= 2.0**-24
    ids, _ = candidates(row, SamplingParams(temperature=0.7, top_p=1.0))
    assert len(ids) < len(row) / 2
    whole, _ = candidates(row, SamplingParams(temperature=1e300, top_p=1.0))
    assert len(whole) == len(row)
