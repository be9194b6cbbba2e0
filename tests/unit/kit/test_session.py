"""Sessions over a transport that loses, doubles, delays and reorders as it is told to."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, TypeAlias

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.protocol.codec import (
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_OLDEST,
    Envelope,
    decode,
    encode,
)
from understudy.protocol.messages import (
    Cancel,
    Dying,
    Fenced,
    Hello,
    Message,
    Pulse,
    Resend,
    Role,
    Welcome,
)
from understudy.runtime.kit import session
from understudy.runtime.kit.actor import CloseSession, Effect, OpenSession, Send
from understudy.runtime.kit.session import Outgoing, Received, SessionTable

PERFECT_S: Final = 0.001
SETTLED_WITHIN_S: Final = 20.0
"""After the last fault everything has arrived, and nobody has anything more to say."""

Fate: TypeAlias = tuple[float, ...]
"""After which delays a frame arrives: never, once, or more often."""


class Write(NamedTuple):
    """At this time, this side sends so many messages."""

    at: float
    side: str
    messages: int


def cancels(received: list[Received]) -> list[int]:
    return [item.message.request_id for item in received if isinstance(item.message, Cancel)]


class Wire:
    """A supervisor and an engine with a session, and the frames between them."""

    def __init__(self, fates: list[Fate]) -> None:
        self.now = 0.0
        self.frames = 0
        self.tables = {
            "supervisor": SessionTable("supervisor", fences=True),
            "engine": SessionTable("engine"),
        }
        self.sent: dict[str, list[int]] = {name: [] for name in self.tables}
        self.received: dict[str, list[int]] = {name: [] for name in self.tables}
        self.datagrams_received: dict[str, list[str]] = {name: [] for name in self.tables}
        self.datagrams_arrived = 0
        self.last_fault_at = 0.0
        self._fates = iter(fates)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._timers: dict[str, float] = {}
        for name, table in self.tables.items():
            table.outgoing([OpenSession(self.peer_of(name), 1)], 0.0)

    @staticmethod
    def peer_of(name: str) -> str:
        return "engine" if name == "supervisor" else "supervisor"

    def at(self, time: float, action: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time, self._num_events, action))

    def write(self, side: str, count: int) -> None:
        """Send further numbered messages, and a datagram among them."""
        peer, numbers = self.peer_of(side), self.sent[side]
        effects: list[Effect] = []
        for _ in range(count):
            numbers.append(len(numbers) + 1)
            effects.append(Send(peer, Cancel(numbers[-1])))
        effects.append(Send(peer, Dying(f"datagram {len(numbers)}")))
        self._put(side, self.tables[side].outgoing(effects, self.now))
        self._look_after(side)

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()

    def check(self) -> None:
        """Whatever happens, each has received a first part of what was sent, in order, once."""
        for name, table in self.tables.items():
            received, sent = self.received[name], self.sent[self.peer_of(name)]
            assert received == sent[: len(received)]
            assert not table.broken()

    def _put(self, side: str, outgoing: list[Outgoing]) -> None:
        for to, frame in outgoing:
            assert to == self.peer_of(side)
            self.frames += 1
            fate = next(self._fates, (PERFECT_S,))
            if fate != (PERFECT_S,):
                self.last_fault_at = max(self.now, *(self.now + delay for delay in fate), 0.0)
            for delay in fate:
                self.at(self.now + delay, self._arrival(to, frame))

    def _arrival(self, side: str, frame: bytes) -> Callable[[], None]:
        def arrive() -> None:
            received = self.tables[side].incoming(self.peer_of(side), frame, self.now)
            self.received[side] += cancels(received)
            self.datagrams_arrived += isinstance(decode(frame).message, Dying)
            for _, message in received:
                if isinstance(message, Dying):
                    self.datagrams_received[side].append(message.reason)
            self._put(side, self.tables[side].outgoing([], self.now))
            self._look_after(side)
            self.check()

        return arrive

    def _look_after(self, side: str) -> None:
        table = self.tables[side]
        self._put(side, table.due(self.now))
        due = table.next_due()
        if due is not None and self._timers.get(side) != due:
            self._timers[side] = due
            self.at(max(due, self.now), lambda: self._look_after(side))


delays = st.integers(min_value=0, max_value=400).map(lambda ms: ms / 1000)
lost: st.SearchStrategy[Fate] = st.just(())
fates = st.lists(
    st.one_of(
        lost,
        st.just((PERFECT_S,)),
        st.tuples(delays),
        st.tuples(delays, delays),
    ),
    max_size=80,
)
writes = st.lists(
    st.builds(
        Write,
        st.integers(0, 1500).map(lambda ms: ms / 1000),
        st.sampled_from(["supervisor", "engine"]),
        st.integers(0, 40),
    ),
    max_size=12,
)


def play(script: list[Write], fates: list[Fate]) -> Wire:
    wire = Wire(fates)
    for at, side, messages in script:
        wire.at(at, partial(wire.write, side, messages))
    wire.run(until=1000.0)
    return wire


@given(writes, fates)
@settings(max_examples=200)
def test_everything_arrives_once_and_in_order_when_the_faults_are_over(
    script: list[Write], fates: list[Fate]
) -> None:
    wire = play(script, fates)
    for name, received in wire.received.items():
        assert received == wire.sent[wire.peer_of(name)]
    last_write_at = max((write.at for write in script), default=0.0)
    assert wire.now <= max(last_write_at, wire.last_fault_at) + SETTLED_WITHIN_S
    assert all(table.next_due() is None for table in wire.tables.values())


@given(writes, fates)
@settings(max_examples=50)
def test_datagrams_are_delivered_as_often_as_they_arrive(
    script: list[Write], fates: list[Fate]
) -> None:
    wire = play(script, fates)
    assert sum(map(len, wire.datagrams_received.values())) == wire.datagrams_arrived


@pytest.mark.parametrize("count", [1, 31, 32, 33, 500])
def test_without_faults_a_message_takes_one_frame_and_few_acknowledgements(count: int) -> None:
    wire = play([Write(0.0, "supervisor", count)], [])
    assert wire.received["engine"] == list(range(1, count + 1))
    acks_max = 1 + count // session.ACK_AFTER_MESSAGES
    assert wire.frames <= count + 1 + acks_max
    assert wire.tables["supervisor"].resent == 0


def test_a_lost_message_is_asked_for_at_once_when_a_later_one_arrives() -> None:
    fates: list[Fate] = [(PERFECT_S,), (), (PERFECT_S,)]
    wire = Wire(fates)
    wire.write("supervisor", 3)
    wire.run(until=0.01)
    assert wire.received["engine"] == [1, 2, 3]


def test_a_lost_burst_is_made_up_for_quickly() -> None:
    lost_burst: list[Fate] = [(PERFECT_S,)] * 100 + [()] * 5000
    wire = Wire(lost_burst)
    wire.write("supervisor", 8000)
    wire.run(until=1.0)
    assert wire.received["engine"] == list(range(1, 8001))


def test_a_lost_tail_is_made_up_for_quickly() -> None:
    lost_tail: list[Fate] = [(PERFECT_S,)] * 100 + [()] * 5000
    wire = Wire(lost_tail)
    wire.write("supervisor", 5099)
    wire.run(until=2.0)
    assert wire.received["engine"] == list(range(1, 5100))


def test_to_a_peer_that_says_nothing_less_and_less_is_sent_again() -> None:
    wire = Wire([()] * 100_000)
    wire.write("supervisor", 1000)
    first = wire.frames
    wire.run(until=60.0)
    rounds = (wire.frames - first) / session.RESEND_FRAMES_MAX
    assert 20 <= rounds <= 40


# One table, frame by frame


@pytest.fixture
def table() -> SessionTable:
    """A member's table with a session of epoch 5."""
    table = SessionTable("engine-0.1")
    table.outgoing([OpenSession("supervisor", 5)], 0.0)
    return table


