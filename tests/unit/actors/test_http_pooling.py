"""Calls for vectors over HTTP: side by side, as one, and on the caller's terms."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.encoders import BERT, XLM_ROBERTA_SCORER, write_encoder
from tests.http_harness import Harness, beside, error_of, serving
from tests.tiny_models import VOCAB_SIZE, write_model
from understudy.actors.http_answers import HttpLimits
from understudy.actors.http_pooled import OPEN_MAX
from understudy.actors.http_server import stop_http
from understudy.protocol.errors import Overloaded
from understudy.protocol.request import FinishReason, Pooling, PoolingKind, Request

EMBEDDINGS = "/v1/embeddings"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def vector_of(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def finish(harness: Harness, request: Request, *values: float) -> None:
    harness.gateway.deliver(request, finish=FinishReason.STOP, vector=vector_of(*values))


async def play(harness: Harness, count: int) -> None:
    """Give each request a vector that tells its first token, the latest first where it can be."""
    done = 0
    while done < count:
        await harness.submitted(done + 1)
        batch = harness.gateway.submitted[done:]
        done += len(batch)
        for request in reversed(batch):
            finish(harness, request, float(request.prompt[0]), 1.0)


async def test_inputs_are_pooled_side_by_side_and_answered_in_order(directory: Path) -> None:
    async with serving(directory) as harness:
        body = {"input": [[7, 1], [5], [9, 2, 3]], "user": "u", "extra": 1}
        answer = await beside(play(harness, 3), harness.answer(EMBEDDINGS, body))
        assert [one["embedding"] for one in answer["data"]] == [[7.0, 1.0], [5.0, 1.0], [9.0, 1.0]]
        assert [one["index"] for one in answer["data"]] == [0, 1, 2]
        assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
        first = harness.gateway.submitted[0]
        assert answer["id"] == f"embd-{first.group_id:016x}"
        for request in harness.gateway.submitted:
            assert request.pooling == Pooling(PoolingKind.LAST)
            assert request.group_id == first.request_id
            assert not request.presentation


async def test_a_large_call_has_a_window_open_and_no_more(directory: Path) -> None:
    async with serving(directory) as harness:
        inputs = [[number % VOCAB_SIZE] for number in range(3 * OPEN_MAX)]
        call = asyncio.ensure_future(harness.answer(EMBEDDINGS, {"input": inputs}))
        await harness.submitted(OPEN_MAX)
        assert len(harness.gateway.submitted) == harness.gateway.num_open == OPEN_MAX
        finish(harness, harness.gateway.submitted[3], 3.0)
        await harness.submitted(OPEN_MAX + 1)
        assert harness.gateway.num_open == OPEN_MAX
        for number in range(3 * OPEN_MAX):
            request = await harness.submitted(number + 1)
            if number != 3:
                finish(harness, request, float(number))
        answer = await call
        made = [one["embedding"] for one in answer["data"]]
        assert made == [[float(number)] for number in range(3 * OPEN_MAX)]


async def test_who_leaves_takes_all_of_a_call_along(directory: Path) -> None:
    async with serving(directory) as harness:
        await harness.leave(EMBEDDINGS, {"input": [[1]] * 300}, after=OPEN_MAX)
        await harness.cancelled(OPEN_MAX)
        assert harness.gateway.num_open == 0
        assert len(harness.gateway.submitted) == OPEN_MAX


async def test_what_one_request_is_refused_for_ends_the_call(directory: Path) -> None:
    async with serving(directory) as harness:

        async def refuse() -> None:
            request = await harness.submitted(3)
            harness.gateway.fail(request, Overloaded("full", retry_after_s=2.0))

        error = await beside(
            refuse(), harness.answer(EMBEDDINGS, {"input": [[1], [2], [3]]}, status=503)
        )
        assert error_of(error)["message"] == "full"
        assert harness.gateway.num_open == 0


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (FinishReason.DEADLINE, 504),
        (FinishReason.ERROR, 500),
        (FinishReason.LENGTH, 503),
        (FinishReason.STOP, 503),
    ],
)
async def test_an_end_without_a_vector_is_an_error(
    directory: Path, reason: FinishReason, status: int
) -> None:
    async with serving(directory) as harness:

        async def end() -> None:
            harness.gateway.deliver(await harness.submitted(), finish=reason)

        call = harness.answer(EMBEDDINGS, {"input": "a"}, status=status)
        error_of(await beside(end(), call))


async def test_terms_of_body_and_headers_reach_every_request(directory: Path) -> None:
    async with serving(directory) as harness:
        body = {"input": [[1], [2]], "priority": 4, "cache_salt": "s", "deadline_ms": 60_000}
        playing = asyncio.ensure_future(play(harness, 2))
        async with harness.post(EMBEDDINGS, body, X_Request_Deadline_Ms="5000") as response:
            assert response.status == 200
        await playing
        for request in harness.gateway.submitted:
            assert (request.priority, request.cache_salt) == (4, "s")
            assert request.deadline_s is not None
            assert 4.0 < request.deadline_s <= 5.0


async def test_a_call_waits_for_an_engine_that_may_be_back_in_a_moment(directory: Path) -> None:
    async with serving(directory) as harness:
        serving_cluster = harness.gateway.cluster
        harness.gateway.settle(type(serving_cluster)(0, 1, 0))
        harness.gateway.is_hopeful = True
        call = asyncio.ensure_future(harness.answer(EMBEDDINGS, {"input": [[1]]}))
        await harness.gateway.wait_until(lambda gateway: gateway.num_waiting == 1)
        assert not harness.gateway.submitted
        harness.gateway.settle(serving_cluster)
        await play(harness, 1)
        await call
        harness.gateway.settle(type(serving_cluster)(0, 1, 0))
        harness.gateway.is_hopeful = False
        await harness.answer(EMBEDDINGS, {"input": [[1]]}, status=503)


async def test_a_call_that_outlasts_the_gateway_is_told_so(directory: Path) -> None:
    limits = HttpLimits(shutdown_timeout_s=0.05)
    async with serving(directory, limits=limits) as harness:
        call = asyncio.ensure_future(harness.answer(EMBEDDINGS, {"input": [[1]]}, status=503))
        await harness.submitted()
        await stop_http(harness.runner)
        assert error_of(await call)["message"] == "the gateway is stopping"
        assert harness.gateway.num_open == 0


async def test_a_text_is_embedded_once_however_many_pairs_it_is_in(directory: Path) -> None:
    async with serving(directory) as harness:

        async def answer_all() -> None:
            for number, values in enumerate([(1.0, 0.0), (0.0, 1.0), (0.6, 0.8)]):
                finish(harness, await harness.submitted(number + 1), *values)

        body = {"query": "fox", "documents": ["dog", "lazy", "dog", "fox"], "top_n": 3}
        answer = await beside(answer_all(), harness.answer("/v1/rerank", body))
        assert len(harness.gateway.submitted) == 3
        assert [one["index"] for one in answer["results"]] == [3, 1, 0]
        scores = [one["relevance_score"] for one in answer["results"]]
        assert scores == pytest.approx([1.0, 0.6, 0.0])
        assert answer["results"][1]["document"] == {"text": "lazy"}
        tokens = sum(len(request.prompt) for request in harness.gateway.submitted)
        assert answer["usage"]["total_tokens"] == tokens


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (EMBEDDINGS, {"input": "fox " * 300}, 400, "input"),
        (EMBEDDINGS, {"input": ["a", "fox " * 300]}, 400, "input"),
        (EMBEDDINGS, {"input": [[1] * 256] * 1200}, 413, "input"),
        (EMBEDDINGS, {"input": [[VOCAB_SIZE]]}, 400, "input"),
        ("/v1/score", {"text_1": "a", "text_2": "fox " * 300}, 400, "text_2"),
        ("/v1/rerank", {"query": "a", "documents": ["fox " * 300]}, 400, "documents"),
    ],
)
async def test_what_cannot_be_is_refused_before_any_engine_hears_of_it(
    directory: Path, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    async with serving(directory) as harness:
        error = await harness.error(path, body, status=status)
        assert error["param"] == param
        assert not harness.gateway.submitted


async def test_a_vector_is_no_stream_that_can_be_joined(directory: Path) -> None:
    async with serving(directory) as harness:
        body = {"input": [[1]]}
        answer = await beside(play(harness, 1), harness.answer(EMBEDDINGS, body))
        group = answer["id"].removeprefix("embd-")
        for name in (group, f"chatcmpl-{group}", f"cmpl-{group}"):
            async with harness.session.get(f"/v1/streams/{name}") as response:
                assert response.status == 404
        async with harness.session.get(f"/v1/responses/resp_{group}") as response:
            assert response.status == 404
        async with harness.session.get(f"/v1/requests/{answer['id']}") as response:
            assert response.status == 200


async def test_an_encoder_is_asked_for_means_of_whole_texts(tmp_path: Path) -> None:
    async with serving(write_encoder(tmp_path, BERT)) as harness:
        body = {"input": "the quick fox", "dimensions": 2}
        await beside(play(harness, 1), harness.answer(EMBEDDINGS, body))
        [request] = harness.gateway.submitted
        assert request.pooling == Pooling(PoolingKind.MEAN, 2)
        assert (request.prompt[0], request.prompt[-1]) == (2, 3), "[CLS] and [SEP]"
        error = await harness.error("/v1/completions", {"prompt": "a"})
        assert "generates no text" in error["message"]
        told = await harness.answer("/tokenize", {"prompt": "the quick fox"})
        assert tuple(told["tokens"]) == request.prompt


async def test_pairs_are_put_together_by_the_models_own_template(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path, XLM_ROBERTA_SCORER)
    async with serving(directory) as harness:

        async def answer_all() -> None:
            for number, logit in enumerate((0.0, 800.0, -800.0)):
                finish(harness, await harness.submitted(number + 1), logit)

        body = {"text_1": "the fox", "text_2": ["a dog", "two dogs", "a"]}
        answer = await beside(answer_all(), harness.answer("/v1/score", body))
        assert [one["score"] for one in answer["data"]] == [0.5, 1.0, 0.0]
        first = harness.gateway.submitted[0]
        assert first.pooling == Pooling(PoolingKind.SCORE)
        pair = harness.served.tokenizer.encode_pair("the fox", "a dog")
        assert list(first.prompt) == pair.ids
        assert pair.ids.count(2) == 3, "<s> one </s></s> other </s>"
        error = await harness.error(EMBEDDINGS, {"input": "a"})
        assert error["param"] == "model"
