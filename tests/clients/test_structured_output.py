"""Structured output through the official OpenAI client, against real processes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.cluster import Cluster, running_cluster

MODEL = "understudy-demo"
PROMPT = "def add(a, b):\n"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a long name for a property": {"type": "string", "maxLength": 10},
        "another long name": {"enum": ["first", "second"]},
        "numbers": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["a long name for a property", "another long name", "numbers"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(engines=2, engine="model") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[OpenAI]:
    base_url = f"{cluster.base_url}/v1"
    with OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def complete(client: OpenAI, structured: dict[str, Any], **options: Any) -> str:
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=150,
        extra_body={"structured_outputs": structured},
        **options,
    )
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    text: str = choice.text
    return text


def fits_schema(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


class Function(BaseModel):
    """What the client makes a schema of by itself."""

    kind: Literal["method", "function"]
    num_arguments: int
    is_async: bool


def test_the_client_parses_an_answer_into_its_own_class(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "a function that adds"}],
        response_format=Function,
        max_tokens=150,
        seed=3,
    )
    assert isinstance(answer.choices[0].message.parsed, Function)


def test_each_of_n_answers_follows_the_schema(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "a function that adds"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "it", "schema": SCHEMA, "strict": True},
        },
        max_tokens=200,
        n=4,
        seed=1,
    )
    texts = [choice.message.content or "" for choice in answer.choices]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert len(set(texts)) > 1
    assert all(map(fits_schema, texts))


def test_a_json_object_is_an_object(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "a function that adds"}],
        response_format={"type": "json_object"},
        max_tokens=200,
        temperature=0,
    )
    [choice] = answer.choices
    text = choice.message.content or ""
    assert text.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("structured", "is_so"),
    [
        ({"json": SCHEMA}, fits_schema),
        ({"regex": r"\d{3}/\d{4}"}, lambda text: re.fullmatch(r"\d{3}/\d{4}", text)),
        ({"choice": ["left", "right"]}, lambda text: text in {"left", "right"}),
        (
            {"grammar": 'start: "<" word ("," word)? ">"\nword: /[a-z]{1,5}/'},
            lambda text: re.fullmatch("<[a-z]{1,5}(,[a-z]{1,5})?>", text),
        ),
        (
            {"grammar": 'root ::= "yes" | "no" digit\ndigit ::= [0-9]'},
            lambda text: re.fullmatch("yes|no[0-9]", text),
        ),
    ],
)
def test_a_completion_has_the_form_that_is_asked_for(
    client: OpenAI, structured: dict[str, Any], is_so: Callable[[str], object]
) -> None:
    assert is_so(complete(client, structured, temperature=1.0, seed=7))


def test_a_stream_of_it_is_what_would_be_answered(client: OpenAI) -> None:
    whole = complete(client, {"json": SCHEMA}, seed=5)
    chunks = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=150,
        seed=5,
        stream=True,
        extra_body={"structured_outputs": {"json": SCHEMA}},
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole


def test_an_engine_may_die_in_the_middle_of_a_key(cluster: Cluster, client: OpenAI) -> None:
    whole = complete(client, {"json": SCHEMA}, seed=11)
    with client.completions.with_streaming_response.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=150,
        seed=11,
        stream=True,
        extra_body={"structured_outputs": {"json": SCHEMA}},
    ) as response:
        text, engines = "", []
        is_killed = False
        for line in response.iter_lines():
            if line.startswith(": engine "):
                engines.append(line.split()[2])
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if not is_killed and '"a lo' in text:
                is_killed = True
                assert "a long name for a property" not in text
                os.kill(cluster.pids()[engines[-1]], signal.SIGKILL)
    assert is_killed
    assert text == whole
    assert len(set(engines)) == 2
    cluster.wait_until_serving(engines=2)


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": "(a"}}),
        ("structured_outputs.json", {"structured_outputs": {"json": {"type": 1}}}),
        ("structured_outputs.json", {"structured_outputs": {"json": {"$ref": "#"}}}),
        (
            "structured_outputs.json",
            {"structured_outputs": {"json": {"$ref": "http://127.0.0.1/x"}}},
        ),
        ("structured_outputs.json", {"structured_outputs": {"json": {"uniqueItems": True}}}),
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": "start: x"}}),
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": "root ::= x"}}),
        ("min_tokens", {"structured_outputs": {"regex": "a"}, "min_tokens": 3}),
        ("ignore_eos", {"structured_outputs": {"regex": "a"}, "ignore_eos": True}),
        ("guided_json", {"guided_json": {"type": "object"}}),
    ],
)
def test_what_cannot_be_followed_is_refused_and_named(
    client: OpenAI, param: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, extra_body=fields)
    assert caught.value.param == param


def test_streams_go_on_while_grammars_are_refused(client: OpenAI) -> None:
    options: dict[str, Any] = {"seed": 2, "temperature": 1.0}
    whole = complete(client, {"json": SCHEMA}, **options)
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=150,
        stream=True,
        extra_body={"structured_outputs": {"json": SCHEMA}},
        **options,
    )
    text = next(iter(stream)).choices[0].text
    for bad in ("(a{1000}){1000}", "(", "a" * 100_000):
        with pytest.raises(openai.BadRequestError):
            complete(client, {"regex": bad})
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole


def test_a_grammar_that_grows_too_expensive_ends_with_a_clear_word(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="too expensive to follow"):
        complete(client, {"regex": "([a-z]{1,1000}){1,1000}"}, seed=1)
    assert complete(client, {"choice": ["fine"]}) == "fine"