@pytest.fixture
def fencing() -> SessionTable:
    """A supervisor's table with a session of epoch 5."""
    table = SessionTable("supervisor", fences=True)
    table.outgoing([OpenSession("engine-0.1", 5)], 0.0)
    return table


def frame(epoch: int, seq: int, message: Message, ack: int = 0) -> bytes:
    return encode(Envelope("whoever", epoch, seq, ack), message)


@pytest.mark.parametrize("epoch", [1, 4, 6, 2**63])
@pytest.mark.parametrize("seq", [0, 1])
def test_a_frame_of_another_epoch_is_never_delivered(
    table: SessionTable, epoch: int, seq: int
) -> None:
    message = Cancel(1) if seq else Pulse()
    assert table.incoming("supervisor", frame(epoch, seq, message), 1.0) == []
    assert table.stale == 1
    assert table.outgoing([], 1.0) == []


@pytest.mark.parametrize("seq", [0, 1])
def test_a_table_that_fences_answers_a_stale_frame(fencing: SessionTable, seq: int) -> None:
    message = Cancel(1) if seq else Pulse()
    assert fencing.incoming("engine-0.1", frame(4, seq, message), 1.0) == []
    assert fencing.incoming("nobody", frame(4, seq, message), 1.0) == []
    answers = fencing.outgoing([], 1.0)
    assert [to for to, _ in answers] == ["engine-0.1", "nobody"]
    for _, raw in answers:
        assert decode(raw) == (Envelope("supervisor", 0, 0, 0), Fenced(4))


