from __future__ import annotations

import json
from typing import Any

import pytest

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.answer import Answer, Heading
from understudy.protocol.openai.completions import (
    Completion,
    completion_response,
    parse_completion,
)
from understudy.protocol.openai.logprobs import TokenLogprob
from understudy.protocol.openai.sampling import ModelTraits

MODEL = ModelTraits(name="m", vocab_size=100, max_model_len=64)


def parse(**body: Any) -> Completion:
    return parse_completion(json.dumps({"prompt": "x", **body}).encode(), MODEL)


def refused(**body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**body)
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hello", ("hello",)),
        ("", ("",)),
        (["a", "b", ""], ("a", "b", "")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert parse(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        [],
        [[]],
        [[1], []],
        ["a", 1],
        [1, [2]],
        ["a", [1]],
        [-1],
        [100],
        [[100]],
        [2**40],
        [2**70],
        ["a"] * 129,
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    assert refused(prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    "prompt", [3, {"a": 1}, [1.0], [True], [[1.5]], [None], [["a"]], ["a", ["b"]]]
)
def test_a_prompt_of_the_wrong_type_is_refused_by_its_name(prompt: Any) -> None:
    param = refused(prompt=prompt).param
    assert param is not None
    assert param.startswith("prompt")


def test_there_are_only_so_many_choices_in_one_call() -> None:
    assert len(parse(prompt=["a"] * 8, n=16).prompts) == 8
    assert refused(prompt=["a"] * 9, n=16).param == "prompt"


@pytest.mark.parametrize(("logprobs", "asked"), [(None, None), (0, 0), (5, 5), (20, 20)])
def test_log_probabilities_are_a_number(logprobs: int | None, asked: int | None) -> None:
    assert parse(logprobs=logprobs).generation.sampling.logprobs == asked


@pytest.mark.parametrize("logprobs", [-1, 21, 10**6, True, 1.5])
def test_log_probabilities_out_of_range_are_refused(logprobs: Any) -> None:
    assert refused(logprobs=logprobs).param == "logprobs"


def test_log_probabilities_of_an_echo_come_in_one_piece() -> None:
    assert parse(logprobs=1, echo=True, max_tokens=0).echo
    assert refused(logprobs=1, echo=True, stream=True).param == "logprobs"


def test_only_an_echo_may_have_no_tokens() -> None:
    assert parse(echo=True, max_tokens=0).generation.max_tokens == 0
    assert refused(max_tokens=0).param == "max_tokens"


def test_a_suffix_is_refused() -> None:
    assert refused(suffix="x").param == "suffix"


def test_an_answer_in_one_piece_has_openais_shape() -> None:
    logprobs = [
        TokenLogprob(b"a", -0.5, (TokenLogprob(b"b", -0.25),), 0),
        TokenLogprob(b"\xc3", -1.0, (TokenLogprob(b"\xc3", -1.0), TokenLogprob(b"\xc2", -3)), 1),
    ]
    answers = [Answer(0, "aß", 3, "length", logprobs)]
    response = completion_response(
        Heading("cmpl-1", 5, "m"), answers, num_prompt_tokens=2, num_cached_tokens=1
    )
    assert response == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "text": "aß",
                "logprobs": {
                    "tokens": ["a", "bytes:\\xc3"],
                    "token_logprobs": [-0.5, -1.0],
                    "top_logprobs": [
                        {"b": -0.25, "a": -0.5},
                        {"bytes:\\xc3": -1.0, "bytes:\\xc2": -3},
                    ],
                    "text_offset": [0, 1],
                },
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
