"""The tokenizer and the project's own API over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.http_harness import CHAT, HELLO, MODEL, Harness, chunks, saying_text, serving
from tests.tiny_models import CHATML, END_OF_TEXT, VOCAB_SIZE, write_model
from understudy.protocol.errors import InternalError
from understudy.protocol.messages import ClusterState
from understudy.protocol.openai.generate import BATCH_MAX, measures, summary
from understudy.protocol.timeline import RequestTimeline, TimelineEvent

GENERATE: Final = "/v1/generate"
BATCH: Final = "/v1/batch"
TOOL: Final = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML
    return write_model(tmp_path, chat_template=template, max_position_embeddings=4096)


@pytest.fixture
async def harness(directory: Path) -> AsyncIterator[Harness]:
    async with serving(
        directory, saying_text(directory, "one two"), tool_parser="hermes"
    ) as harness:
        yield harness


async def get(harness: Harness, path: str, status: int = 200) -> Any:
    async with harness.session.get(path) as response:
        answer = await response.json()
        assert response.status == status, answer
        return answer


async def test_a_text_is_tokenised_and_put_together_again(harness: Harness) -> None:
    text = "Zwölf 🦊" + END_OF_TEXT
    answer = await harness.answer("/tokenize", {"prompt": text, "return_token_strs": True})
    tokens = harness.served.tokenizer.encode(text, add_special_tokens=True)
    assert answer["tokens"] == tokens
    assert (answer["count"], answer["max_model_len"]) == (len(tokens), 4096)
    assert answer["token_strs"][-1] == END_OF_TEXT
    again = await harness.answer("/detokenize", {"model": MODEL, "tokens": tokens})
    assert again == {"prompt": text}


async def test_a_conversation_is_tokenised_as_it_would_be_answered(harness: Harness) -> None:
    body = {"messages": HELLO, "tools": [TOOL]}
    answer = await harness.answer("/tokenize", body)
    await harness.answer(CHAT, body)
    assert answer["tokens"] == list(harness.gateway.submitted[0].prompt)
    assert answer["token_strs"] is None


async def test_the_tokenizer_says_what_it_is(harness: Harness) -> None:
    info = await get(harness, "/tokenizer_info")
    assert info["eos_token"] == END_OF_TEXT
    assert info["chat_template"].endswith(CHATML)
    assert info["vocab_size"] <= VOCAB_SIZE


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "x" * 10**6}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
        (GENERATE, {}, "prompt"),
        (GENERATE, {"prompt": "x", "token_ids": [1]}, "prompt"),
        (GENERATE, {"token_ids": [VOCAB_SIZE]}, "prompt"),
        (GENERATE, {"prompt": "x", "temperature": -1}, "temperature"),
        (BATCH, {}, "requests"),
        (BATCH, {"requests": []}, "requests"),
        (BATCH, {"requests": [{"prompt": "x"}] * (BATCH_MAX + 1)}, "requests"),
        (BATCH, {"requests": [{"prompt": "x"}, {"prompt": "x", "n": 0}]}, "requests[1].n"),
        (BATCH, {"requests": [{"prompt": "x", "stream": True}]}, "requests[0].stream"),
        (BATCH, {"requests": [{"prompt": 5}]}, "requests[0].prompt"),
    ],
)
async def test_what_is_wrong_with_a_body_is_named(
    harness: Harness, path: str, body: dict[str, Any], param: str
) -> None:
    error = await harness.error(path, body)
    assert error["param"] == param
    assert harness.gateway.submitted == []


async def test_generation_tells_tokens_and_how_it_fared(harness: Harness) -> None:
    tokens = harness.tokens("three")
    answer = await harness.answer(GENERATE, {"token_ids": tokens, "n": 2, "max_tokens": 50})
    assert harness.gateway.submitted[0].prompt == tuple(tokens)
    said = harness.tokens("one two")
    for index, output in enumerate(answer["outputs"]):
        assert output["index"] == index
        assert output["text"] == "one two"
        assert output["token_ids"][:-1] == said
        assert output["finish_reason"] == "stop"
        fared = output["metrics"]
        assert (fared["queue_s"], fared["prefill_s"], fared["decode_s"]) == (1, 1, 1)
        assert (fared["latency_s"], fared["time_to_first_token_s"]) == (3, 2)
        assert fared["tokens_per_s"] == len(said)
        assert fared["output_tokens"] == len(said) + 1


async def test_a_stream_of_generation_has_the_events_of_completions(harness: Harness) -> None:
    stream = await harness.stream(GENERATE, {"prompt": "x"})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks(stream)) == "one two"


async def test_a_call_that_is_repeated_is_not_generated_again(harness: Harness) -> None:
    answers = []
    for _ in range(2):
        async with harness.post(GENERATE, {"prompt": "x"}, Idempotency_Key="k") as response:
            answers.append(await response.json())
    assert answers[0] == answers[1]
    assert len(harness.gateway.submitted) == 1
    async with harness.post(
        BATCH, {"requests": [{"prompt": "x"}]}, Idempotency_Key="k"
    ) as response:
        assert response.status == 400


async def test_each_request_of_a_batch_has_its_own_end(directory: Path) -> None:
    async with serving(directory) as harness:
        body = {"requests": [{"prompt": "x"}, {"prompt": "y", "max_tokens": 1}]}
        call = asyncio.ensure_future(harness.answer(BATCH, body))
        await harness.submitted(2)
        first, second = harness.gateway.submitted
        harness.gateway.fail(first, InternalError("the engine burns"))
        harness.gateway.deliver(second, *harness.tokens("o"), finish=2)
        answer = await call
    failed, done = answer["results"]
    assert failed["error"]["message"] == "the engine burns"
    assert done["outputs"][0]["finish_reason"] == "length"
    assert answer["metrics"]["output_tokens"] == 1


async def test_what_became_of_a_call_is_told_by_the_id_of_its_answer(harness: Harness) -> None:
    name = (await harness.answer(CHAT, {"messages": HELLO}))["id"]
    answer = await get(harness, f"/v1/requests/{name}")
    [request] = answer["requests"]
    assert [event["event"] for event in request["events"]] == [
        "queued",
        "assigned",
        "begun",
        "ended",
    ]
    assert request["finish_reason"] == "stop"
    same = await get(harness, f"/v1/requests/{name.removeprefix('chatcmpl-')}")
    assert same["requests"] == answer["requests"]
    for wrong in ("chatcmpl-0123456789abcdef", "x", "0" * 16, "resp_zz"):
        await get(harness, f"/v1/requests/{wrong}", status=404)


async def test_the_latest_requests_are_summed_up(harness: Harness) -> None:
    empty = await get(harness, "/v1/metrics")
    assert empty["summary"]["requests"] == 0
    assert empty["summary"]["latency_s_mean"] is None
    for _ in range(3):
        await harness.answer(GENERATE, {"prompt": "x"})
    answer = await get(harness, "/v1/metrics")
    assert answer["summary"]["requests"] == len(answer["requests"]) == 3
    assert answer["summary"]["latency_s_mean"] == 3


async def test_health_says_who_serves(harness: Harness) -> None:
    assert (await get(harness, "/v1/health"))["status"] == "healthy"
    harness.gateway.cluster = ClusterState(engines_serving=0, engines_known=2, max_model_len=0)
    answer = await get(harness, "/v1/health", status=503)
    assert (answer["status"], answer["engines_known"]) == ("unavailable", 2)


async def test_without_a_supervisor_nothing_is_known_of_requests(harness: Harness) -> None:
    harness.gateway.is_connected = False
    await get(harness, "/v1/metrics", status=503)


def test_the_share_of_guesses_that_came_true_is_told() -> None:
    events = (
        TimelineEvent(0.0, "queued"),
        TimelineEvent(0.5, "assigned", "engine-0.1"),
        TimelineEvent(2.0, "resumed", "engine-1.1"),
        TimelineEvent(2.5, "begun", "engine-1.1"),
    )
    timeline = RequestTimeline(1, 1, 10, 1, 8, 20, 15, 0, "", events)
    fared = measures(timeline)
    assert (fared["acceptance_ratio"], fared["cached_tokens"], fared["resumes"]) == (0.75, 8, 1)
    assert (fared["queue_s"], fared["prefill_s"]) == (0.5, 2.0)
    assert (fared["latency_s"], fared["decode_s"], fared["tokens_per_s"]) == (None, None, None)
    assert summary([timeline, timeline])["acceptance_ratio"] == 0.75