def test_a_new_epoch_starts_from_nothing(table: SessionTable) -> None:
    old = frame(5, 1, Cancel(1))
    assert cancels(table.incoming("supervisor", old, 1.0)) == [1]
    (before,) = table.outgoing([Send("supervisor", Cancel(7))], 1.0)
    assert decode(before.frame).envelope == Envelope("engine-0.1", 5, 1, 1)
    (after,) = table.outgoing([OpenSession("supervisor", 6), Send("supervisor", Cancel(8))], 1.1)
    assert decode(after.frame).envelope == Envelope("engine-0.1", 6, 1, 0)
    assert table.incoming("supervisor", old, 1.2) == []
    assert cancels(table.incoming("supervisor", frame(6, 1, Cancel(2)), 1.2)) == [2]
    resent = [decode(out.frame).message for out in table.due(100.0)]
    assert Cancel(7) not in resent


def test_without_a_session_only_datagrams_pass_in_either_direction() -> None:
    table = SessionTable("engine-0.1")
    hello = Hello(Role.ENGINE, "engine-0", 1)
    (out,) = table.outgoing([Send("supervisor", Cancel(1)), Send("supervisor", hello)], 0.0)
    assert decode(out.frame) == (Envelope("engine-0.1", 0, 0, 0), hello)
    assert table.incoming("supervisor", frame(0, 0, Welcome(3)), 0.0) == [
        Received("supervisor", Welcome(3))
    ]
    for raw in (frame(0, 1, Cancel(1)), frame(0, 0, Cancel(1)), frame(0, 1, Pulse())):
        assert table.incoming("supervisor", raw, 0.0) == []
    assert table.malformed == 3


def test_what_is_about_sessions_carries_no_epoch_even_within_one(fencing: SessionTable) -> None:
    for message in (Welcome(5), Fenced(5)):
        (out,) = fencing.outgoing([Send("engine-0.1", message)], 0.0)
        assert decode(out.frame).envelope.epoch == 0


def test_a_message_that_needs_order_is_refused_as_a_datagram(table: SessionTable) -> None:
    assert table.incoming("supervisor", frame(5, 0, Cancel(1)), 0.0) == []
    assert table.malformed == 1


def test_bytes_that_are_no_message_are_counted_and_change_nothing(table: SessionTable) -> None:
    for raw in (b"", b"\x00", b"\x96" * 200, frame(5, 1, Cancel(1))[:-1]):
        assert table.incoming("supervisor", raw, 0.0) == []
    assert table.malformed == 4
    assert cancels(table.incoming("supervisor", frame(5, 1, Cancel(1)), 0.0)) == [1]


