from __future__ import annotations

import asyncio
import gzip
import io
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import ClientConnectionResetError

from tests.http_harness import (
    CHAT,
    COMPLETIONS,
    HELLO,
    MODEL,
    Harness,
    error_of,
    saying,
    serving,
)
from tests.tiny_models import write_model
from understudy.actors.http_answers import HttpLimits
from understudy.protocol.errors import Quarantined, Unavailable
from understudy.protocol.messages import ClusterState
from understudy.protocol.openai.answer import system_fingerprint
from understudy.protocol.request import Request
from understudy.runtime.log import configure_logging

BODY_BYTES_MAX = 1 << 16
GENERATING = (CHAT, COMPLETIONS)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
async def harness(directory: Path) -> AsyncIterator[Harness]:
    limits = HttpLimits(body_bytes_max=BODY_BYTES_MAX, body_timeout_s=0.2, shutdown_timeout_s=0.1)
    async with serving(directory, saying(70), limits=limits) as harness:
        yield harness


async def get(harness: Harness, path: str, *, status: int = 200) -> Any:
    async with harness.session.get(path) as response:
        assert response.status == status
        return await response.json()


async def test_the_model_is_listed(harness: Harness) -> None:
    listed = await get(harness, "/v1/models")
    [model] = listed["data"]
    assert listed["object"] == "list"
    assert model["id"] == MODEL
    assert model["max_model_len"] == 256
    assert model["root"] == harness.served.directory.name
    assert await get(harness, f"/v1/models/{MODEL}") == model


async def test_another_model_is_not_found(harness: Harness) -> None:
    error = error_of(await get(harness, "/v1/models/other", status=404))
    assert error["code"] == "model_not_found"


async def test_a_models_name_may_have_a_slash(directory: Path) -> None:
    async with serving(directory, name="family/model-1") as harness:
        assert (await get(harness, "/v1/models/family/model-1"))["id"] == "family/model-1"
        assert (await get(harness, "/v1/models/family%2Fmodel-1"))["id"] == "family/model-1"


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_health_says_why_nothing_can_be_served(harness: Harness, path: str) -> None:
    ready = await get(harness, path)
    assert (ready["engines_serving"], ready["engines_known"]) == (1, 1)
    harness.gateway.cluster = ClusterState(engines_serving=0, engines_known=2, max_model_len=0)
    error = error_of(await get(harness, path, status=503))
    assert error["message"] == "none of 2 engines is serving"
    harness.gateway.cluster = ClusterState(
        engines_serving=2, engines_known=2, max_model_len=0, is_draining=True
    )
    assert error_of(await get(harness, path, status=503))["message"] == "draining"
    harness.gateway.is_connected = False
    error = error_of(await get(harness, path, status=503))
    assert error["message"] == "the supervisor cannot be reached"


async def test_a_living_gateway_says_so_whatever_the_cluster_does(harness: Harness) -> None:
    harness.gateway.is_connected = False
    assert await get(harness, "/live") == {"status": "alive"}


async def test_a_probe_may_ask_without_a_body(harness: Harness) -> None:
    async with harness.session.head("/health") as response:
        assert response.status == 200


async def test_the_version_is_told(harness: Harness) -> None:
    assert set(await get(harness, "/version")) == {"version"}


async def test_an_unknown_path_is_an_error_object(harness: Harness) -> None:
    for path in ("/", "/v1", "/v1/chat/completions/", "/v2/models", "/v1/../admin"):
        assert error_of(await get(harness, path, status=404))["code"] == "not_found"


async def test_the_wrong_method_is_an_error_object(harness: Harness) -> None:
    async with harness.session.get(CHAT) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert error_of(await response.json())["code"] == "method_not_allowed"
    async with harness.session.delete("/v1/models") as response:
        assert response.status == 405


async def test_a_failure_of_ours_is_an_error_object_without_its_cause(directory: Path) -> None:
    def fail(_: Request) -> Iterable[int]:
        raise RuntimeError("a secret")

    async with serving(directory, fail) as harness:
        for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "x"})):
            for stream in (False, True):
                error = await harness.error(path, {**body, "stream": stream}, status=500)
                assert error["code"] == "internal_error"
                assert "secret" not in error["message"]


