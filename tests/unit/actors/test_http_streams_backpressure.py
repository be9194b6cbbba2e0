"""Clients that read slowly or not at all, under both loops: they differ in when a writer pauses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
import uvloop

from tests.http_harness import SlowClient, serving
from tests.tiny_models import write_model
from understudy.actors.http_answers import HttpLimits
from understudy.actors.http_streams import PARK_AFTER_S
from understudy.protocol.request import FinishReason, Request

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
NUM_MANY = 20_000


def many(_: Request) -> list[int]:
    return [70 + place % 300 for place in range(NUM_MANY)]


MANY_BODY = b'{"prompt": [70], "stream": true, "max_tokens": %d, "ignore_eos": true}' % NUM_MANY


@pytest.mark.parametrize("loop", LOOPS)
def test_a_token_may_come_just_after_its_client_has_gone(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        directory = write_model(tmp_path, max_position_embeddings=1 << 16)
        async with serving(directory) as harness:
            body = {"prompt": [70], "stream": True, "max_tokens": 9}
            # The header comes with the first text.
            call = asyncio.ensure_future(harness.post("/v1/completions", body).__aenter__())
            request = await harness.submitted()
            harness.gateway.deliver(request, *harness.tokens("hello")[:2])
            async with await call as response:
                await response.content.readany()
                assert harness.runner.server is not None
                [connection] = harness.runner.server.connections
                assert connection.transport is not None
                connection.transport.abort()
                delivered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

                def deliver() -> None:
                    # The connection is closed, and the handler is not yet told.
                    try:
                        harness.gateway.deliver(request, 71, 72)
                    except Exception as error:  # noqa: BLE001 - it would end the gateway
                        delivered.set_exception(error)
                    else:
                        delivered.set_result(None)

                asyncio.get_running_loop().call_soon(deliver)
                await delivered
            await harness.cancelled()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_falls_behind_gets_all_of_the_text_in_fewer_chunks(
    loop: str, tmp_path: Path
) -> None:
    async def main() -> None:
        directory = write_model(tmp_path, max_position_embeddings=1 << 16)
        async with serving(directory, many) as harness:
            client = SlowClient(harness)
            await client.post(MANY_BODY)
            request = await harness.submitted()
            # The engine has said everything before the client reads a byte.
            while harness.gateway.num_open:  # noqa: ASYNC110 - the script ends by itself
                await asyncio.sleep(0)
            raw = await client.read_all()
            client.close()
            assert len(raw) < 600 * 1024
            lines = unchunked(raw).split(b"\n")
            data = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
            assert data[-1] == b"[DONE]"
            assert len(data) < NUM_MANY / 4
            texts = [msgspec.json.decode(chunk)["choices"][0]["text"] for chunk in data[:-1]]
            assert "".join(texts) == harness.served.tokenizer.decode(many(request))

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_does_not_read_is_given_up(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        directory = write_model(tmp_path, max_position_embeddings=1 << 16)
        limits = HttpLimits(write_timeout_s=0.05, shutdown_timeout_s=0.1)
        async with serving(directory, limits=limits) as harness:
            client = SlowClient(harness)
            await client.post(MANY_BODY)
            request = await harness.submitted()
            while harness.gateway.num_open:
                harness.gateway.deliver(request, *many(request)[:100])
                await asyncio.sleep(0)
            assert harness.gateway.cancelled == [request.request_id]
            with pytest.raises(ConnectionResetError):
                await client.read_all()
            client.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("has_stop", [False, True], ids=["parked", "watched for a stop string"])
def test_for_a_client_that_does_not_read_nothing_is_prepared_until_it_does(
    loop: str, has_stop: bool, tmp_path: Path
) -> None:
    async def main() -> None:
        directory = write_model(tmp_path, max_position_embeddings=1 << 16)
        async with serving(directory) as harness:
            client = SlowClient(harness)
            fields: dict[str, object] = {"prompt": [70], "stream": True, "max_tokens": NUM_MANY}
            if has_stop:
                fields["stop"] = "never said"
            await client.post(msgspec.json.encode(fields | {"ignore_eos": True}))
            request = await harness.submitted()
            gateway, tokens = harness.gateway, many(request)
            deadline = asyncio.get_running_loop().time() + 3 * PARK_AFTER_S
            told = 0
            while not gateway.parked and asyncio.get_running_loop().time() < deadline:
                part = tokens[told : min(told + 50, NUM_MANY // 2)]
                if part:
                    gateway.deliver(request, *part)
                told += len(part)
                await asyncio.sleep(0.001)  # the client's buffers are filled meanwhile
            assert [*gateway.parked.values()] == ([] if has_stop else [told])
            gateway.deliver(request, *tokens[told:], finish=FinishReason.LENGTH)
            raw = await client.read_all()
            client.close()
            data = [line for line in unchunked(raw).split(b"\n") if line.startswith(b"data: {")]
            texts = [msgspec.json.decode(line[6:])["choices"][0]["text"] for line in data]
            assert "".join(texts) == harness.served.tokenizer.decode(tokens)
            assert raw.count(b'"finish_reason":"length"') == 1
            assert not gateway.parked

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


def unchunked(raw: bytes) -> bytes:
    """The body of a chunked response, which must be complete."""
    _, _, rest = raw.partition(b"\r\n\r\n")
    pieces: list[bytes] = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert rest == b"\r\n"
            return b"".join(pieces)
        pieces.append(rest[:length])
        assert rest[length : length + 2] == b"\r\n"
        rest = rest[length + 2 :]


@pytest.mark.parametrize("loop", LOOPS)
def test_tokens_for_a_client_who_has_just_gone_hurt_nobody(loop: str, tmp_path: Path) -> None:
    """Between the end of its connection and that of its handler there is a turn of the loop."""

    async def main() -> None:
        directory = write_model(tmp_path, max_position_embeddings=1 << 16)
        async with serving(directory) as harness:
            for number in range(1, 21):
                client = SlowClient(harness)
                await client.post(MANY_BODY)
                request = await harness.submitted(number)
                harness.gateway.deliver(request, 70)
                await client.read_some()
                client.reset()
                while harness.gateway.num_open:
                    harness.gateway.deliver(request, 70)
                    await asyncio.sleep(0)
                assert harness.gateway.cancelled[-1] == request.request_id

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())
