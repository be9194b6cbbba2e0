"""Connections that send slowly, read slowly, or come too often; on both event loops."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import uvloop

from tests.certificates import make_certificate
from tests.http_harness import COMPLETIONS, Harness, saying, serving
from tests.tiny_models import write_model
from understudy.actors.http_answers import HttpLimits
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import TokenLogprobs
from understudy.runtime.kit.tls import Certificate

LOOPS: Final = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
LIMITS: Final = HttpLimits(
    header_timeout_s=0.3,
    idle_timeout_s=0.8,
    write_timeout_s=0.3,
    shutdown_timeout_s=0.1,
    connections_per_address=5,
)
GET_LIVE: Final = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


def on_loop(loop: str, main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(20.0):
            await main()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())


@asynccontextmanager
async def connection(
    harness: Harness, *, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(harness.host, harness.port, ssl=context)
    try:
        yield reader, writer
    finally:
        writer.close()


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection ends, in whichever way."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "begun",
    [b"", b"G", b"GET /live HTTP/1.1\r\nHost: x\r\n", b"POST / HTTP/1.1\r\nA: " + b"b" * 500],
)
def test_a_header_that_does_not_come_to_its_end_ends_the_connection(
    tmp_path: Path, loop: str, begun: bytes
) -> None:
    async def main() -> None:
        async with (
            serving(write_model(tmp_path), limits=LIMITS) as harness,
            connection(harness) as (reader, writer),
        ):
            writer.write(begun)
            assert await rest_of(reader) == b""

    on_loop(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_header_that_trickles_in_has_no_more_time_than_any_other(
    tmp_path: Path, loop: str
) -> None:
    async def main() -> None:
        async with (
            serving(write_model(tmp_path), limits=LIMITS) as harness,
            connection(harness) as (reader, writer),
        ):
            ended = asyncio.ensure_future(rest_of(reader))
            writer.write(b"GET /live HTTP/1.1\r\n")
            while not ended.done():
                if not writer.is_closing():
                    writer.write(b"A: b\r\n")
                await asyncio.wait({ended}, timeout=0.05)
            assert ended.result() == b""

    on_loop(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_second_header_has_its_own_time_and_so_has_a_pause(tmp_path: Path, loop: str) -> None:
    async def main() -> None:
        async with (
            serving(write_model(tmp_path), limits=LIMITS) as harness,
            connection(harness) as (reader, writer),
        ):
            for _ in range(2):
                writer.write(GET_LIVE)
                assert b"200 OK" in await reader.readuntil(b"}")
            began = asyncio.get_running_loop().time()
            writer.write(b"GET /live")
            assert await rest_of(reader) == b""
            assert asyncio.get_running_loop().time() - began >= LIMITS.header_timeout_s
        async with (
            serving(write_model(tmp_path), limits=LIMITS) as harness,
            connection(harness) as (reader, writer),
        ):
            writer.write(GET_LIVE)
            await reader.readuntil(b"}")
            began = asyncio.get_running_loop().time()
            assert await rest_of(reader) == b""
            assert asyncio.get_running_loop().time() - began >= LIMITS.idle_timeout_s

    on_loop(loop, main)


def test_an_answer_that_takes_long_is_no_slow_client(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(write_model(tmp_path), limits=LIMITS) as harness:
            body = {"prompt": "a", "max_tokens": 3}
            calling = asyncio.ensure_future(harness.answer(COMPLETIONS, body))
            asked = await harness.submitted()
            await asyncio.wait({calling}, timeout=1.5)
            assert not calling.done()
            harness.gateway.deliver(asked, 70, 71, 72, finish=2)
            assert (await calling)["usage"]["completion_tokens"] == 3

    on_loop("uvloop", main)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_answer_in_one_piece_that_nobody_reads_is_given_up(tmp_path: Path, loop: str) -> None:
    """aiohttp would keep it, and the connection, for as long as the client likes."""
    long = 40_000

    async def main() -> None:
        directory = write_model(tmp_path, max_position_embeddings=1 << 16)
        async with (
            serving(directory, limits=LIMITS) as harness,
            connection(harness) as (_, writer),
        ):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            body = b'{"prompt": "a", "ignore_eos": true, "logprobs": 5, "max_tokens": %d}' % long
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(body) + body)
            asked = await harness.submitted()
            logprobs = (TokenLogprobs(-0.5, tuple((n, -1.0) for n in range(5))),) * long
            harness.gateway.deliver(asked, *[70] * long, finish=2, logprobs=logprobs)
            assert harness.runner.server is not None
            while harness.runner.server.connections:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.02)

    on_loop(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_one_address_has_so_many_connections_and_not_more(tmp_path: Path, loop: str) -> None:
    async def main() -> None:
        limits = HttpLimits(connections_per_address=5, shutdown_timeout_s=0.1)
        async with serving(write_model(tmp_path), limits=limits) as harness:
            opened = [await asyncio.open_connection(harness.host, harness.port) for _ in range(5)]
            for reader, writer in opened:
                writer.write(GET_LIVE)
                assert b"200 OK" in await reader.readuntil(b"}")
            async with connection(harness) as (reader, _):
                refused = await rest_of(reader)
                assert refused.startswith(b"HTTP/1.1 503 ")
                assert b"Retry-After: 1\r\n" in refused
            opened[0][1].close()
            await opened[0][1].wait_closed()
            assert harness.runner.server is not None
            while len(harness.runner.server.connections) > 4:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
            async with connection(harness) as (reader, writer):
                writer.write(GET_LIVE)
                assert b"200 OK" in await reader.readuntil(b"}")
            for _, writer in opened[1:]:
                writer.close()

    on_loop(loop, main)


# TLS


def trusting(chain: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(chain))
    context.check_hostname = False
    return context


async def serial_of(harness: Harness, context: ssl.SSLContext) -> str:
    """Whom the server says that it is, on a new connection over which it answers."""
    async with connection(harness, context=context) as (reader, writer):
        writer.write(GET_LIVE)
        assert b"200 OK" in await reader.readuntil(b"}")
        shown = writer.get_extra_info("peercert")
        assert isinstance(shown, dict)
        return str(shown["serialNumber"])


@pytest.mark.parametrize("loop", LOOPS)
def test_a_new_certificate_counts_for_connections_that_come_after_it(
    tmp_path: Path, loop: str
) -> None:
    complaints: list[str] = []
    files = make_certificate(tmp_path)
    first = trusting(files.chain)
    certificate = Certificate(files.chain, files.key, complaints.append)

    async def main() -> None:
        directory = tmp_path / "model"
        directory.mkdir()
        async with serving(
            write_model(directory), saying(70), limits=LIMITS, certificate=certificate
        ) as harness:
            before = await serial_of(harness, first)
            async with connection(harness, context=first) as (reader, writer):
                writer.write(GET_LIVE)
                await reader.readuntil(b"}")
                make_certificate(tmp_path)
                certificate.reload()
                assert await serial_of(harness, trusting(files.chain)) != before
                writer.write(GET_LIVE)
                assert b"200 OK" in await reader.readuntil(b"}")
            files.key.write_text("no key")
            certificate.reload()
            assert len(complaints) == 1
            assert await serial_of(harness, trusting(files.chain)) != before
            async with connection(harness) as (reader, writer):
                writer.write(GET_LIVE)
                assert b"200" not in await rest_of(reader)

    on_loop(loop, main)


def test_a_key_that_does_not_fit_is_nothing_to_start_with(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory in (one, other):
        directory.mkdir()
        make_certificate(directory)
    with pytest.raises(ConfigurationError, match=r"key\.pem"):
        Certificate(one / "chain.pem", other / "key.pem", print)
    with pytest.raises(ConfigurationError, match="No such file"):
        Certificate(one / "none.pem", one / "key.pem", print)
