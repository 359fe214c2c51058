from __future__ import annotations

import json
import math

import pytest

from offload.engine.request import GenerationResponse, SamplingParams, resolve_sampling
from offload.errors import ConfigError, UsageError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", "3"),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("stop", ("a", "")),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop", "\udcff"),
        ("stop_token_ids", b"ab"),
        ("stop", (5,)),
        ("stop_token_ids", (-3,)),
        ("stop_token_ids", 7),
        ("ignore_eos", 1),
        ("logprobs", 21),
    ],
)
def test_bad_values_are_named_with_their_range(name: str, value: object) -> None:
    with pytest.raises(UsageError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(name)
    assert "must" in message
    assert "\n" not in message


def test_edges_of_the_ranges_are_accepted_and_values_are_normalised() -> None:
    params = SamplingParams(
        max_tokens=1, temperature=0, top_p=1, top_k=0, min_p=1, seed=2**64 - 1, stop=["x", "yz"], stop_token_ids=[4]
    )
    assert (params.temperature, params.top_p, params.min_p) == (0.0, 1.0, 1.0)
    assert params.stop == ("x", "yz")
    assert params.stop_token_ids == (4,)
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert hash(params) == hash(SamplingParams(**{f: getattr(params, f) for f in params.__dataclass_fields__}))


def test_explicit_goes_before_generation_config_goes_before_defaults() -> None:
    config = {"do_sample": True, "temperature": 0.3, "top_p": 0.8, "top_k": None, "transformers_version": "4"}
    params = resolve_sampling({"temperature": 0.9, "top_k": 5, "seed": None}, config)
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.9, 0.8, 5, None)
    assert resolve_sampling({}, None) == SamplingParams()
    assert resolve_sampling({"temperature": 0}, config).temperature == 0


def test_do_sample_false_means_greedy_unless_the_user_says_otherwise() -> None:
    config = {"do_sample": False, "temperature": 0.7}
    assert resolve_sampling({}, config).temperature == 0
    assert resolve_sampling({"temperature": 0.5}, config).temperature == 0.5


def test_who_is_to_blame_is_told() -> None:
    with pytest.raises(ConfigError, match=r"generation_config.json: top_p is 3"):
        resolve_sampling({}, {"top_p": 3})
    with pytest.raises(UsageError, match="unknown sampling option 'topp'"):
        resolve_sampling({"topp": 3})


def test_response_is_plain_json() -> None:
    response = GenerationResponse("a", (1, 2), 3, 2, "stop", 9, 0.5, 6.0, None)
    assert json.loads(json.dumps(response.to_dict())) == {
        "text": "a",
        "token_ids": [1, 2],
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "finish_reason": "stop",
        "seed": 9,
        "ttft_s": 0.5,
        "prefill_tok_s": 6.0,
        "decode_tok_s": None,
    }
