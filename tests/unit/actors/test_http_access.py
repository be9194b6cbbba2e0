"""Who is let in: every route, every spelling of a path, every way to present a key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from tests.http_harness import (
    CHAT,
    COMPLETIONS,
    HELLO,
    Harness,
    error_of,
    saying,
    serving,
)
from tests.tiny_models import write_model
from understudy.runtime.keys import KeyRecord, KeyRing, make_key

ACME: Final = make_key("acme", created=0)
URGENT: Final = make_key("acme", created=0, priority=-5)
OTHER: Final = make_key("other", created=0)
FOREIGN: Final = make_key("acme", created=0, models=("another-model",))
BODY: Final = {"prompt": "a", "max_tokens": 1}
OPEN: Final = ("/health", "/live", "/ready")
TRICKS: Final = (
    *(
        "/",
        "//",
        "//health",
        "/health/",
        "/HEALTH",
        "/Live",
        "/health?deep=1",
        "/health?",
        "/ready;",
    ),
    *("/%68ealth", "/health%00", "/health%2f", "/health/../v1/models", "/v1/../health", "/health#"),
    *("/./health", "/health%20", "//v1/models", "/v1//models", "/v1/../v1/models", "/v1/models/"),
    *("/V1/models", "/%76%31/models", "/v1%2fmodels", "/v1/%2e%2e/v1/models", "/v1/./models"),
    *("/v1/models?a=/health", "/v1/models;/health", "/live/v1/models", "http://x/v1/models"),
    *("http://x/health", "*", "/v1/completions?x=/live", "/health\\..\\v1\\models", "/version"),
)


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    ring = KeyRing(new.record for new in (ACME, URGENT, OTHER, FOREIGN))

    async with serving(write_model(tmp_path), saying(70), find_key=ring.find) as harness:
        yield harness


async def raw(harness: Harness, head: str, body: bytes = b"") -> bytes:
    """The status line and headers of the answer to these bytes."""
    reader, writer = await asyncio.open_connection(harness.host, harness.port)
    writer.write(f"{head}\r\nHost: x\r\nConnection: close\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def test_every_route_asks_for_a_key_but_three(harness: Harness) -> None:
    assert harness.runner.app is not None
    paths = {
        (route.method, route.resource.canonical)
        for route in harness.runner.app.router.routes()
        if route.resource is not None
    }
    assert len(paths) > 8
    for method, path in sorted(paths):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
            async with harness.session.request(method, path, headers=headers) as response:
                assert response.status == (200 if path in OPEN else 401), (method, path)
                if response.status == 401:
                    assert response.headers["WWW-Authenticate"] == "Bearer"
                    if method != "HEAD":
                        # Anthropic's form has the same fields one level down.
                        error = (await response.json())["error"]
                        assert error["code"] == "invalid_api_key"
    assert harness.gateway.submitted == []


async def test_no_spelling_of_a_path_goes_round_the_key(harness: Harness) -> None:
    for target in TRICKS:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT"):
            answer = await raw(harness, f"{method} {target} HTTP/1.1")
            assert status_of(answer) in {400, 401}, (method, target, answer)


def spellings(path: str) -> list[str]:
    """Other ways to write a path, which one reader or another takes for it."""
    name = path.lstrip("/")
    first, _, rest = name.partition("/")
    return [
        *(f"//{name}", f"/./{name}", f"/x/../{name}", f"/{first}//{rest}", f"/{first}/./{rest}"),
        *(f"/%2e/{name}", f"/%2e%2e/{name}", f"/x/%2e%2e/{name}", f"/%2f{name}", f"/;/{name}"),
        *(f"{path};", f"{path};/health", f"{path}/", f"{path}//", f"{path}/.", f"{path}/%2e"),
        *(
            path.upper(),
            path.title(),
            f"/%{ord(name[0]):02x}{name[1:]}",
            f"{path}%00",
            f"{path}%20",
        ),
        *(
            f"http://x{path}",
            f"HTTP://x:1{path}",
            f"http://health{path}",
            f"{path}?",
            f"{path}?/live",
        ),
        *(f"/health/..{path}", f"/health/%2e%2e{path}", f"/live/..;{path}", f"/ready;/..{path}"),
        *(f"/health?{path}", f"/health%3f{path}", f"/health{path}", f"{path}#/health", f"\\{name}"),
        *(
            f"/health%2f..{path}",
            f"/health\\..{path}",
            f"{path}%2f..%2fhealth",
            f"{path}/../health",
        ),
    ]


@pytest.mark.parametrize(
    "head", ["", "\r\nAuthorization: Bearer wrong", "\r\nx-api-key: wrong"], ids=str.strip
)
async def test_no_spelling_of_any_route_goes_round_the_key(harness: Harness, head: str) -> None:
    assert harness.runner.app is not None
    routes = {
        (route.method, route.resource.canonical.replace("{id}", "resp_0000000000000001"))
        for route in harness.runner.app.router.routes()
        if route.resource is not None
    }
    asked = [
        (method, target)
        for method, path in sorted(routes)
        for target in spellings(path.replace("{model}", "tiny"))
    ]
    assert len(asked) > 1000
    # A status of 400 is that of a request line which is none.
    for method, target in asked:
        status = status_of(await raw(harness, f"{method} {target} HTTP/1.1{head}"))
        assert status in {400, 401}, (method, target)
    assert harness.gateway.submitted == []


async def test_what_a_load_balancer_asks_is_open(harness: Harness) -> None:
    for path in OPEN:
        assert status_of(await raw(harness, f"GET {path} HTTP/1.1")) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {ACME.key}"},
        {"Authorization": f"bearer {ACME.key}"},
        {"Authorization": f"BEARER  {ACME.key} "},
        {"x-api-key": ACME.key},
        {"X-Api-Key": ACME.key, "Authorization": f"Bearer {ACME.key}"},
    ],
)
async def test_a_key_may_be_presented_in_either_way(
    harness: Harness, headers: dict[str, str]
) -> None:
    async with harness.session.post(COMPLETIONS, json=BODY, headers=headers) as response:
        assert response.status == 200
    assert (await harness.submitted()).tenant == "acme"


NO_KEYS: Final = (
    "Authorization: Bearer",
    "Authorization: Bearer ",
    f"Authorization: {ACME.key}",
    f"Authorization: Basic {ACME.key}",
    f"Authorization: Bearer {ACME.key}x",
    f"Authorization: Bearer {ACME.key[:-1]}",
    f"Authorization: Bearer {ACME.key.swapcase()}",
    f"Authorization: Bearer {ACME.record.sha256}",
    f"Authorization: Bearer {ACME.record.id}",
    f"Authorization: Bearer {ACME.key}, Bearer {ACME.key}",
    f"Authorization: Bearer {ACME.key}\r\nAuthorization: Bearer {OTHER.key}",
    f"Authorization: Bearer {ACME.key}\r\nx-api-key: {OTHER.key}",
    f"x-api-key: {ACME.key}\r\nx-api-key: {ACME.key}",
    f"x-api-key: Bearer {ACME.key}",
    f"api-key: {ACME.key}",
    f"Cookie: Authorization=Bearer {ACME.key}",
    "Authorization: Bearer \u00fc\u20ac",
    f"Authorization: Bearer {'x' * 6000}",
)


async def test_what_is_not_quite_a_key_is_none(harness: Harness) -> None:
    for head in NO_KEYS:
        answer = await raw(harness, f"GET /v1/models HTTP/1.1\r\n{head}")
        assert status_of(answer) == 401, head
    answer = await raw(harness, f"GET /v1/models?api_key={ACME.key} HTTP/1.1")
    assert status_of(answer) == 401


async def test_only_a_key_for_urgent_calls_makes_a_call_urgent(harness: Harness) -> None:
    asked = [(ACME, -9), (ACME, 3), (URGENT, -9), (URGENT, -2), (URGENT, 4)]
    for new, priority in asked:
        body = {**BODY, "priority": priority}
        async with harness.post(COMPLETIONS, body, Authorization=f"Bearer {new.key}") as response:
            assert response.status == 200
    assert [one.priority for one in harness.gateway.submitted] == [0, 3, -5, -2, 4]


async def test_a_key_for_other_models_is_no_key_for_this_one(harness: Harness) -> None:
    for path, body in ((COMPLETIONS, BODY), (CHAT, {"messages": HELLO})):
        async with harness.post(path, body, Authorization=f"Bearer {FOREIGN.key}") as response:
            assert response.status == 404
            assert error_of(await response.json())["code"] == "model_not_found"
    assert harness.gateway.submitted == []


async def test_a_stream_is_joined_by_its_own_tenant_alone(harness: Harness) -> None:
    async with harness.post(COMPLETIONS, BODY, Authorization=f"Bearer {ACME.key}") as response:
        answer_id = (await response.json())["id"]
    statuses = []
    for new in (OTHER, URGENT):
        headers = {"Authorization": f"Bearer {new.key}"}
        async with harness.session.get(f"/v1/streams/{answer_id}", headers=headers) as response:
            statuses.append(response.status)
            await response.read()
    assert statuses == [404, 200]


@pytest.mark.parametrize("name", ["X-Request-Deadline-Ms", "x-llm-d-slo-ttft-ms"])
async def test_a_deadline_that_is_none_is_named(harness: Harness, name: str) -> None:
    for milliseconds in ("", "0", "-1", "1.5", "1e3", "x", "9" * 12, "86400001"):
        headers = {"x-api-key": ACME.key, name: milliseconds}
        async with harness.session.post(COMPLETIONS, json=BODY, headers=headers) as response:
            assert response.status == 400
            assert error_of(await response.json())["param"] == name


async def test_the_earlier_of_two_deadlines_counts(harness: Harness) -> None:
    headers = {"x-api-key": ACME.key, "X-Request-Deadline-Ms": "5000", "x-llm-d-slo-ttft-ms": "300"}
    for deadline_ms in (2000, 9000, None):
        body = {**BODY, "deadline_ms": deadline_ms}
        async with harness.session.post(COMPLETIONS, json=body, headers=headers) as response:
            assert response.status == 200
    first, second, third = harness.gateway.submitted
    assert first.deadline_s is not None
    assert 1.0 < first.deadline_s <= 2.0
    assert second.deadline_s is not None
    assert 4.0 < second.deadline_s <= 5.0
    assert third.deadline_s is not None
    assert third.first_token_s is not None
    assert third.first_token_s <= 0.3


async def test_a_deadline_in_the_body_is_checked_like_every_number(harness: Harness) -> None:
    for deadline_ms in (0, -1, 86_400_001, 1.5, "10", True):
        body = {**BODY, "deadline_ms": deadline_ms}
        async with harness.post(COMPLETIONS, body, x_api_key=ACME.key) as response:
            assert response.status == 400
            assert error_of(await response.json())["param"] == "deadline_ms"


async def test_without_keys_everybody_may_come_in(tmp_path: Path) -> None:
    async with serving(write_model(tmp_path), saying(70)) as harness:
        await harness.answer(COMPLETIONS, BODY)
        assert (await harness.submitted()).tenant == ""


def test_a_record_holds_no_key() -> None:
    assert isinstance(ACME.record, KeyRecord)
    assert ACME.key not in repr(ACME.record)
