"""A plain HTTP connection that sends any bytes, and reads whatever is answered."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final, NamedTuple

STREAM_BYTES_MAX: Final = 1 << 14
"""Of a stream; then the client goes away."""
BODY_BYTES_MAX: Final = 1 << 20


class Answer(NamedTuple):
    """What came back."""

    status: int
    """0: the connection was closed without an answer."""
    headers: dict[str, str]
    body: bytes
    waited_s: float
    """From the last byte sent to the first line of the answer."""


class Connection:
    """One connection to the gateway, opened again when it was closed."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(self, sent: bytes, *, is_head: bool, patience_s: float) -> Answer | None:
        """Send bytes, and read an answer; ``None``: it was not waited for any longer.

        Raises:
            ConnectionError: nobody listens.
        """
        was_open = self._streams is not None
        answer = await self._try(sent, is_head=is_head, patience_s=patience_s)
        if answer is not None and answer.status == 0 and was_open:
            # A server may close a connection that waits just when it is used (RFC 9112, 9.3.1).
            answer = await self._try(sent, is_head=is_head, patience_s=patience_s)
        return answer

    async def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            writer = self._streams[1]
            self._streams = None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _try(self, sent: bytes, *, is_head: bool, patience_s: float) -> Answer | None:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        try:
            async with asyncio.timeout(patience_s):
                writer.write(sent)
                with suppress(ConnectionError):
                    await writer.drain()  # who refuses at once may not read the rest
                return await self._read(reader, is_head=is_head)
        except TimeoutError:
            await self.close()
            return None
        except (OSError, EOFError, ValueError):
            await self.close()
            return Answer(0, {}, b"", 0.0)

    async def _read(self, reader: asyncio.StreamReader, *, is_head: bool) -> Answer:
        began_at = time.monotonic()
        line = await reader.readline()
        waited_s = time.monotonic() - began_at
        if not line:
            raise EOFError
        status = int(line.split()[1])
        headers: dict[str, str] = {}
        while (line := await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        if status == 100:
            return await self._read(reader, is_head=is_head)
        body = b""
        if not is_head and status not in {204, 304}:
            body = await self._body(reader, headers)
        if headers.get("connection", "").lower() == "close":
            await self.close()
        return Answer(status, headers, body, waited_s)

    async def _body(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            limit = (
                STREAM_BYTES_MAX if "event-stream" in headers["content-type"] else BODY_BYTES_MAX
            )
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
                if len(body) > limit:
                    await self.close()
                    return body
            await reader.readline()
            return body
        if "content-length" in headers:
            return await reader.readexactly(int(headers["content-length"]))
        body = await reader.read(BODY_BYTES_MAX)
        await self.close()
        return body
