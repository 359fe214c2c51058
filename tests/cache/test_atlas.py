"""Every number of the atlas against a slow computation from the raw expert ids."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from offload.cache.atlas import HOT_SHARE, Atlas, make_atlas
from offload.cache.policy import CacheShape
from offload.cache.trace import Trace, TraceRecorder
from offload.errors import UsageError
from tests.cache.routing_samples import SHAPE, routing

LAYERS, EXPERTS, TOP_K = SHAPE.layers, SHAPE.experts, SHAPE.top_k


def make_trace(seed: int, sessions: list[list[int]]) -> Trace:
    """Random routing: `sessions` holds the tokens of every forward pass of each conversation."""
    recorder = TraceRecorder(SHAPE)
    for number, steps in enumerate(sessions):
        recorder.begin_session()
        for part, tokens in enumerate(steps):
            (layers,) = routing(1, 100 * seed + 10 * number + part, tokens=tokens)
            recorder.begin_step(range(tokens))
            for layer, ids in enumerate(layers):
                recorder.route(layer, ids)
    return recorder.trace()


TRACES = {
    "code": make_trace(1, [[7, 1, 1], [5]]),
    "law": make_trace(2, [[1], [1], [11, 1]]),
    "prose": make_trace(3, [[31]]),
}


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return make_atlas(TRACES, first_layer=1)


def conversations(trace: Trace) -> list[list[list[list[int]]]]:
    """[session][token][layer][k], from the file's fields alone."""
    bounds = [int(trace.steps[:step].sum()) for step in trace.sessions] + [len(trace.tokens)]
    return [trace.experts[a:b].tolist() for a, b in pairwise(bounds)]


def use(domain: str, layer: int) -> list[float]:
    """p(e|d) of one layer."""
    found = Counter(e for session in conversations(TRACES[domain]) for token in session for e in token[layer])
    return [found[e] / found.total() for e in range(EXPERTS)]


def load(layer: int) -> list[float]:
    return [sum(column) / len(TRACES) for column in zip(*(use(d, layer) for d in TRACES), strict=True)]


def bits(p: list[float]) -> float:
    return -sum(x * math.log2(x) for x in p if x)


def test_counts_and_tokens(atlas: Atlas) -> None:
    assert atlas.tokens == (14, 14, 31) and atlas.domains == ("code", "law", "prose")
    assert atlas.counts.sum(2).tolist() == [[n * TOP_K] * LAYERS for n in atlas.tokens]
    for d, domain in enumerate(TRACES):
        for layer in range(LAYERS):
            assert atlas.use[d, layer].tolist() == pytest.approx(use(domain, layer))
            assert atlas.load[layer].tolist() == pytest.approx(load(layer))


def test_load_per_layer(atlas: Atlas) -> None:
    for layer in range(LAYERS):
        p = load(layer)
        mean = sum(p) / EXPERTS
        variance = sum((x - mean) ** 2 for x in p) / EXPERTS
        differences = sum(abs(a - b) for a in p for b in p)
        assert atlas.variation[layer] == pytest.approx(math.sqrt(variance) / mean)
        assert atlas.max_violation[layer] == pytest.approx(max(p) / mean - 1)
        assert atlas.gini[layer] == pytest.approx(differences / (2 * EXPERTS**2 * mean))
        assert atlas.entropy[layer] == pytest.approx(bits(p))


def test_information_is_the_divergence_of_the_joint_from_independence(atlas: Atlas) -> None:
    for layer in range(LAYERS):
        p, expected = load(layer), 0.0
        for domain in TRACES:
            for e, q in enumerate(use(domain, layer)):
                if q:
                    expected += q / len(TRACES) * math.log2(q / p[e])
        assert atlas.information[layer] == pytest.approx(expected)


def test_information_floor_is_what_chance_gives() -> None:
    """Domains that draw from one distribution still show information; the floor tells how much."""
    shape = CacheShape(layers=40, experts=16, top_k=1)
    rng = np.random.default_rng(5)

    def draw(tokens: int) -> Trace:
        experts = rng.integers(0, 16, (tokens, 40, 1)).astype(np.uint16)
        return Trace(shape, np.zeros(tokens, np.int32), np.ones(tokens, np.int32), experts)

    atlas = make_atlas({"a": draw(400), "b": draw(900), "c": draw(300)})
    assert atlas.information.mean() == pytest.approx(atlas.information_floor.mean(), rel=0.15)
    one_each = make_atlas({"a": _only(shape, 3), "b": _only(shape, 8)})
    assert one_each.information.tolist() == pytest.approx([1.0] * 40)  # log2 of two domains
    assert one_each.overlap[0, 0] == 1.0


