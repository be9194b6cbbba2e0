"""Structured output over HTTP: what reaches an engine, and what never does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.http_harness import CHAT, COMPLETIONS, HELLO, Harness, saying, serving
from tests.tiny_models import END_OF_TEXT_ID, write_model
from understudy.actors.scripted_gateway import ScriptedGateway
from understudy.protocol.errors import RequestError
from understudy.protocol.openai.answer import error_event, finish_reason_or_error
from understudy.protocol.request import FinishReason

SLOW = "(a{1000}){1000}"
"""Takes until the child is killed."""


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with serving(write_model(tmp_path / "model"), saying(70)) as harness:
        yield harness


def submitted(gateway: ScriptedGateway) -> list[str]:
    return [request.params.grammar for request in gateway.submitted]


async def test_each_choice_carries_the_grammar_and_can_end(harness: Harness) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "structured_outputs": {"grammar": 'root ::= "F"'}}
    await harness.answer(COMPLETIONS, body)
    [grammar] = set(submitted(harness.gateway))
    assert "start:" in grammar
    assert len(harness.gateway.submitted) == 4
    for request in harness.gateway.submitted:
        assert END_OF_TEXT_ID in request.params.stop_token_ids


async def test_an_answer_that_may_be_anything_carries_none(harness: Harness) -> None:
    await harness.answer(CHAT, {"messages": HELLO, "response_format": {"type": "text"}})
    assert submitted(harness.gateway) == [""]


@pytest.mark.parametrize(
    ("path", "param", "fields"),
    [
        (CHAT, "response_format", {"response_format": {"type": "json_schema", "json_schema": {}}}),
        (
            CHAT,
            "response_format",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": 1}},
                }
            },
        ),
        (COMPLETIONS, "structured_outputs.regex", {"structured_outputs": {"regex": "("}}),
        (COMPLETIONS, "response_format", {"response_format": {"type": "json_object"}}),
    ],
)
async def test_what_cannot_be_followed_reaches_no_engine(
    harness: Harness, path: str, param: str, fields: dict[str, Any]
) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    error = await harness.error(path, {**body, **fields})
    assert error["param"] == param
    assert harness.gateway.submitted == []


async def test_others_are_answered_while_a_grammar_takes_its_time(harness: Harness) -> None:
    body = {"prompt": "x", "structured_outputs": {"regex": SLOW}}
    slow = asyncio.ensure_future(harness.error(COMPLETIONS, body))
    for _ in range(3):
        await harness.answer(COMPLETIONS, {"prompt": "x"})
    assert not slow.done()
    assert (await slow)["param"] == "structured_outputs.regex"


def test_a_request_whose_grammar_failed_is_the_clients_affair() -> None:
    error = finish_reason_or_error(FinishReason.REFUSED)
    assert isinstance(error, RequestError)
    assert error.status == 400
    assert b"grammar" in error_event(error)
