"""What makes the training short: a bigram start, and Muon for the common matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.embedded.bigram import fit_pairs, pair_frequencies, start_from_pairs
from benchmarks.embedded.model import Model
from benchmarks.embedded.optimizer import MixedOptimizer, orthogonalise
from tests.embedded.test_training import TINY


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_orthogonalised_matrices_keep_their_directions(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(orthogonalise(matrix), full_matrices=False)
    assert float(s.min()) > 0.3 and float(s.median()) > 0.95 and float(s.max()) < 1.1  # tiny ones rise last
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(u @ v, left @ right, atol=1e-3)


def test_every_parameter_is_moved_by_one_rule() -> None:
    torch.manual_seed(0)
    model = Model(TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MixedOptimizer(model, 1e-2, 1e-2, 1e-2, 0.0)
    optimizer.scale = 0.5
    model(torch.randint(320, (2, 24))).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        moved = float((p.detach() - before[name]).abs().max())
        assert 0 < moved < 0.02, name
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_pairs_are_counted_by_share() -> None:
    table = pair_frequencies(
        {"a": np.array([1, 2, 1, 2], np.int32), "b": np.array([3, 3], np.int32)}, {"a": 0.75, "b": 0.25}, 4
    )
    table = table / table[1:].sum()
    assert (
        table[1, 2] == pytest.approx(0.5) and table[2, 1] == pytest.approx(0.25) and table[3, 3] == pytest.approx(0.25)
    )
    assert table[0, 2] / table[0].sum() == pytest.approx(0.5)  # what begins a window is anything


def test_the_fit_reaches_the_entropy_of_the_pairs_and_starts_the_model_there() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    following = rng.integers(1, 320, (320, 3))
    tokens = [1]
    for choice in rng.integers(3, size=20_000):
        tokens.append(int(following[tokens[-1], choice]))
    stream = np.array(tokens, np.int32)
    table = pair_frequencies({"a": stream}, {"a": 1.0}, 320)
    rows = table.sum(1, keepdim=True)
    entropy = -float((table * (table / rows.clamp_min(1e-30)).clamp_min(1e-30).log()).sum())
    pairs = fit_pairs(table, TINY["hidden_size"], 150)
    assert entropy <= pairs.loss < entropy + 0.15
    model = Model(TINY)
    start_from_pairs(model, pairs)
    window = torch.from_numpy(stream[:400].astype(np.int64)).view(4, 100)
    with torch.no_grad():
        loss = float(cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten()))
    assert loss < 3.0 < np.log(320)
