"""What breaks between a client and its answer, and how it goes on: with real processes.

Clients here do what any client can: they read a stream until the connection breaks, and ask for
the rest by the id of the last event that they have.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.cluster import WAIT_MAX_S, Cluster, member_pids, running_cluster

SLOW: Final = "--echo-tokens-per-s=40"
JSON: Final = {"Content-Type": "application/json"}
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
MODEL: Final = "understudy-demo"
USAGE: Final[dict[str, Any]] = {"stream_options": {"include_usage": True}}
LOGPROBS: Final[dict[str, Any]] = {"logprobs": True, "top_logprobs": 2, "stop": ["("]}

_AGAIN_AFTER_S: Final = 0.05


class Reader(threading.Thread):
    """A client that reads one stream to its end, over as many connections as it takes."""

    def __init__(self, base_url: str, path: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.base_url = base_url
        self._path = path
        self._body = {"model": MODEL, "stream": True, "seed": 7, **body}
        self.stream_id = ""
        self.events: list[tuple[str, Any]] = []
        """The id and the data of each event."""
        self.num_joins = 0
        self.problem = ""

    @property
    def last_event_id(self) -> str:
        """The id of the last event that had one."""
        return next((event_id for event_id, _ in reversed(self.events) if event_id), "")

    @property
    def is_done(self) -> bool:
        """Whether the stream has come to its end."""
        return bool(self.events) and self.events[-1][1] == "[DONE]"

    def run(self) -> None:
        """Read to the end, or to a problem."""
        give_up_at = time.monotonic() + WAIT_MAX_S
        while not (self.is_done or self.problem):
            try:
                self._read()
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > give_up_at:
                    self.problem = repr(error)
                time.sleep(_AGAIN_AFTER_S)

    def _read(self) -> None:
        connection = http.client.HTTPConnection(urlsplit(self.base_url).netloc, timeout=WAIT_MAX_S)
        with closing(connection):
            if self.stream_id:
                self.num_joins += 1
                headers = {"Last-Event-ID": self.last_event_id}
                connection.request("GET", f"/v1/streams/{self.stream_id}", headers=headers)
            else:
                body = json.dumps(self._body)
                connection.request("POST", self._path, body, JSON)
            response = connection.getresponse()
            if response.status != http.client.OK:
                self.problem = f"HTTP {response.status}: {response.read()!r}"
                return
            self.stream_id = response.headers["X-Stream-Id"]
            event_id = ""
            # A line that the connection's end has cut is none.
            while (line := response.readline()).endswith(b"\n"):
                if line.startswith(b"id: "):
                    event_id = line[4:].strip().decode()
                elif line.startswith(b"data: "):
                    self._take(event_id, line[6:].strip())
                    event_id = ""
        if not (self.is_done or self.problem):
            raise http.client.IncompleteRead(b"")

    def _take(self, event_id: str, data: bytes) -> None:
        event: Any = "[DONE]" if data == b"[DONE]" else json.loads(data)
        if "error" in event:
            self.problem = str(event["error"])
        self.events.append((event_id, event))

    @property
    def story(self) -> Any:
        """All that the client was told, however it was cut into events."""
        told: dict[int, dict[str, Any]] = {}
        chunks = [event for _, event in self.events if isinstance(event, dict)]
        for chunk in chunks:
            for choice in chunk["choices"]:
                known = told.setdefault(choice["index"], {"text": "", "ends": [], "logprobs": []})
                delta = choice.get("delta", {"content": choice.get("text")})
                known["text"] += delta["content"]
                known["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []
                known["logprobs"] += (choice["logprobs"] or {}).get("content", [])
        # What an engine had in its cache depends on which of the calls came to it before.
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        usage = [
            {name: chunk["usage"][name] for name in counts}
            for chunk in chunks
            if chunk.get("usage")
        ]
        return told, usage

    @property
    def num_repeated(self) -> int:
        """Events that brought their client no further."""
        places = [
            tuple(map(int, event_id.partition(".")[2].split("-")))
            for event_id, _ in self.events
            if event_id
        ]
        return sum(
            now == before or any(a < b for a, b in zip(now, before, strict=True))
            for before, now in itertools.pairwise(places)
        )


CALLS: Final[Sequence[tuple[str, dict[str, Any]]]] = (
    (COMPLETIONS, {"prompt": "def one():", "max_tokens": 100}),
    (COMPLETIONS, {"prompt": "def two():", "max_tokens": 90, "n": 2, "echo": True}),
    (COMPLETIONS, {"prompt": ["a = 1", "b = 2"], "max_tokens": 90, **USAGE}),
    (CHAT, {"messages": [{"role": "user", "content": "three"}], "max_tokens": 100, **USAGE}),
    (CHAT, {"messages": [{"role": "user", "content": "four"}], "max_tokens": 80, "n": 3}),
    (CHAT, {"messages": [{"role": "user", "content": "five"}], "max_tokens": 90, **LOGPROBS}),
    (COMPLETIONS, {"prompt": "stop", "max_tokens": 100, "stop": ["e", "self"], "min_tokens": 60}),
)


def start_all(cluster: Cluster) -> list[Reader]:
    """A reader for each of the calls."""
    readers = [Reader(cluster.base_url, path, body) for path, body in CALLS]
    for reader in readers:
        reader.start()
    return readers


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until what a test expects has come about."""
    deadline = time.monotonic() + WAIT_MAX_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(_AGAIN_AFTER_S)


