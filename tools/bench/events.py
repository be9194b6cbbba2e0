"""Server-sent events, and what one streamed answer shows of itself. Pure: bytes and times in.

The parser is made for a client that shares its processor with the server under test. It splits
bytes and counts; of a stream's chunks it decodes the JSON of the first, the last and the usage
alone, and takes a chunk in between for what it is by looking for ``"finish_reason":null``.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

EVENT_BYTES_MAX: Final = 1024 * 1024
"""A longer event is refused: the parser holds an unfinished event in memory."""

_FINISH_NULL: Final = b'"finish_reason":null'
_FINISH_NULL_SPACED: Final = b'"finish_reason": null'
"""How encoders write it. In text the quotes would be escaped, so text cannot look like this."""


class Failure(NamedTuple):
    """Why a request counts as an error: a kind to count by, and words for a reader."""

    kind: str
    """``connect``, ``http_<status>``, ``timeout``, ``stream_error``, ``stream_cut``,
    ``no_finish_reason``, ``wrong_length``, ``bad_response`` or ``client_limit``."""
    detail: str


class EventParser:
    """Cuts a stream into events (WHATWG HTML, 9.2.6); any cut of the bytes gives the same events.

    Comments and events without data are dropped. A line ends with LF, CR LF or CR.
    """

    __slots__ = ("_carry",)

    def __init__(self) -> None:
        self._carry = b""

    def feed(self, payload: bytes) -> list[bytes]:
        """Give the events that ``payload`` completes, as raw blocks of lines; see event_data.

        Raises:
            ValueError: An event is longer than EVENT_BYTES_MAX.
        """
        if (
            not self._carry
            and payload.find(b"\n\n") == len(payload) - 2
            and payload.find(b"\r") < 0
            and (payload.startswith(b"data:") or payload.find(b"\ndata:") >= 0)
        ):
            # One whole event and nothing else, as a token mostly comes.
            return [payload[:-2]]
        buffer = self._carry + payload if self._carry else payload
        held = b""
        if b"\r" in buffer:
            # A CR at the very end may be half of a CR LF, so it waits for the next byte.
            if buffer.endswith(b"\r"):
                buffer, held = buffer[:-1], b"\r"
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = buffer.rfind(b"\n\n")
        if end < 0:
            self._keep(buffer + held)
            return []
        self._keep(buffer[end + 2 :] + held)
        return [
            block
            for block in buffer[:end].split(b"\n\n")
            if block.startswith(b"data:") or b"\ndata:" in block
        ]

    def _keep(self, rest: bytes) -> None:
        if len(rest) > EVENT_BYTES_MAX:
            raise ValueError(f"an event of more than {EVENT_BYTES_MAX} bytes")
        self._carry = rest


def event_data(block: bytes) -> bytes:
    """The data of an event: its ``data`` lines without field name and one space, joined by LF."""
    return b"\n".join(
        line[6:] if line.startswith(b"data: ") else line[5:]
        for line in block.split(b"\n")
        if line.startswith(b"data:")
    )


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


class CompletionStream:
    """One streamed answer: when its tokens came, how many, and whether it ended as it must.

    A *token event* is a data event with a choice, but for a chat's opening chunk (a role and no
    text) and a closing chunk that has a finish reason and no text. An *arrival* is one read of
    the socket that brings at least one token event.
    """

    __slots__ = (
        "_decoder",
        "arrivals",
        "failure",
        "finish_reason",
        "first_token_at_s",
        "gaps_s",
        "is_done",
        "last_token_at_s",
        "num_completion_tokens",
        "num_prompt_tokens",
        "token_events",
    )

    def __init__(self) -> None:
        self.first_token_at_s: float | None = None
        self.last_token_at_s: float | None = None
        self.gaps_s: list[float] = []
        """Times between consecutive arrivals."""
        self.arrivals = 0
        self.token_events = 0
        self.num_prompt_tokens: int | None = None
        self.num_completion_tokens: int | None = None
        self.finish_reason: str | None = None
        self.is_done = False
        self.failure: Failure | None = None
        self._decoder = msgspec.json.Decoder(_Chunk)

    def arrive(self, blocks: list[bytes], now_s: float) -> None:
        """Take the events that one read of the socket completed, at the time of that read."""
        last_s = self.last_token_at_s
        tokens = 0
        for block in blocks:
            # find() costs half of what the operator "in" does on bytes.
            is_between = block.find(_FINISH_NULL) >= 0 or block.find(_FINISH_NULL_SPACED) >= 0
            if (is_between and last_s is not None) or self._examine(event_data(block)):
                tokens += 1
        if not tokens:
            return
        if last_s is None:
            self.first_token_at_s = now_s
        else:
            self.gaps_s.append(now_s - last_s)
        self.last_token_at_s = now_s
        self.arrivals += 1
        self.token_events += tokens

    def _examine(self, data: bytes) -> bool:
        """Decode one event and note what it says; tell whether it is a token event."""
        if data == b"[DONE]":
            self.is_done = True
            return False
        if self.is_done:
            self._fail("bad_response", "an event after [DONE]")
            return False
        try:
            chunk = self._decoder.decode(data)
        except msgspec.DecodeError as error:
            self._fail("bad_response", f"an event is no completion chunk: {error}")
            return False
        if chunk.error is not None:
            self._fail(
                "stream_error", msgspec.json.encode(chunk.error)[:500].decode("utf-8", "replace")
            )
            return False
        if chunk.usage is not None:
            self.num_prompt_tokens = chunk.usage.prompt_tokens
            self.num_completion_tokens = chunk.usage.completion_tokens
        if not chunk.choices:
            return False
        choice = chunk.choices[0]
        delta = choice.delta
        text = choice.text if delta is None else delta.content
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
            return bool(text)
        return bool(text) or delta is None or delta.role is None

    def _fail(self, kind: str, detail: str) -> None:
        if self.failure is None:
            self.failure = Failure(kind, detail)

    def close(self, *, expected_tokens: int | None) -> Failure | None:
        """Judge the stream after its last byte: None if it is whole.

        A stream that just stops is an error, however many tokens it brought: it needs a finish
        reason and ``[DONE]``. ``expected_tokens`` is the length asked for, if it must be met; it is
        held against the server's usage, where the server tells it.
        """
        if self.failure is not None:
            return self.failure
        if not self.is_done:
            return Failure("stream_cut", f"it ended after {self.token_events} events, no [DONE]")
        if self.finish_reason is None:
            return Failure("no_finish_reason", "[DONE] came without a finish reason")
        made = self.num_completion_tokens
        if None not in (made, expected_tokens) and made != expected_tokens:
            return Failure("wrong_length", f"{made} tokens made, {expected_tokens} asked for")
        return None

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer: the server's usage, or token events where it told none."""
        told = self.num_completion_tokens
        return self.token_events if told is None else told
