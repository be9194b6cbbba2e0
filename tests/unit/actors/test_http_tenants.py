"""Keys and deadlines at every interface: whose a call is, and how it ends when its time is over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.http_harness import CHAT, COMPLETIONS, HELLO, Harness, serving
from tests.tiny_models import write_model
from understudy.protocol.errors import DeadlineExceeded, RateLimited
from understudy.protocol.messages import ClusterState
from understudy.protocol.request import FinishReason, Request
from understudy.runtime.keys import KeyRing, make_key

ACME: Final = make_key("acme", created=0, priority=-5)
OTHER: Final = make_key("other", created=0)
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
BODIES: Final[dict[str, dict[str, Any]]] = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "a"},
    RESPONSES: {"input": "a"},
    MESSAGES: {"messages": HELLO, "max_tokens": 9},
    "/v1/generate": {"prompt": "a"},
    "/v1/batch": {"requests": [{"prompt": "a"}]},
}


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    """A server whose engine says what the test has it say."""
    ring = KeyRing(new.record for new in (ACME, OTHER))
    async with serving(write_model(tmp_path), find_key=ring.find) as harness:
        yield harness


async def call(
    harness: Harness, path: str, body: dict[str, Any], *, method: str = "POST", **headers: str
) -> tuple[int, Any]:
    """A call with a key: its status, and its JSON."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with harness.session.request(
        method, path, json=body or None, headers={"x-api-key": ACME.key, **named}
    ) as response:
        return response.status, await response.json()


async def ended(harness: Harness, path: str, *tokens: int, **body: Any) -> tuple[int, Any]:
    """A call whose time is over after these tokens."""
    asked = asyncio.ensure_future(call(harness, path, {**BODIES[path], **body}))
    request = await harness.submitted()
    if tokens:
        harness.gateway.deliver(request, *tokens)
    harness.gateway.deliver(request, finish=FinishReason.DEADLINE)
    return await asked


async def streamed(harness: Harness, path: str, *tokens: int) -> list[Any]:
    """The data of a stream whose time is over after these tokens."""
    post = harness.post(path, {**BODIES[path], "stream": True}, x_api_key=ACME.key)
    asked = asyncio.ensure_future(post.__aenter__())
    request = await harness.submitted()
    harness.gateway.deliver(request, *tokens)
    response = await asked
    harness.responses.append(response)
    harness.gateway.deliver(request, finish=FinishReason.DEADLINE)
    lines = (await response.text()).split("\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("path", BODIES)
async def test_every_request_is_its_tenants_and_has_its_deadline(
    harness: Harness, path: str
) -> None:
    asked = asyncio.ensure_future(
        call(harness, path, BODIES[path], X_Request_Deadline_Ms="5000", x_llm_d_slo_ttft_ms="800")
    )
    request = await harness.submitted()
    assert (request.tenant, request.priority) == ("acme", 0)
    assert request.deadline_s is not None
    assert 3.0 < request.deadline_s <= 5.0
    assert request.first_token_s is not None
    assert request.first_token_s <= 0.8
    harness.gateway.deliver(request, 70, finish=FinishReason.LENGTH)
    status, _ = await asked
    assert status == 200


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/v1/batch"])
async def test_a_deadline_in_the_body_is_taken_everywhere(harness: Harness, path: str) -> None:
    asked = asyncio.ensure_future(call(harness, path, {**BODIES[path], "deadline_ms": 5000}))
    request = await harness.submitted()
    assert request.deadline_s is not None
    assert 3.0 < request.deadline_s <= 5.0
    harness.gateway.deliver(request, 70, finish=FinishReason.LENGTH)
    assert (await asked)[0] == 200


async def test_the_wait_for_an_engine_is_taken_off_the_deadline(
    harness: Harness,
) -> None:
    harness.gateway.cluster = ClusterState(0, 1, 0)
    harness.gateway.is_hopeful = True
    asked = asyncio.ensure_future(
        call(harness, COMPLETIONS, BODIES[COMPLETIONS], X_Request_Deadline_Ms="60000")
    )
    await harness.gateway.wait_until(lambda gateway: gateway.num_waiting == 1)
    harness.clock.sleep(1.5)
    harness.gateway.settle(ClusterState(1, 1, 64))
    request = await harness.submitted()
    assert request.deadline_s is not None
    assert request.deadline_s <= 58.5
    harness.gateway.deliver(request, 70, finish=FinishReason.LENGTH)
    assert (await asked)[0] == 200


async def test_a_response_that_is_cut_off_tells_by_what(harness: Harness) -> None:
    for finish, reason in (
        (FinishReason.LENGTH, "max_output_tokens"),
        (FinishReason.DEADLINE, "deadline"),
        (FinishReason.STOP, None),
    ):
        number = len(harness.gateway.submitted) + 1
        asked = asyncio.ensure_future(call(harness, RESPONSES, BODIES[RESPONSES]))
        harness.gateway.deliver(await harness.submitted(number), 70, finish=finish)
        _, answer = await asked
        assert answer["status"] == ("completed" if reason is None else "incomplete")
        details = answer["incomplete_details"]
        assert details == (None if reason is None else {"reason": reason})


async def test_a_response_whose_time_is_over_is_incomplete(harness: Harness) -> None:
    tokens = harness.tokens("one two")
    status, answer = await ended(harness, RESPONSES, *tokens)
    assert (status, answer["status"]) == (200, "incomplete")
    assert answer["incomplete_details"] == {"reason": "deadline"}
    [message] = answer["output"]
    assert (message["status"], message["content"][0]["text"]) == ("incomplete", "one two")
    kept = await call(harness, f"{RESPONSES}/{answer['id']}", {}, method="GET")
    assert kept == (200, answer)


async def test_a_stream_of_a_response_tells_that_its_time_is_over(harness: Harness) -> None:
    told = await streamed(harness, RESPONSES, *harness.tokens("one two"))
    assert told[-1]["type"] == "response.incomplete"
    assert told[-1]["response"]["incomplete_details"] == {"reason": "deadline"}


async def test_a_response_in_background_that_got_no_token_in_time_has_failed(
    harness: Harness,
) -> None:
    _, answer = await call(harness, RESPONSES, {**BODIES[RESPONSES], "background": True})
    harness.gateway.deliver(await harness.submitted(), finish=FinishReason.DEADLINE)
    status, kept = await call(harness, f"{RESPONSES}/{answer['id']}", {}, method="GET")
    assert (status, kept["status"]) == (200, "failed")
    assert kept["error"]["code"] == "deadline_exceeded"


async def test_a_message_whose_time_is_over_was_cut_off(harness: Harness) -> None:
    status, answer = await ended(harness, MESSAGES, *harness.tokens("one two"))
    assert (status, answer["stop_reason"]) == (200, "max_tokens")
    assert answer["content"] == [{"type": "text", "text": "one two"}]


async def test_a_stream_of_a_message_tells_that_it_was_cut_off(harness: Harness) -> None:
    told = await streamed(harness, MESSAGES, *harness.tokens("one two"))
    assert [event["type"] for event in told[-2:]] == ["message_delta", "message_stop"]
    assert told[-2]["delta"]["stop_reason"] == "max_tokens"


async def test_the_native_interface_names_the_deadline(harness: Harness) -> None:
    _, answer = await ended(harness, "/v1/generate", *harness.tokens("one two"))
    assert answer["outputs"][0]["finish_reason"] == "deadline"


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/v1/batch"])
async def test_no_token_in_time_is_an_error(harness: Harness, path: str) -> None:
    status, answer = await ended(harness, path)
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    assert answer["error"]["type"] == ("timeout_error" if path == MESSAGES else "deadline_error")


async def test_of_a_batch_the_one_without_a_token_in_time_has_the_error(harness: Harness) -> None:
    status, answer = await ended(harness, "/v1/batch")
    assert status == 200
    assert answer["results"][0]["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/v1/batch"])