def _only(shape: CacheShape, expert: int) -> Trace:
    experts = np.full((9, shape.layers, 1), expert, np.uint16)
    return Trace(shape, np.zeros(9, np.int32), np.full(1, 9, np.int32), experts)


def test_coverage(atlas: Atlas) -> None:
    for n in range(1, EXPERTS + 1):
        expected = sum(sum(sorted(load(layer))[-n:]) for layer in range(LAYERS)) / LAYERS
        assert atlas.coverage[n - 1] == pytest.approx(expected)
        for d, domain in enumerate(TRACES):
            expected = sum(sum(sorted(use(domain, layer))[-n:]) for layer in range(LAYERS)) / LAYERS
            assert atlas.domain_coverage[d, n - 1] == pytest.approx(expected)


def test_reuse_never_reaches_over_the_border_of_a_conversation(atlas: Atlas) -> None:
    for d, domain in enumerate(TRACES):
        for layer in range(LAYERS):
            shares = [
                len({*a[layer]} & {*b[layer]}) / TOP_K
                for session in conversations(TRACES[domain])
                for a, b in pairwise(session)
            ]
            assert atlas.reuse[d, layer] == pytest.approx(sum(shares) / len(shares))
    assert atlas.chance_reuse == TOP_K / EXPERTS
    alone = make_atlas({"x": make_trace(4, [[1], [1]])})
    assert alone.reuse.tolist() == [[0.0] * LAYERS]


def test_overlap_of_domains(atlas: Atlas) -> None:
    size = round(HOT_SHARE * EXPERTS)

    def hot(domain: str, layer: int) -> set[int]:
        p = use(domain, layer)
        return set(sorted(range(EXPERTS), key=lambda e: (-p[e], e))[:size])

    for i, a in enumerate(TRACES):
        for j, b in enumerate(TRACES):
            shares = [len(hot(a, n) & hot(b, n)) / len(hot(a, n) | hot(b, n)) for n in range(LAYERS)]
            assert atlas.overlap[i, j] == pytest.approx(sum(shares) / LAYERS)
    assert atlas.overlap.diagonal().tolist() == [1.0] * 3


def test_parts_and_specialists(atlas: Atlas) -> None:
    for d, domain in enumerate(TRACES):
        found = []
        for layer in range(LAYERS):
            uses = [use(name, layer) for name in TRACES]
            for e in range(EXPERTS):
                total = sum(p[e] for p in uses)
                part = use(domain, layer)[e] / total if total else 0.0
                assert atlas.part[d, layer, e] == pytest.approx(part)
                if use(domain, layer)[e] >= 1 / EXPERTS:
                    found.append((-part, layer, e))
        best = sorted(found)[:4]
        specialists = atlas.specialists(d, 4)
        assert [-one.share for one in specialists] == pytest.approx([part for part, _, _ in best])
        assert specialists[0][:2] in [(layer, e) for part, layer, e in found if part == pytest.approx(best[0][0])]
        told = atlas.to_dict()["specialists"][domain]
        assert told[0] == [1 + specialists[0].layer, specialists[0].expert, specialists[0].share]


def test_summary_and_json_hold_the_same_numbers(atlas: Atlas) -> None:
    lines = list(atlas.lines())
    values = atlas.to_dict()
    first = next(line for line in lines if line.startswith("    1 "))
    assert f"{values['max_violation'][0]:.2f}" in first and f"{values['information_bits'][0]:.3f}" in first
    everyone = next(line for line in lines if "all domains" in line)
    assert f"{values['coverage'][round(0.25 * EXPERTS) - 1]:.0%}" in everyone
    assert np.array(values["counts"]).shape == (3, LAYERS, EXPERTS)


def test_unusable_traces_are_refused_by_name() -> None:
    other = TraceRecorder(CacheShape(2, 8, 2)).trace()
    with pytest.raises(UsageError, match="domain b was recorded with another model"):
        make_atlas({"a": TRACES["code"], "b": other})
    with pytest.raises(UsageError, match="domain x holds no tokens"):
        make_atlas({"x": TraceRecorder(SHAPE).trace()})
    with pytest.raises(UsageError, match="at least one domain"):
        make_atlas({})