def test_acknowledged_messages_are_forgotten(table: SessionTable) -> None:
    count = session.WINDOW_MESSAGES_MAX
    for number in range(1, 3 * count, 1000):
        effects: list[Effect] = [Send("supervisor", Cancel(number + i)) for i in range(1000)]
        table.outgoing(effects, 0.0)
        table.incoming("supervisor", frame(5, 0, Pulse(), ack=number + 999), 0.0)
        assert table.broken() == []
    assert table.next_due() is None


def test_a_session_breaks_when_too_many_messages_are_unacknowledged(table: SessionTable) -> None:
    allowed = [Send("supervisor", Cancel(1))] * session.WINDOW_MESSAGES_MAX
    table.outgoing(list(allowed), 0.0)
    assert table.broken() == []
    table.outgoing([Send("supervisor", Cancel(1))], 0.0)
    assert table.broken() == ["supervisor"]
    assert table.broken() == []
    assert table.next_due() is None
    assert table.outgoing([Send("supervisor", Cancel(1))], 0.0) == []


def test_a_session_breaks_when_too_many_bytes_are_unacknowledged(
    table: SessionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(frame(5, 1, Cancel(1))) + len("engine-0.1") - len("whoever")
    monkeypatch.setattr(session, "WINDOW_BYTES_MAX", 10 * size)
    table.outgoing([Send("supervisor", Cancel(1))] * 10, 0.0)
    assert table.broken() == []
    table.incoming("supervisor", frame(5, 0, Pulse(), ack=5), 0.0)
    table.outgoing([Send("supervisor", Cancel(1))] * 5, 0.0)
    assert table.broken() == []
    table.outgoing([Send("supervisor", Cancel(1))], 0.0)
    assert table.broken() == ["supervisor"]


def test_what_lies_beyond_the_window_is_not_kept(table: SessionTable) -> None:
    beyond = session.WINDOW_MESSAGES_MAX + 1
    table.incoming("supervisor", frame(5, beyond, Cancel(beyond)), 0.0)
    received = []
    for seq in range(1, beyond):
        received += cancels(table.incoming("supervisor", frame(5, seq, Cancel(seq)), 0.0))
    assert received == list(range(1, beyond))
    assert cancels(table.incoming("supervisor", frame(5, beyond, Cancel(beyond)), 0.0)) == [beyond]


def test_an_acknowledgement_of_what_was_never_sent_does_no_harm(table: SessionTable) -> None:
    table.incoming("supervisor", frame(5, 0, Pulse(), ack=10**6), 0.0)
    (out,) = table.outgoing([Send("supervisor", Cancel(1))], 0.0)
    table.incoming("supervisor", frame(5, 0, Pulse(), ack=0), 0.0)
    assert out in table.due(10.0)
    assert table.incoming("supervisor", frame(5, 0, Resend(77)), 10.0) == []
    assert table.outgoing([], 10.0) == []


@pytest.mark.parametrize(
    ("seq", "count", "resent"),
    [(3, 1, [3]), (3, 5, [3, 4, 5, 6, 7]), (98, 9, [98, 99, 100]), (1, 0, []), (1, -5, [])],
)
def test_a_peer_gets_again_what_it_misses_and_no_more(
    table: SessionTable, seq: int, count: int, resent: list[int]
) -> None:
    sent = table.outgoing([Send("supervisor", Cancel(i)) for i in range(1, 101)], 0.0)
    table.incoming("supervisor", frame(5, 0, Resend(seq, count)), 0.001)
    assert table.outgoing([], 0.001) == [sent[i - 1] for i in resent]


@pytest.mark.parametrize("count", [1000, 2**64 - 1])
def test_no_peer_gets_more_than_a_bounded_number_again(table: SessionTable, count: int) -> None:
    table.outgoing([Send("supervisor", Cancel(i)) for i in range(1000)], 0.0)
    table.incoming("supervisor", frame(5, 0, Resend(1, count)), 0.001)
    assert len(table.outgoing([], 0.001)) == session.RESEND_FRAMES_MAX


def test_a_message_sent_again_is_the_same_bytes(table: SessionTable) -> None:
    sent = table.outgoing([Send("supervisor", Cancel(1)), Send("supervisor", Cancel(2))], 0.0)
    table.incoming("supervisor", frame(5, 0, Resend(2)), 0.001)
    assert table.outgoing([], 0.001) == sent[1:]
    assert table.due(0.3) == sent


def test_a_lone_receiver_acknowledges_within_its_time_and_only_once(table: SessionTable) -> None:
    table.incoming("supervisor", frame(5, 1, Cancel(1)), 1.0)
    assert table.next_due() == pytest.approx(1.0 + session.ACK_AFTER_S)
    assert table.due(1.0) == []
    (ack,) = table.due(1.0 + session.ACK_AFTER_S)
    assert decode(ack.frame) == (Envelope("engine-0.1", 5, 0, 1), Pulse())
    assert table.next_due() is None


def test_an_answer_carries_the_acknowledgement_with_it(table: SessionTable) -> None:
    table.incoming("supervisor", frame(5, 1, Cancel(1)), 1.0)
    (answer,) = table.outgoing([Send("supervisor", Cancel(9))], 1.0)
    assert decode(answer.frame).envelope.ack == 1
    assert table.due(1.0 + session.ACK_AFTER_S) == []


def test_a_message_that_comes_again_is_acknowledged_again(table: SessionTable) -> None:
    table.incoming("supervisor", frame(5, 1, Cancel(1)), 1.0)
    table.due(2.0)
    assert table.incoming("supervisor", frame(5, 1, Cancel(1)), 3.0) == []
    (ack,) = table.due(4.0)
    assert decode(ack.frame).envelope.ack == 1


def test_a_closed_session_is_silent(table: SessionTable) -> None:
    table.outgoing([Send("supervisor", Cancel(1))], 0.0)
    table.outgoing([CloseSession("supervisor"), CloseSession("supervisor")], 0.0)
    assert table.next_due() is None
    assert table.due(100.0) == []
    assert table.incoming("supervisor", frame(5, 1, Cancel(1)), 100.0) == []


def test_sessions_of_several_peers_do_not_mix() -> None:
    table = SessionTable("supervisor", fences=True)
    table.outgoing([OpenSession("a", 1), OpenSession("b", 2)], 0.0)
    assert cancels(table.incoming("a", frame(1, 1, Cancel(1)), 0.0)) == [1]
    assert table.incoming("b", frame(1, 2, Cancel(2)), 0.0) == []
    assert cancels(table.incoming("b", frame(2, 1, Cancel(3)), 0.0)) == [3]
    sent = table.outgoing([Send("a", Cancel(1)), Send("b", Cancel(2)), Send("a", Cancel(3))], 0.0)
    envelopes = [(to, decode(raw).envelope[1:3]) for to, raw in sent if "Fenced" not in repr(raw)]
    assert [entry for entry in envelopes if entry[1][1]] == [
        ("a", (1, 1)),
        ("b", (2, 1)),
        ("a", (1, 2)),
    ]


@pytest.mark.parametrize("protocol", [PROTOCOL_VERSION_OLDEST, PROTOCOL_VERSION])
def test_a_session_is_spoken_in_its_version_and_whatever_is_about_sessions_in_the_oldest(
    protocol: int,
) -> None:
    table = SessionTable("supervisor")
    table.outgoing([OpenSession("engine-0.1", 5, protocol)], 0.0)
    effects: list[Effect] = [
        Send("engine-0.1", message) for message in (Cancel(1), Pulse(), Welcome(5, protocol))
    ]
    frames = table.outgoing(effects, 0.0)
    spoken = [msgpack.unpackb(frame)[0] for _, frame in frames]
    assert spoken == [protocol, protocol, PROTOCOL_VERSION_OLDEST]
