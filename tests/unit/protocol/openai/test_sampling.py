from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from understudy.protocol.openai.body import parse_body
from understudy.protocol.openai.sampling import (
    Generation,
    GenerationFields,
    ModelTraits,
    check_generation,
    make_requests,
    sample_seed,
    settle_max_tokens,
)
from understudy.protocol.request import SEED_MASK, SamplingParams

MODEL = ModelTraits(name="m", vocab_size=100, max_model_len=64, eos_token_ids=(7, 9))


def check(body: dict[str, Any], model: ModelTraits = MODEL) -> Generation:
    fields = parse_body(json.dumps(body).encode(), GenerationFields).fields
    return check_generation(fields, model, logprobs=None)


def refused(body: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check(body)
    return caught.value


def draw(bits: int) -> int:
    return random.Random(bits).getrandbits(bits)


def test_an_empty_body_means_openais_defaults() -> None:
    assert check({}) == Generation(
        sampling=SamplingParams(seed=0, max_tokens=0, stop_token_ids=(7, 9)),
        n=1,
        seed=None,
        max_tokens=None,
        stop=(),
        include_stop=False,
        stream=False,
        include_usage=False,
        continuous_usage=False,
        priority=0,
        cache_salt="",
    )


def test_the_models_recommendations_hold_where_the_client_says_nothing() -> None:
    model = ModelTraits(
        name="m",
        vocab_size=100,
        max_model_len=64,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        repetition_penalty=1.1,
    )
    sampling = check({}, model).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 20)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    asked = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    plain = check(asked, model).sampling
    assert plain == SamplingParams(seed=0, max_tokens=0)


def test_a_recommendation_out_of_the_clients_range_is_no_fault_of_the_client() -> None:
    model = ModelTraits(name="m", vocab_size=100, max_model_len=64, temperature=5.0, top_p=0.0)
    sampling = check({}, model).sampling
    assert sampling.temperature == 5.0
    assert 0.0 < sampling.top_p < 1e-4


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 2.1, 1e300]),
        ("top_p", [0, -0.0, -0.1, 1.1]),
        ("top_k", [-2, 2**64]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, -1, 1e-320, 11]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("n", [0, -1, 17, 10**9]),
        ("max_tokens", [0, -1, 2**64]),
        ("min_tokens", [-1, 65, 2**63]),
        ("seed", [-(2**63) - 1, 2**64]),
        ("best_of", [0, 2]),
        ("priority", [2**31, -(2**31) - 1]),
        ("stop", ["", ["a", ""], ["x"] * 9, "x" * 257, "ß" * 129, ["x"] * 5000]),
        ("stop_token_ids", [[-1], [100], [2**40], [1] * 65]),
        ("stream_options", [{"include_usage": True}]),
        (
            "logit_bias",
            [
                {"100": 1},
                {"-1": 1},
                {"1.0": 1},
                {"x": 1},
                {"": 1},
                {"\u0661": 1},
                {"1": 100.1},
                {"1": -101},
                {"1": 1, "01": 2},
                {"9" * 5000: 1},
                {str(key): 1 for key in range(2000)},
            ],
        ),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_name(name: str, values: list[Any]) -> None:
    for value in values:
        error = refused({name: value})
        assert error.param == name, value
        assert len(error.message) < 200


@given(
    body=st.fixed_dictionaries(
        {},
        optional={
            name: st.floats(allow_nan=False, allow_infinity=False)
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )
        },
    )
)
def test_numbers_that_pass_are_ones_that_logits_bear(body: dict[str, float]) -> None:
    try:
        sampling = check(body).sampling
    except InvalidRequest:
        return
    assert sampling.temperature == 0.0 or 1e-5 <= sampling.temperature <= 2.0
    assert math.copysign(1.0, sampling.temperature) == 1.0
    assert 1e-5 <= sampling.top_p <= 1.0
    assert 0.0 <= sampling.min_p <= 1.0
    assert 0.01 <= sampling.repetition_penalty <= 10.0


def test_tiny_and_negative_zero_temperatures_are_greedy() -> None:
    for temperature in (0, -0.0, 1e-320, 9e-6):
        sampling = check({"temperature": temperature}).sampling
        assert math.copysign(1.0, sampling.temperature) == 1.0
        assert sampling.temperature == 0.0


@pytest.mark.parametrize("top_k", [-1, 0, 100, 2**31])
def test_a_top_k_that_keeps_all_tokens_is_off(top_k: int) -> None:
    assert check({"top_k": top_k}).sampling.top_k == 0


