"""The gateway's core and its HTTP: usage, limits and deadlines as a client is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.http_harness import CHAT, COMPLETIONS, HELLO, NOW, Harness, error_of, serving
from tests.tiny_models import write_model
from tests.unit.actors.gateway_stage import Listener, Stage, request
from understudy.protocol.errors import DeadlineExceeded, Overloaded, RateLimited
from understudy.protocol.messages import Failed, Message, Submit, UsageReply, UsageRequest, Welcome
from understudy.protocol.request import FinishReason
from understudy.protocol.usage import DayUsage
from understudy.runtime.keys import KeyRing, make_key
from understudy.runtime.kit.actor import SUPERVISOR

KEY = make_key("acme", created=0)
TODAY = int(NOW // 86_400)


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with serving(write_model(tmp_path), find_key=KeyRing([KEY.record]).find) as harness:
        yield harness


def join(stage: Stage, epoch: int) -> list[Message]:
    stage.turn()
    return stage.said(Welcome(epoch))


# The core


def test_what_is_submitted_again_has_what_is_left_of_its_time() -> None:
    stage = Stage()
    join(stage, 1)
    hasty = replace(request(1), deadline_s=10.0, first_token_s=2.0)
    stage.gateway.submit(hasty, Listener(), stage.now)
    stage.turn()
    stage.gateway.lose(SUPERVISOR, stage.now)
    stage.turn(after_s=4.0)
    [again] = [one for one in join(stage, 2) if isinstance(one, Submit)]
    assert again.request.deadline_s == 6.0
    assert again.request.first_token_s == 0.0


def test_usage_is_asked_once_for_all_who_want_it_and_never_waits_for_ever() -> None:
    stage = Stage()
    told: list[UsageReply | None] = []
    stage.gateway.ask_usage("a", told.append)
    assert told == [None]
    join(stage, 1)
    told.clear()
    stage.gateway.ask_usage("a", told.append)
    stage.gateway.ask_usage("a", told.append)
    assert stage.said() == [UsageRequest("a")]
    reply = UsageReply("a", (DayUsage(1, 2, 3, 4, 5, 6.0),))
    stage.turn(reply)
    assert told == [reply, reply]
    stage.gateway.ask_usage("a", told.append)
    stage.gateway.lose(SUPERVISOR, stage.now)
    assert told == [reply, reply, None]


def test_who_is_shed_is_told_when_to_come_back() -> None:
    stage = Stage()
    join(stage, 1)
    listener = Listener()
    stage.gateway.submit(request(1), listener, stage.now)
    stage.turn(Failed(1, "overloaded", "shed", 2.5))
    assert isinstance(listener.error, Overloaded)
    assert listener.error.retry_after_s == 2.5


# Over HTTP


async def get(harness: Harness, path: str, status: int = 200) -> Any:
    async with harness.session.get(path, headers={"x-api-key": KEY.key}) as response:
        assert response.status == status
        return await response.json()


async def test_a_tenant_sees_its_own_usage(harness: Harness) -> None:
    harness.gateway.used = {
        "acme": (DayUsage(TODAY - 1, 1, 10, 2, 20, 0.5), DayUsage(TODAY, 2, 30, 4, 40, 1.25)),
        "other": (DayUsage(TODAY, 9, 9, 9, 9, 9.0),),
    }
    answer = await get(harness, "/v1/usage")
    assert answer["tenant"] == "acme"
    assert [day["date"] for day in answer["data"]] == ["2023-11-13", "2023-11-14"]
    assert answer["total"] == {
        "requests": 3,
        "prompt_tokens": 40,
        "cached_tokens": 6,
        "output_tokens": 60,
        "kv_token_seconds": 1.75,
    }
    latest = await get(harness, "/v1/usage?days=1")
    assert [day["output_tokens"] for day in latest["data"]] == [40]
    for days in ("0", "93", "-1", "x", "1.5", "", "\u0661"):
        assert error_of(await get(harness, f"/v1/usage?days={days}", 400))["param"] == "days"
    harness.gateway.is_connected = False
    await get(harness, "/v1/usage", 503)


async def call(harness: Harness, path: str, body: Any) -> tuple[int, Any, Any]:
    async with harness.post(path, body, x_api_key=KEY.key) as response:
        return response.status, await response.json(), response.headers


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RateLimited("too fast", retry_after_s=3.0), 429, "rate_limit_error"),
        (Overloaded("full", retry_after_s=3.0), 503, "overloaded_error"),
        (DeadlineExceeded("too late"), 504, "deadline_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_says_whose_limit_it_is_and_when_to_come_back(
    harness: Harness, error: RateLimited, status: int, kind: str, *, stream: bool
) -> None:
    body = {"messages": HELLO, "stream": stream}
    calling = asyncio.ensure_future(call(harness, CHAT, body))
    harness.gateway.fail(await harness.submitted(), error)
    got, answer, headers = await calling
    assert got == status
    assert error_of(answer)["type"] == kind
    assert error_of(answer)["code"] == error.code
    if error.retry_after_s is None:
        assert headers["x-should-retry"] == "false"
    else:
        least = 3000 if status == 429 else 2400
        assert least <= int(headers["retry-after-ms"]) <= 3600
        assert 3 <= int(headers["Retry-After"]) <= 4


async def test_what_a_deadline_cuts_off_is_told_with_its_reason(harness: Harness) -> None:
    calling = asyncio.ensure_future(call(harness, COMPLETIONS, {"prompt": "a", "max_tokens": 9}))
    asked = await harness.submitted()
    harness.gateway.deliver(asked, *harness.tokens("partial text"))
    harness.gateway.deliver(asked, finish=FinishReason.DEADLINE)
    status, answer, _ = await calling
    assert status == 200
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("partial text", "deadline")


async def test_a_deadline_before_the_first_token_is_an_error(harness: Harness) -> None:
    calling = asyncio.ensure_future(call(harness, COMPLETIONS, {"prompt": "a", "max_tokens": 9}))
    harness.gateway.deliver(await harness.submitted(), finish=FinishReason.DEADLINE)
    status, answer, _ = await calling
    assert status == 504
    assert error_of(answer)["code"] == "deadline_exceeded"