def stories(readers: Sequence[Reader]) -> list[Any]:
    """What all of them were told, once they have read to the end."""
    for reader in readers:
        reader.join(WAIT_MAX_S)
        assert not reader.problem
        assert reader.is_done
        assert reader.num_repeated == 0
    return [reader.story for reader in readers]


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    """What is told when nothing breaks."""
    with running_cluster() as cluster:
        return stories(start_all(cluster))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of one test's own, whose streams last for seconds."""
    with running_cluster(SLOW) as running:
        yield running


@pytest.mark.parametrize(
    "names", [("gateway-0",), ("gateway-0", "supervisor"), ("supervisor",)], ids="+".join
)
def test_streams_go_on_where_they_broke(
    cluster: Cluster, expected: list[Any], names: tuple[str, ...]
) -> None:
    readers = start_all(cluster)
    wait_for(lambda: all(len(reader.events) > 20 for reader in readers))
    pids = cluster.pids()
    for name in names:
        os.kill(pids[name], signal.SIGKILL)
    assert stories(readers) == expected
    assert {reader.num_joins > 0 for reader in readers} == {"gateway-0" in names}
    assert cluster.reply().resumed == 0


def test_streams_that_ended_are_told_again_by_new_processes(
    cluster: Cluster, expected: list[Any]
) -> None:
    readers = start_all(cluster)
    assert stories(readers) == expected
    pids = cluster.pids()
    for name in ("supervisor", "gateway-0"):
        os.kill(pids[name], signal.SIGKILL)
    for reader in readers:
        del reader.events[len(reader.events) // 2 :]
    again = [joining(reader.base_url, reader.stream_id, reader.events) for reader in readers]
    assert stories(again) == expected
    assert cluster.pids()["supervisor"] != pids["supervisor"]


def joining(base_url: str, stream_id: str, events: Sequence[tuple[str, Any]] = ()) -> Reader:
    """A client that goes on with a stream of which it has these events."""
    reader = Reader(base_url, "", {})
    reader.stream_id = stream_id
    reader.events = list(events)
    reader.start()
    return reader


def test_a_stream_goes_on_through_another_gateway_on_the_port() -> None:
    body = {"prompt": "def add(a, b):", "max_tokens": 160}
    with running_cluster(SLOW, "--api-server-count=2", engines=1) as cluster:
        everybody = {"engine-0", "gateway-0", "gateway-1"}
        cluster.wait_until(lambda report: member_pids(report).keys() == everybody)
        [address] = {gateway.address for gateway in cluster.reply().gateways}
        reader = Reader(f"http://{address}", COMPLETIONS, body)
        reader.start()
        wait_for(lambda: len(reader.events) > 20)
        [first] = [gateway for gateway in cluster.reply().gateways if gateway.streams]
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: streams_by_name(cluster).get(first.name) == 0)
        [other] = {"gateway-0", "gateway-1"} - {first.name}
        wait_for(lambda: streams_by_name(cluster)[other] == 1)
        [story] = stories([reader])
        assert reader.num_joins == 1
        undisturbed = Reader(f"http://{address}", COMPLETIONS, body)
        undisturbed.start()
        assert stories([undisturbed]) == [story]
        done = cluster.run("restart", "--rolling")
        assert done.returncode == 0, done.stderr