def test_stop_tokens_are_the_clients_and_the_models() -> None:
    assert check({"stop_token_ids": [3, 9, 3]}).sampling.stop_token_ids == (3, 9, 7)
    assert check({"stop_token_ids": [3], "ignore_eos": True}).sampling.stop_token_ids == (3,)


def test_stop_is_a_string_or_several() -> None:
    assert check({"stop": "a"}).stop == ("a",)
    assert check({"stop": ["a", "b", "a"]}).stop == ("a", "b")
    assert check({"stop": []}).stop == ()


def test_a_logit_bias_is_sorted_by_token() -> None:
    assert check({"logit_bias": {"10": 1, "2": -100}}).sampling.logit_bias == ((2, -100.0), (10, 1))


def test_an_empty_logit_bias_is_none() -> None:
    assert check({"logit_bias": {}}).sampling.logit_bias == ()


def test_another_model_than_the_one_served_is_not_found() -> None:
    with pytest.raises(ModelNotFound) as caught:
        check({"model": "other\n" * 100})
    assert caught.value.status == 404
    assert len(caught.value.message) < 200
    assert check({"model": "m"}).n == 1


def test_usage_can_be_asked_for_of_a_stream() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    generation = check({"stream": True, "stream_options": options})
    assert generation.include_usage
    assert generation.continuous_usage


def test_best_of_may_equal_n() -> None:
    assert check({"n": 3, "best_of": 3}).n == 3


def test_a_negative_seed_is_taken_modulo_two_to_the_64() -> None:
    assert check({"seed": -1}).seed == SEED_MASK
    assert check({"seed": 2**64 - 1}).seed == SEED_MASK
    assert check({"seed": -(2**63)}).seed == 2**63


def test_the_answers_to_one_prompt_are_one_group_with_seeds_of_their_own() -> None:
    generation = check({"n": 3, "seed": 5, "priority": -2, "max_tokens": 10})
    ids = iter([11, 12, 13])
    requests = make_requests(
        generation, (1, 2), MODEL, draw=lambda _: next(ids), default_max_tokens=None
    )
    assert [request.request_id for request in requests] == [11, 12, 13]
    assert {request.group_id for request in requests} == {11}
    assert {request.prompt for request in requests} == {(1, 2)}
    assert {request.priority for request in requests} == {-2}
    assert {request.params.max_tokens for request in requests} == {10}
    seeds = [request.params.seed for request in requests]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


def test_an_answer_does_not_depend_on_how_many_were_asked_for() -> None:
    few = make_requests(check({"n": 2, "seed": 5}), (1,), MODEL, draw=draw, default_max_tokens=None)
    many = make_requests(
        check({"n": 16, "seed": 5}), (1,), MODEL, draw=draw, default_max_tokens=None
    )
    assert [r.params for r in few] == [r.params for r in many[:2]]


def test_a_seed_is_drawn_if_the_client_gives_none() -> None:
    [request] = make_requests(check({}), (1,), MODEL, draw=draw, default_max_tokens=None)
    assert request.params.seed == draw(64)
    assert request.request_id == draw(63)


@given(seed=st.integers(0, SEED_MASK), other=st.integers(0, SEED_MASK), index=st.integers(0, 15))
def test_different_seeds_stay_different(seed: int, other: int, index: int) -> None:
    mixed = sample_seed(seed, index)
    assert 0 <= mixed <= SEED_MASK
    assert (mixed == sample_seed(other, index)) == (seed == other)


def test_seeds_of_answers_are_fixed() -> None:
    assert [sample_seed(0, index) for index in range(3)] == [
        0,
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]


def test_an_answer_takes_what_the_context_leaves() -> None:
    assert settle_max_tokens(None, 60, MODEL, default=None) == 4
    assert settle_max_tokens(None, 60, MODEL, default=16) == 4
    assert settle_max_tokens(None, 10, MODEL, default=16) == 16
    assert settle_max_tokens(4, 60, MODEL, default=16) == 4


@pytest.mark.parametrize(
    ("asked", "num_prompt_tokens", "param"),
    [(5, 60, "max_tokens"), (2**63, 1, "max_tokens"), (None, 64, "prompt"), (1, 10**6, "prompt")],
)
def test_what_does_not_fit_the_context_is_refused(
    asked: int | None, num_prompt_tokens: int, param: str
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        settle_max_tokens(asked, num_prompt_tokens, MODEL, default=None)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == param


def test_fewer_tokens_than_the_least_cannot_be_the_most() -> None:
    generation = check({"min_tokens": 5, "max_tokens": 4})
    with pytest.raises(InvalidRequest) as caught:
        make_requests(generation, (1,), MODEL, draw=draw, default_max_tokens=None)
    assert caught.value.param == "min_tokens"