async def test_a_tenants_own_limit_is_told_in_each_form(harness: Harness, path: str) -> None:
    asked = asyncio.ensure_future(harness.post(path, BODIES[path], x_api_key=ACME.key).__aenter__())
    harness.gateway.fail(await harness.submitted(), RateLimited("too many", retry_after_s=7.0))
    response = await asked
    harness.responses.append(response)
    assert response.status == 429
    assert int(response.headers["Retry-After"]) >= 7
    answer = await response.json()
    assert answer["error"]["type"] == "rate_limit_error"
    assert answer["error"]["code"] == "rate_limit_exceeded"
    assert ("request_id" in answer) == (path == MESSAGES)


async def test_a_refused_deadline_is_not_tried_again(harness: Harness) -> None:
    asked = asyncio.ensure_future(
        harness.post(MESSAGES, BODIES[MESSAGES], x_api_key=ACME.key).__aenter__()
    )
    harness.gateway.fail(await harness.submitted(), DeadlineExceeded("it would be too late"))
    response = await asked
    harness.responses.append(response)
    assert response.status == 504
    assert response.headers["x-should-retry"] == "false"
    assert (await response.json())["error"]["type"] == "timeout_error"


async def test_nobody_sees_what_is_anothers(harness: Harness) -> None:
    asked = asyncio.ensure_future(call(harness, RESPONSES, BODIES[RESPONSES]))
    request: Request = await harness.submitted()
    harness.gateway.deliver(request, 70, finish=FinishReason.LENGTH)
    _, answer = await asked
    name = answer["id"]
    strangers = {"x_api_key": OTHER.key}
    further = {"input": "b", "previous_response_id": name}
    for method, path, body in (
        ("GET", f"{RESPONSES}/{name}", {}),
        ("DELETE", f"{RESPONSES}/{name}", {}),
        ("POST", f"{RESPONSES}/{name}/cancel", {}),
        ("GET", f"/v1/requests/{name}", {}),
        ("POST", RESPONSES, further),
    ):
        status, _ = await call(harness, path, body, method=method, **strangers)
        assert status == 404, (method, path)
    _, metrics = await call(harness, "/v1/metrics", {}, method="GET", **strangers)
    assert metrics["requests"] == []
    status, _ = await call(harness, f"{RESPONSES}/{name}", {}, method="GET")
    assert status == 200
