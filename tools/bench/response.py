"""HTTP/1.1 responses as far as a load generator reads them: the head, and where the body ends.

Knows bytes only: no sockets, no clock, nothing of server-sent events. Every decoder takes the
stream in whatever pieces it comes and gives the same body for any cut (RFC 9112, sections 4 to 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple, Protocol

HEAD_BYTES_MAX: Final = 65_536
LINE_BYTES_MAX: Final = 8_192
CHUNK_BYTES_MAX: Final = 64 * 1024 * 1024


class MalformedResponse(Exception):
    """The bytes are no HTTP/1.1 response, or break a limit."""


class ResponseHead(NamedTuple):
    """Status and header fields; names in lower case, the last of equal names wins."""

    status: int
    headers: Mapping[str, str]

    @property
    def retry_after_s(self) -> float | None:
        """When to come back, from ``retry-after-ms`` or ``Retry-After`` in seconds; else None.

        A date in ``Retry-After`` reads as absent.
        """
        for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
            value = self.headers.get(name, "")
            if value.isdecimal() and value.isascii():
                return int(value) * unit_s
        return None

    @property
    def is_kept_alive(self) -> bool:
        """Whether the server will read another request from this connection."""
        return self.headers.get("connection", "").lower() != "close"


def parse_head(data: bytes) -> ResponseHead:
    """Read a response's head: everything before the empty line.

    Raises:
        MalformedResponse: It does not begin with an HTTP/1.x status line.
    """
    status_line, *lines = data.decode("latin-1").split("\r\n")
    version, _, rest = status_line.partition(" ")
    code = rest[:3]
    if not version.startswith("HTTP/1.") or not (code.isdecimal() and len(code) == 3):
        raise MalformedResponse(f"no HTTP/1.1 status line: {status_line[:80]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return ResponseHead(int(code), headers)


class BodyDecoder(Protocol):
    """Takes the bytes after the head and gives the body's bytes."""

    is_finished: bool

    def feed(self, data: bytes) -> bytes:
        """Give the body bytes that ``data`` brings; raise MalformedResponse on a broken frame."""


class ChunkedDecoder:
    """A body in chunks (RFC 9112, section 7.1); extensions and trailers are skipped."""

    __slots__ = (
        "_buffer",
        "_is_at_size",
        "_is_in_trailers",
        "_is_past_data",
        "_remaining",
        "is_finished",
    )

    def __init__(self) -> None:
        self.is_finished = False
        self._buffer = b""
        self._is_at_size = True
        self._remaining = 0
        self._is_past_data = False
        self._is_in_trailers = False

    def feed(self, data: bytes) -> bytes:
        """Give the body bytes that ``data`` brings.

        Raises:
            MalformedResponse: A size is no hexadecimal number, a frame breaks a limit, or bytes
                follow the end.
        """
        if self._is_at_size and not self._buffer:
            # One read mostly brings one whole chunk: the token that the server just wrote.
            line_end = data.find(b"\r\n")
            if line_end > 0:
                size = _chunk_size(data[:line_end])
                if size and len(data) == line_end + size + 4 and data.endswith(b"\r\n"):
                    return data[line_end + 2 : -2]
        return self._feed_any(data)

    def _feed_any(self, data: bytes) -> bytes:
        """Take any piece of the stream, from any state."""
        buffer = self._buffer + data if self._buffer else data
        pieces: list[bytes] = []
        position = 0
        length = len(buffer)
        while position < length and not self.is_finished:
            if self._remaining:
                piece = buffer[position : position + self._remaining]
                pieces.append(piece)
                position += len(piece)
                self._remaining -= len(piece)
                self._is_past_data = not self._remaining
                continue
            line_end = buffer.find(b"\r\n", position)
            if line_end < 0:
                if length - position > LINE_BYTES_MAX:
                    raise MalformedResponse("a chunk's size line is too long")
                break
            if self._is_past_data:
                if line_end != position:
                    raise MalformedResponse("a chunk is longer than its size says")
                self._is_past_data = False
                self._is_at_size = True
            elif self._is_in_trailers:
                self.is_finished = line_end == position
            else:
                self._remaining = _chunk_size(buffer[position:line_end])
                self._is_at_size = False
                self._is_in_trailers = not self._remaining
            position = line_end + 2
        self._buffer = buffer[position:]
        if self.is_finished and self._buffer:
            raise MalformedResponse("bytes after the end of the response")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _chunk_size(line: bytes) -> int:
    """Read the line before a chunk's data."""
    try:
        size = int(line.partition(b";")[0], 16)
    except ValueError:
        raise MalformedResponse(f"no chunk size: {line[:40]!r}") from None
    if not 0 <= size <= CHUNK_BYTES_MAX:
        raise MalformedResponse(f"a chunk of {size} bytes")
    return size


class FixedLengthDecoder:
    """A body whose length the head told."""

    __slots__ = ("_remaining", "is_finished")

    def __init__(self, length: int) -> None:
        self._remaining = length
        self.is_finished = length == 0

    def feed(self, data: bytes) -> bytes:
        """Give ``data`` back, and count it.

        Raises:
            MalformedResponse: More bytes than the head told.
        """
        if len(data) > self._remaining:
            raise MalformedResponse("bytes after the end of the response")
        self._remaining -= len(data)
        self.is_finished = self._remaining == 0
        return data


class UntilCloseDecoder:
    """A body that ends with the connection: nobody can tell whether it is whole."""

    __slots__ = ("is_finished",)

    def __init__(self) -> None:
        self.is_finished = False

    def feed(self, data: bytes) -> bytes:
        """Give ``data`` back."""
        return data


def body_decoder(head: ResponseHead) -> BodyDecoder:
    """Choose how a response's body is framed (RFC 9112, section 6.3).

    Raises:
        MalformedResponse: The told length is no number.
    """
    if head.status in (204, 304):
        return FixedLengthDecoder(0)
    if head.headers.get("transfer-encoding", "").lower() == "chunked":
        return ChunkedDecoder()
    length = head.headers.get("content-length")
    if length is None:
        return UntilCloseDecoder()
    if not (length.isdecimal() and length.isascii()):
        raise MalformedResponse(f"content-length {length[:40]!r}")
    return FixedLengthDecoder(int(length))
