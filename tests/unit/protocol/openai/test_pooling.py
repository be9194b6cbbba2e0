"""Embeddings, scores and rankings: bodies in, JSON out."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    PayloadTooLarge,
)
from understudy.protocol.openai.pooling import (
    INPUTS_MAX,
    TOKENS_MAX,
    Ranking,
    Scores,
    Terms,
    check_total,
    cosine,
    embeddings_response,
    numbers,
    parse_embeddings,
    parse_rerank,
    parse_scores,
    pooling_requests,
    rerank_response,
    scores_response,
)
from understudy.protocol.openai.sampling import ModelTraits
from understudy.protocol.request import Pooling, PoolingKind

TRAITS = ModelTraits("tiny", vocab_size=100, max_model_len=32, hidden_size=16)
SCORER = ModelTraits(
    "tiny",
    vocab_size=100,
    max_model_len=32,
    hidden_size=16,
    pooling=PoolingKind.SCORE,
    generates=False,
)
NO_TERMS = Terms(0, "", None)
PARSERS: dict[str, Callable[[bytes, ModelTraits], Any]] = {
    "embeddings": parse_embeddings,
    "score": parse_scores,
    "rerank": parse_rerank,
}


def raw(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
ids = st.lists(st.integers(0, 99), min_size=1, max_size=32)


@given(texts, st.lists(texts, min_size=1, max_size=4), ids, st.lists(ids, min_size=1, max_size=4))
def test_the_four_forms_of_an_input_become_one(
    text: str, several: list[str], tokens: list[int], lists: list[list[int]]
) -> None:
    def inputs(given: Any) -> Any:
        return parse_embeddings(raw(input=given), TRAITS).inputs

    assert inputs(text) == (text,)
    assert inputs(several) == tuple(several)
    assert inputs(tokens) == (tuple(tokens),)
    assert inputs(lists) == tuple(map(tuple, lists))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1, 1) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    "input",
    "encoding_format",
    "dimensions",
    "text_1",
    "text_2",
    "queries",
    "documents",
    "query",
    "top_n",
    "return_documents",
    "priority",
    "deadline_ms",
    "cache_salt",
    "user",
    "model",
)


@pytest.mark.parametrize("name", PARSERS)
@given(body=st.dictionaries(st.sampled_from(NAMES), json_values, max_size=6))
def test_whatever_comes_is_taken_or_refused_with_words(name: str, body: dict[str, Any]) -> None:
    with suppress(InvalidRequest):
        PARSERS[name](json.dumps(body).encode(), TRAITS)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [100]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [[1], [2, 100]]}, "input"),
        ({"input": ["a"] * (INPUTS_MAX + 1)}, "input"),
        ({"input": [[1]] * (INPUTS_MAX + 1)}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 17}, "dimensions"),
        ({"input": "a", "dimensions": True}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "deadline_ms": 0}, "deadline_ms"),
        ({"input": "a", "cache_salt": ""}, "cache_salt"),
        ({"input": "a", "priority": 2**31}, "priority"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_its_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_embeddings(raw(**body), TRAITS)
    assert raised.value.param == param


def test_a_prompt_that_is_too_long_is_told_as_such() -> None:
    parse_embeddings(raw(input=[1] * 32), TRAITS)
    with pytest.raises(ContextLengthExceeded):
        parse_embeddings(raw(input=[1] * 33), TRAITS)


def test_what_is_wanted_of_an_embedding_is_passed_on() -> None:
    body = raw(
        input="a",
        dimensions=4,
        encoding_format="base64",
        priority=3,
        deadline_ms=500,
        cache_salt="s",
        user="u",
        extra=1,
    )
    asked = parse_embeddings(body, TRAITS)
    assert asked.pooling == Pooling(PoolingKind.LAST, 4)
    assert asked.is_base64
    assert asked.terms == Terms(3, "s", 0.5)
    assert asked.ignored == ("extra",)
    assert parse_embeddings(raw(input="a", dimensions=16), TRAITS).pooling.dimensions == 0


def test_another_model_is_not_found() -> None:
    bodies = {
        "embeddings": raw(model="x", input="a"),
        "score": raw(model="x", text_1="a", text_2="b"),
        "rerank": raw(model="x", query="a", documents=["b"]),
    }
    for name, body in bodies.items():
        with pytest.raises(ModelNotFound):
            PARSERS[name](body, TRAITS)


def test_a_model_that_scores_embeds_nothing_and_generates_nothing() -> None:
    with pytest.raises(InvalidRequest, match="makes scores") as raised:
        parse_embeddings(raw(input="a"), SCORER)
    assert raised.value.param == "model"
    with pytest.raises(InvalidRequest, match="encoder and generates no text") as raised:
        SCORER.check_generates()
    assert raised.value.param == "model"
    TRAITS.check_generates()


@pytest.mark.parametrize(
    ("body", "pairs"),
    [
        ({"text_1": "q", "text_2": "a"}, [("q", "a")]),
        ({"text_1": "q", "text_2": ["a", "b"]}, [("q", "a"), ("q", "b")]),
        ({"text_1": ["q"], "text_2": ["a", "b"]}, [("q", "a"), ("q", "b")]),
        ({"text_1": ["p", "q"], "text_2": ["a", "b"]}, [("p", "a"), ("q", "b")]),
        ({"queries": "q", "documents": ["a", "b"]}, [("q", "a"), ("q", "b")]),
    ],
)
def test_texts_are_paired(body: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    assert parse_scores(raw(**body), TRAITS).pairs == pairs


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text_1"),
        ({"text_1": "a"}, "text_2"),
        ({"queries": "a"}, "documents"),
        ({"documents": "a"}, "queries"),
        ({"text_1": "a", "text_2": "b", "queries": "c"}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": "c"}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": "a", "text_2": ["b", ""]}, "text_2"),
        ({"text_1": "a", "text_2": ["b"] * (INPUTS_MAX + 1)}, "text_2"),
    ],
)
def test_what_cannot_be_paired_is_refused_by_its_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_scores(raw(**body), TRAITS)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "a"}, "documents"),
        ({"documents": ["a"]}, "query"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": [{"text": ""}]}, "documents"),
        ({"query": "a", "documents": [{"title": "b"}]}, "documents"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ({"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
    ],
)
def test_what_cannot_be_ranked_is_refused_by_its_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_rerank(raw(**body), TRAITS)
    assert str(raised.value.param).startswith(param)


def test_documents_may_be_objects_and_more_may_be_wanted_than_there_are() -> None:
    ranking = parse_rerank(raw(query="q", documents=["a", {"text": "b"}], top_n=9), TRAITS)
    assert ranking.scores.pairs == [("q", "a"), ("q", "b")]
    assert ranking.top_n == 2
    assert ranking.with_documents
    assert not parse_rerank(
        raw(query="q", documents=["a"], return_documents=False), TRAITS
    ).with_documents


def test_all_inputs_together_have_a_limit() -> None:
    check_total(TOKENS_MAX, param="input")
    with pytest.raises(PayloadTooLarge) as raised:
        check_total(TOKENS_MAX + 1, param="input")
    assert (raised.value.status, raised.value.param) == (413, "input")


def test_a_call_is_one_group_named_after_its_first_request() -> None:
    numbered = count(100)
    prompts = [((1, 2), Pooling(PoolingKind.LAST)), ((3,), Pooling(PoolingKind.SCORE, 0, 1))]
    made = pooling_requests(prompts, Terms(2, "s", 1.5), draw=lambda bits: next(numbered))
    assert [one.request_id for one in made] == [100, 101]
    assert {one.group_id for one in made} == {100}
    assert [(one.prompt, one.pooling) for one in made] == prompts
    assert {(one.priority, one.cache_salt, one.deadline_s) for one in made} == {(2, "s", 1.5)}
    assert {one.params.max_tokens for one in made} == {1}


vectors = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=9)


@given(vectors)
def test_numbers_come_out_as_they_went_in(values: list[float]) -> None:
    packed = struct.pack(f"<{len(values)}f", *values)
    assert numbers(packed) == values
    for is_base64 in (False, True):
        answer = embeddings_response(
            [packed], model="m", answer_id="embd-1", num_tokens=3, is_base64=is_base64
        )
        [told] = msgspec.json.decode(msgspec.json.encode(answer))["data"]
        embedding = told["embedding"]
        assert (base64.b64decode(embedding) if is_base64 else embedding) == (
            packed if is_base64 else values
        )


@given(vectors.flatmap(lambda v: st.tuples(st.just(v), st.permutations(v))))
def test_a_cosine_is_the_same_both_ways(pair: tuple[list[float], list[float]]) -> None:
    one, other = (struct.pack(f"<{len(values)}f", *values) for values in pair)
    assert cosine(one, other) == cosine(other, one)
    assert math.isclose(
        cosine(one, other), sum(a * b for a, b in zip(*pair, strict=True)), abs_tol=1e-9
    )


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.integers(1, 12))
def test_a_ranking_has_the_best_first_and_equals_as_they_came(
    scores: list[float], top_n: int
) -> None:
    documents = tuple(f"d{index}" for index in range(len(scores)))
    asked = Scores(("q",), documents, ("query", "documents"), NO_TERMS, ())
    answer = rerank_response(
        Ranking(asked, top_n, with_documents=True), scores, model="m", answer_id="r", num_tokens=5
    )
    results = answer["results"]
    assert len(results) == min(top_n, len(scores))
    keys = [(-one["relevance_score"], one["index"]) for one in results]
    assert keys == sorted(keys)
    for one in results:
        assert one["relevance_score"] == scores[one["index"]]
        assert one["document"] == {"text": f"d{one['index']}"}
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


def test_scores_are_told_in_order() -> None:
    answer = scores_response([0.5, 0.25], model="m", answer_id="s", created=7, num_tokens=5)
    assert answer["data"] == [
        {"object": "score", "index": 0, "score": 0.5},
        {"object": "score", "index": 1, "score": 0.25},
    ]
    assert (answer["object"], answer["created"], answer["model"]) == ("list", 7, "m")