async def test_a_refusal_says_when_to_come_back_each_time_a_little_differently(
    harness: Harness,
) -> None:
    harness.gateway.cluster = ClusterState(engines_serving=0, engines_known=0, max_model_len=0)
    waits = set()
    for _ in range(20):
        async with harness.session.get("/ready") as response:
            milliseconds = int(response.headers["retry-after-ms"])
            assert int(response.headers["Retry-After"]) == -(-milliseconds // 1000)
            assert 800 <= milliseconds <= 1200
            waits.add(milliseconds)
    assert len(waits) > 5


async def test_no_client_is_told_to_wait_longer_than_clients_do(directory: Path) -> None:
    async with serving(directory) as harness:

        async def engine() -> None:
            request = await harness.submitted()
            harness.gateway.fail(request, Unavailable("later", retry_after_s=1e6))

        task = asyncio.ensure_future(engine())
        async with harness.post(COMPLETIONS, {"prompt": "x"}) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "120"
        await task


async def test_what_engines_died_of_is_not_to_be_tried_again(directory: Path) -> None:
    async with serving(directory) as harness:

        async def engine() -> None:
            request = await harness.submitted()
            harness.gateway.fail(request, Quarantined("engines died of this request"))

        task = asyncio.ensure_future(engine())
        async with harness.post(COMPLETIONS, {"prompt": "x"}) as response:
            assert response.status == 500
            assert response.headers["x-should-retry"] == "false"
            assert (await response.json())["error"]["code"] == "request_quarantined"
        await task


async def test_answers_name_what_computed_them(harness: Harness) -> None:
    for numerics in (("exact",), ("exact", "fast")):
        harness.gateway.cluster = ClusterState(1, 1, 0, numerics=numerics)
        for path in GENERATING:
            body = {"prompt": "x"} if path == COMPLETIONS else {"messages": HELLO}
            answer = await harness.answer(path, {**body, "max_tokens": 2})
            assert answer["system_fingerprint"] == system_fingerprint(numerics)


async def test_a_request_keeps_its_clients_name(harness: Harness) -> None:
    for path, status in ((COMPLETIONS, 200), ("/nothing", 404)):
        async with harness.post(path, {"prompt": "x"}, X_Request_Id="abc-1") as response:
            assert response.status == status
            assert response.headers["X-Request-Id"] == "abc-1"


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "größe", "a\tb"])
async def test_a_name_that_is_unfit_is_replaced(harness: Harness, name: str) -> None:
    async with harness.post(COMPLETIONS, {"prompt": "x"}, X_Request_Id=name) as response:
        given = response.headers["X-Request-Id"]
    assert given
    assert given != name


@pytest.mark.parametrize("path", GENERATING)
async def test_a_body_that_is_too_large_is_refused_by_what_it_says(
    harness: Harness, path: str
) -> None:
    async with harness.post(path, raw=b" " * (BODY_BYTES_MAX + 1)) as response:
        assert response.status == 413
        assert error_of(await response.json())["code"] == "payload_too_large"


@pytest.mark.parametrize("path", GENERATING)
async def test_a_body_that_turns_out_too_large_is_refused(harness: Harness, path: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(BODY_BYTES_MAX // 1024 + 1):
            yield b" " * 1024

    headers = {"Content-Type": "application/json"}
    async with harness.session.post(path, data=pieces(), headers=headers) as response:
        assert response.status == 413
        assert error_of(await response.json())["code"] == "payload_too_large"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "x"])
async def test_a_compressed_body_is_refused_unread(harness: Harness, coding: str) -> None:
    for raw in (gzip.compress(b" " * (64 << 20)), b'{"prompt": "x"}'):
        async with harness.post(COMPLETIONS, raw=raw, Content_Encoding=coding) as response:
            assert response.status in {400, 413}
            error_of(await response.json())


async def test_a_body_that_does_not_come_is_not_waited_for(harness: Harness) -> None:
    reader, writer = await asyncio.open_connection(harness.host, harness.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"prompt"'
    )
    status, *_ = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"]
)
async def test_a_body_of_another_type_is_refused(
    harness: Harness, path: str, content_type: str
) -> None:
    async with harness.post(path, {}, Content_Type=content_type) as response:
        assert response.status == 400
        assert "content type" in error_of(await response.json())["message"]


async def test_the_type_of_a_body_may_have_a_parameter_or_be_left_out(harness: Harness) -> None:
    typed = "application/json; charset=utf-8"
    async with harness.post(COMPLETIONS, {"prompt": "x"}, Content_Type=typed) as response:
        assert response.status == 200
    reader, writer = await asyncio.open_connection(harness.host, harness.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b'Content-Length: 15\r\n\r\n{"prompt": "x"}'
    )
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()