def streams_by_name(cluster: Cluster) -> dict[str, int]:
    """How many streams each gateway has."""
    return {gateway.name: gateway.streams for gateway in cluster.reply().gateways}


def test_a_thousand_calls_with_one_key_are_one_generation(cluster: Cluster) -> None:
    body = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 60, "temperature": 1.0}
    headers = {"Idempotency-Key": "order-66"}

    async def post(session: aiohttp.ClientSession, room: asyncio.Semaphore) -> bytes:
        async with room, session.post(COMPLETIONS, json=body, headers=headers) as response:
            assert response.status == http.client.OK, await response.text()
            return await response.read()

    async def post_all() -> set[bytes]:
        room = asyncio.Semaphore(100)
        async with aiohttp.ClientSession(cluster.base_url) as session:
            answers = await asyncio.gather(*(post(session, room) for _ in range(1000)))
            other = {**body, "max_tokens": 61}
            async with session.post(COMPLETIONS, json=other, headers=headers) as response:
                assert response.status == http.client.UNPROCESSABLE_ENTITY
            return set(answers)

    [answer] = asyncio.run(post_all())
    assert json.loads(answer)["usage"]["completion_tokens"] == 60
    done = cluster.run("status", "--json")
    status = json.loads(done.stdout)
    assert (status["admitted"], status["finished"], status["tokens"]) == (1, 1, 60)


def test_a_call_that_is_sent_again_gets_the_answer_that_was_begun(cluster: Cluster) -> None:
    body = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 60}
    headers = {"Idempotency-Key": "order-67"}
    base_url = cluster.base_url
    with calling(base_url, body, headers) as first:
        wait_for(lambda: cluster.reply().tokens > 10)
        for name, pid in cluster.pids().items():
            if name in {"supervisor", "gateway-0"}:
                os.kill(pid, signal.SIGKILL)
        with pytest.raises((OSError, http.client.HTTPException)):
            first.getresponse()
    answers = []
    for _ in range(2):
        with calling(base_url, body, headers) as again:
            response = again.getresponse()
            assert response.status == http.client.OK
            answers.append(response.read())
    assert answers[0] == answers[1]
    assert json.loads(answers[0])["usage"]["completion_tokens"] == 60
    # Counted since the start of the supervisor, which took nothing in.
    assert cluster.reply().admitted == 0


def test_a_call_waits_while_the_supervisor_is_started_again(cluster: Cluster) -> None:
    pid = cluster.pids()["supervisor"]
    base_url = cluster.base_url
    os.kill(pid, signal.SIGKILL)
    reader = Reader(base_url, COMPLETIONS, {"prompt": "x", "max_tokens": 4})
    reader.start()
    stories([reader])
    assert reader.num_joins == 0
    assert cluster.pids()["supervisor"] != pid


def test_what_is_no_stream_is_not_found(cluster: Cluster) -> None:
    reader = Reader(cluster.base_url, COMPLETIONS, {"prompt": "x", "max_tokens": 4})
    reader.start()
    stories([reader])
    paths = [f"cmpl-{1:016x}", f"chat{reader.stream_id}", f"{reader.stream_id}?starting_after=5"]
    for path in paths:
        other = joining(cluster.base_url, path)
        other.join(WAIT_MAX_S)
        assert other.problem.startswith("HTTP 404: "), path


@contextmanager
def calling(
    base_url: str, body: dict[str, Any], headers: dict[str, str]
) -> Iterator[http.client.HTTPConnection]:
    """A call that is to be answered in one piece."""
    address = urlsplit(base_url).netloc
    with closing(http.client.HTTPConnection(address, timeout=WAIT_MAX_S)) as connection:
        connection.request("POST", COMPLETIONS, json.dumps(body), JSON | headers)
        yield connection
