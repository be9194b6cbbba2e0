"""Streaming clients for chaos: many at once, each noting all that it is told, and how.

A client behaves as a good one does: it sends an idempotency key, and when its connection breaks
it goes on with ``GET /v1/streams/{id}`` and the ``Last-Event-ID`` that it has, or sends its call
again if it has none. How often it had to is part of the outcome.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import aiohttp

PATIENCE_S: Final = 120.0
"""A call that has not ended by then has failed."""
_AGAIN_AFTER_S: Final = 0.05


KEYS: Final = ("sk-chaos-one", "sk-chaos-two")
"""Of two tenants; servers that ask for no keys do not mind."""


class Call(NamedTuple):
    """A call to stream."""

    path: str
    body: dict[str, Any]
    key: str = KEYS[0]


Told: TypeAlias = tuple[dict[int, str], dict[int, str], dict[str, str], Any]
"""Texts and thoughts by choice, calls by choice and number, and usage."""


class Outcome(NamedTuple):
    """What a client was told in the end."""

    digest: str
    """Of the texts, thoughts, calls of tools, finish reasons, log probabilities and usage of all
    choices."""
    problem: str
    """Why the call failed; empty if it did not."""
    stall_s: float
    """The longest time without an event, from the call to the end."""
    num_joins: int
    """How often the client had to connect again."""
    num_repeated: int
    """Events whose positions were not beyond those before."""
    num_events: int
    told: Told = ({}, {}, {}, None)
    """What it was told, for who wants to look at it."""


class Progress:
    """How far all clients are; may be read from other threads."""

    def __init__(self) -> None:
        self.num_events = 0

    def wait_for_events(self, count: int) -> None:
        """Block until all clients together were told so many events."""
        deadline = time.monotonic() + PATIENCE_S
        while self.num_events < count and time.monotonic() < deadline:
            time.sleep(0.001)


class _Answer:
    """What one call was told so far, however many connections it took."""

    def __init__(self) -> None:
        self.stream_id = ""
        self.event_id = ""
        self.is_done = False
        self.error: Any = None
        self.stall_s = 0.0
        self.num_repeated = 0
        self.num_events = 0
        self._heard_at = time.monotonic()
        self._positions: tuple[int, ...] = ()
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._thoughts: defaultdict[int, list[str]] = defaultdict(list)
        self._calls: defaultdict[str, list[str]] = defaultdict(list)
        self._logprobs: defaultdict[int, list[Any]] = defaultdict(list)
        self._finish: dict[int, str] = {}
        self._usage: Any = None

    def take_line(self, line: bytes) -> bool:
        """Take in a line of the event stream; whether it is an event's data."""
        if line.startswith(b"id: "):
            self.event_id = line[4:].strip().decode()
            positions = tuple(map(int, self.event_id.partition(".")[2].split("-")))
            is_new = positions != self._positions and all(
                now >= before for now, before in zip(positions, self._positions, strict=False)
            )
            self._positions = positions
            self.num_repeated += not is_new
        if not line.startswith(b"data: "):
            return False
        self.num_events += 1
        now = time.monotonic()
        self.stall_s, self._heard_at = max(self.stall_s, now - self._heard_at), now
        if line.startswith(b"data: [DONE]"):
            self.is_done = True
            return True
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            self.error = event["error"]
            return True
        self.stream_id = event["id"]
        self._usage = event.get("usage") or self._usage
        for choice in event["choices"]:
            self._take_choice(choice)
        return True

    def _take_choice(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        delta = choice.get("delta", {})
        text = choice["text"] if "text" in choice else delta.get("content")
        self._texts[index].append(text or "")
        self._thoughts[index].append(delta.get("reasoning") or "")
        for call in delta.get("tool_calls", ()):
            # A call's id is drawn with its request, so it is another one in each run.
            function = call["function"]
            self._calls[f"{index}.{call['index']}"] += (
                *((function["name"], "(") if "name" in function else ()),
                function["arguments"],
            )
        logprobs = choice.get("logprobs") or {}
        self._logprobs[index] += zip(
            logprobs.get("tokens", ()), logprobs.get("token_logprobs", ()), strict=True
        )
        self._logprobs[index] += logprobs.get("content", ())
        if choice.get("finish_reason"):
            self._finish[index] = choice["finish_reason"]

    def outcome(self, problem: str, num_joins: int) -> Outcome:
        """What there is to say about it."""
        texts, thoughts = _joined(self._texts), _joined(self._thoughts)
        calls = _joined(self._calls)
        ends = [(self._logprobs[index], self._finish.get(index)) for index in texts]
        usage = self._usage
        if usage is not None:
            # What an engine had in its cache depends on what it was asked before.
            usage = {**usage, "prompt_tokens_details": None}
        told = (texts, thoughts, calls, usage)
        digest = hashlib.sha256(json.dumps((told, ends)).encode()).hexdigest()
        counts = (num_joins, self.num_repeated, self.num_events)
        return Outcome(digest, problem, self.stall_s, *counts, told)


K = TypeVar("K", int, str)


def _joined(pieces: Mapping[K, Sequence[str]]) -> dict[K, str]:
    return {name: "".join(parts) for name, parts in sorted(pieces.items())}


async def _one(
    session: aiohttp.ClientSession,
    base_url: str,
    call: Call,
    idempotency_key: str,
    progress: Progress,
) -> Outcome:
    answer = _Answer()
    headers = {"Idempotency-Key": idempotency_key, "Authorization": f"Bearer {call.key}"}
    deadline = time.monotonic() + PATIENCE_S
    num_joins = -1
    problem = ""
    while not (answer.is_done or problem) and time.monotonic() < deadline:
        num_joins += 1
        if num_joins:
            await asyncio.sleep(_AGAIN_AFTER_S)
        try:
            problem = await _connect(session, base_url, call, headers, answer, progress)
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            continue  # the connection broke
    if not (answer.is_done or problem):
        problem = f"no end within {PATIENCE_S:.0f} s"
    return answer.outcome(problem, num_joins)


async def _connect(
    session: aiohttp.ClientSession,
    base_url: str,
    call: Call,
    headers: dict[str, str],
    answer: _Answer,
    progress: Progress,
) -> str:
    """Begin or go on with a stream, over one connection; gives what went wrong for good."""
    if answer.event_id:
        url = f"{base_url}/v1/streams/{answer.stream_id}"
        request = session.get(url, headers={**headers, "Last-Event-ID": answer.event_id})
    else:
        request = session.post(base_url + call.path, json=call.body, headers=headers)
    async with request as response:
        if response.status != 200:
            return f"HTTP {response.status}: {await response.text()}"
        async for line in response.content:
            progress.num_events += answer.take_line(line)
            if answer.is_done:
                return ""
            if answer.error is not None:
                return f"error event: {answer.error}"
    return ""


def run_calls(
    base_url: str,
    calls: Sequence[Call],
    fault: Callable[[Progress], None] | None = None,
    *,
    idempotency_key: str | None = None,
) -> list[Outcome]:
    """Stream all calls at once, and let a fault happen beside them, in a thread of its own.

    Each call has an idempotency key of its own, unless one is given for all.
    """

    async def run() -> list[Outcome]:
        progress = Progress()
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            clients = [
                asyncio.ensure_future(
                    _one(session, base_url, call, idempotency_key or str(uuid.uuid4()), progress)
                )
                for call in calls
            ]
            if fault is not None:
                await asyncio.to_thread(fault, progress)
            return await asyncio.gather(*clients)

    return asyncio.run(run())


class Comparison(NamedTuple):
    """A run with faults beside the same run without."""

    num_calls: int
    num_failed: int
    num_changed: int
    num_repeated: int
    num_joins: int
    added_stalls_s: tuple[float, ...]
    """Of each call: its longest wait for an event, less that in the run without faults."""
    problems: tuple[str, ...]

    @property
    def added_stall_p99_s(self) -> float:
        """What one call in a hundred exceeds."""
        ordered = sorted(self.added_stalls_s)
        return max(0.0, ordered[math.ceil(0.99 * len(ordered)) - 1])

    @property
    def is_golden(self) -> bool:
        """Whether no client could tell the two runs apart, but for the time."""
        return not (self.num_failed or self.num_changed or self.num_repeated)


def compare(golden: Sequence[Outcome], found: Sequence[Outcome]) -> Comparison:
    """Hold a run with faults against the undisturbed one."""
    pairs = list(zip(golden, found, strict=True))
    return Comparison(
        num_calls=len(pairs),
        num_failed=sum(bool(after.problem) for _, after in pairs),
        num_changed=sum(
            before.digest != after.digest for before, after in pairs if not after.problem
        ),
        num_repeated=sum(after.num_repeated for _, after in pairs),
        num_joins=sum(after.num_joins for _, after in pairs),
        added_stalls_s=tuple(after.stall_s - before.stall_s for before, after in pairs),
        problems=tuple(sorted({after.problem for _, after in pairs if after.problem}))[:3],
    )