ABUSE: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "array": b"[]",
    "string": b'"x"',
    "deep": b"[" * 100_000,
    "deep object": b'{"prompt":' * 5000 + b"1" + b"}" * 5000,
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "long integer": b'{"seed": ' + b"9" * 5000 + b"}",
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": -Infinity}',
    "1e400": b'{"temperature": 1e400}',
    "duplicate key": b'{"prompt": "x", "n": 1, "n": 1}',
    "true for an int": b'{"prompt": "x", "max_tokens": true}',
    "number as string": b'{"prompt": "x", "temperature": "1"}',
    "2**64": b'{"prompt": "x", "seed": 18446744073709551616}',
    "float for an int": b'{"prompt": "x", "n": 1.0}',
    "NUL key": b'{"\\u0000": 1}',
    "trailing": b'{"prompt": "x"} {}',
    "bad model": b'{"prompt": "x", "model": 3}',
}


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("name", ABUSE)
async def test_abuse_is_refused_and_reaches_no_engine(
    harness: Harness, path: str, name: str
) -> None:
    raw = ABUSE[name]
    if path == CHAT:
        raw = raw.replace(b'"prompt": "x"', b'"messages": [{"role": "user", "content": "x"}]')
    async with harness.post(path, raw=raw[:BODY_BYTES_MAX]) as response:
        assert response.status == 400
        error = error_of(await response.json())
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300
    assert harness.gateway.submitted == []


WRONG_FIELDS: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 10**9),
    ("max_tokens", -1),
    ("max_tokens", 2**63),
    ("temperature", -1),
    ("top_k", -5),
    ("seed", 2**64),
    ("logit_bias", {str(key): 1 for key in range(2000)}),
    ("stop", [str(key) for key in range(5000)]),
    ("stop", "x" * 10_000),
    ("stop_token_ids", [-1]),
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("guided_regex", "(a+)+"),
    ("chat_template", "{{ 1 }}"),
    ("stream_options", {"include_usage": True}),
    ("stream", "yes"),
]


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS)
@pytest.mark.parametrize("path", GENERATING)
async def test_a_wrong_field_is_named(harness: Harness, path: str, field: str, value: Any) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    error = await harness.error(path, {**body, field: value})
    assert error["param"] == field
    assert harness.gateway.submitted == []


async def test_requests_that_are_no_http_disturb_neither_others_nor_the_log(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    for raw in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST " + b"/" * 20_000 + b"\r\n\r\n"):
        reader, writer = await asyncio.open_connection(harness.host, harness.port)
        writer.write(raw)
        writer.write_eof()
        assert not (await reader.read()).startswith(b"HTTP/1.1 2")
        writer.close()
        await writer.wait_closed()
    await harness.answer(COMPLETIONS, {"prompt": "x"})
    assert caplog.records == []


async def test_very_many_headers_are_refused(harness: Harness) -> None:
    async with harness.post(COMPLETIONS, {"prompt": "x"}, Big="x" * 100_000) as response:
        assert response.status == 400


async def test_a_client_who_has_gone_fills_no_log(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("aiohttp.server")
    for error in (ConnectionResetError("gone"), ClientConnectionResetError("gone")):
        logger.error("Error handling request", exc_info=error)
    assert caplog.records == []
    logger.error("Error handling request", exc_info=ValueError("ours"))
    assert len(caplog.records) == 1


async def test_what_fails_is_logged_without_what_was_sent(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a secret prompt")

    log, handlers, level = io.StringIO(), logging.root.handlers, logging.root.level
    configure_logging("gateway-0", stream=log)
    try:
        monkeypatch.setattr(harness.gateway, "submit", fail)
        error = await harness.error(COMPLETIONS, {"prompt": "a secret prompt"}, status=500)
        monkeypatch.setattr(harness.gateway, "look_up", fail)
        path = "/v1/responses/resp_00000000000000ab"
        async with harness.session.get(path) as response:
            assert response.status == 500
    finally:
        logging.root.handlers = handlers
        logging.root.setLevel(level)
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
    assert error["code"] == "internal_error"
    assert log.getvalue().count("a request failed") == 2
    assert "/v1/responses/{id}" in log.getvalue()
    for secret in ("secret", "00ab"):
        assert secret not in log.getvalue()
