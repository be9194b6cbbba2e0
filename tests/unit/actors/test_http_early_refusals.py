from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.http_harness import COMPLETIONS, Harness, serving
from tests.tiny_models import write_model
from understudy.actors.http_early_refusals import HOLD_S, TENANTS_MAX, EarlyRefusals
from understudy.protocol.errors import Overloaded

FULL: Final = Overloaded("64 requests are waiting", retry_after_s=7.0)


def is_refused(
    refusals: EarlyRefusals,
    *,
    tenant: str = "a",
    priority: int = 0,
    num_bytes: int = 100,
    now: float = 0.0,
) -> bool:
    found = refusals.find(tenant=tenant, priority=priority, num_bytes=num_bytes, now=now)
    assert found is None or (found.message, found.retry_after_s) == (FULL.message, 7.0)
    return found is not None


def test_the_like_of_what_was_refused_is_refused_for_a_moment() -> None:
    refusals = EarlyRefusals()
    assert not is_refused(refusals)
    refusals.note(FULL, tenant="a", priority=0, num_bytes=100, now=0.0)
    assert is_refused(refusals)
    assert is_refused(refusals, num_bytes=101)
    assert is_refused(refusals, priority=1, now=HOLD_S / 2)
    assert not is_refused(refusals, now=HOLD_S)


def test_who_may_still_find_a_place_is_asked_for() -> None:
    refusals = EarlyRefusals()
    refusals.note(FULL, tenant="a", priority=0, num_bytes=100, now=0.0)
    assert not is_refused(refusals, tenant="b")
    assert not is_refused(refusals, priority=-1)
    assert not is_refused(refusals, num_bytes=99)


def test_who_comes_back_when_told_to_is_asked_for() -> None:
    refusals = EarlyRefusals()
    soon = Overloaded(FULL.message, retry_after_s=0.01)
    refusals.note(soon, tenant="a", priority=0, num_bytes=100, now=0.0)
    # The time that is told differs by a fifth to either side.
    assert refusals.find(tenant="a", priority=0, num_bytes=100, now=0.008) is None


def test_the_memory_is_bounded() -> None:
    refusals = EarlyRefusals()
    for number in range(TENANTS_MAX + 1):
        refusals.note(FULL, tenant=str(number), priority=0, num_bytes=100, now=0.0)
    assert not is_refused(refusals, tenant="0")
    assert is_refused(refusals, tenant=str(TENANTS_MAX))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path, max_position_embeddings=4096)


async def refused(harness: Harness, body: Any, *, key: str = "") -> tuple[str, str]:
    """Two headers of a refusal."""
    post = partial(harness.post, COMPLETIONS, body)
    async with post(Idempotency_Key=key) if key else post() as response:
        assert response.status == 503
        error = (await response.json())["error"]
        assert (error["code"], error["message"]) == ("overloaded", FULL.message)
        return response.headers["Retry-After"], response.headers["retry-after-ms"]


async def test_a_prompt_is_not_read_while_the_queue_is_full(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So long that the machine's load does not matter.
    monkeypatch.setattr("understudy.actors.http_early_refusals.HOLD_S", 1e6)
    async with serving(directory) as harness:
        body = {"prompt": "hello", "max_tokens": 3}
        first = asyncio.ensure_future(refused(harness, body))
        harness.gateway.fail(await harness.submitted(), FULL)
        await first
        read: list[str] = []
        monkeypatch.setattr(harness.served.tokenizer, "encode", lambda text, **_: read.append(text))
        retry_after, _ = await refused(harness, body)
        assert 5 <= int(retry_after) <= 9
        assert read == []
        assert len(harness.gateway.submitted) == 1


async def test_a_call_that_may_be_there_already_is_asked_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("understudy.actors.http_early_refusals.HOLD_S", 1e6)
    async with serving(directory) as harness:
        body = {"prompt": "hello", "max_tokens": 3}
        for count, key in enumerate(("", "x"), 1):
            call = asyncio.ensure_future(refused(harness, body, key=key))
            harness.gateway.fail(await harness.submitted(count), FULL)
            await call
