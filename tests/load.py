"""Streams against a real cluster, each in a thread of its own, and what became of them.

A connection serves one call, so every call is also an attempt to connect.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Streamed(NamedTuple):
    """What came of one streamed completion."""

    text: str
    problem: str
    """Anything but a whole answer: a refusal, a reset, an error event, an end too early."""
    stall_s: float
    """The longest time between two events."""


def stream(base_url: str, prompt: str, *, max_tokens: int, **fields: Any) -> Streamed:
    """Stream one completion to its end."""
    address = urlsplit(base_url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    body = {"model": "understudy-demo", "prompt": prompt, "max_tokens": max_tokens, "stream": True}
    pieces: list[str] = []
    stall_s, last_at = 0.0, time.monotonic()
    with closing(connection):
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body | fields), headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                return Streamed("", f"HTTP {response.status}: {response.read()!r}", stall_s)
            for line in response:
                now = time.monotonic()
                stall_s, last_at = max(stall_s, now - last_at), now
                if line == b"data: [DONE]\n":
                    return Streamed("".join(pieces), "", stall_s)
                if line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        return Streamed("".join(pieces), f"{event['error']}", stall_s)
                    pieces += [choice["text"] for choice in event["choices"]]
        except (OSError, http.client.HTTPException) as error:
            return Streamed("".join(pieces), repr(error), stall_s)
    return Streamed("".join(pieces), "the stream just ended", stall_s)


class Load:
    """Streams that run while a test does something to the cluster."""

    def __init__(self) -> None:
        self.streams: list[Streamed] = []
        self.calls: list[Streamed] = []
        """Short calls, one after the other, for as long as the load lasts."""

    @property
    def problems(self) -> list[str]:
        """All that clients noticed."""
        return [one.problem for one in (*self.streams, *self.calls) if one.problem]


@contextmanager
def load(base_url: str, prompts: list[str], *, max_tokens: int, **fields: Any) -> Iterator[Load]:
    """Stream these prompts at once, and make short calls all the time; ends when all have ended."""
    result = Load()
    results: list[Streamed | None] = [None] * len(prompts)
    is_over = threading.Event()

    def one(index: int) -> None:
        results[index] = stream(base_url, prompts[index], max_tokens=max_tokens, **fields)

    def call_again_and_again() -> None:
        while not is_over.is_set():
            result.calls.append(stream(base_url, "hello", max_tokens=2))

    streams = [threading.Thread(target=one, args=(index,)) for index in range(len(prompts))]
    calls = threading.Thread(target=call_again_and_again)
    for thread in (*streams, calls):
        thread.start()
    try:
        yield result
    finally:
        is_over.set()
        for thread in (*streams, calls):
            thread.join()
        result.streams = [streamed for streamed in results if streamed is not None]
