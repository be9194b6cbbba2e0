"""The mailbox over real ZeroMQ: bounded, never waiting, and never deaf."""

from __future__ import annotations

import select
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

import pytest
import zmq

from understudy.protocol.codec import FRAME_BYTES_MAX, Envelope, decode, encode
from understudy.protocol.errors import Unavailable
from understudy.protocol.messages import Pulse, StatusReply, StatusRequest
from understudy.runtime.kit.actor import SUPERVISOR
from understudy.runtime.kit.client import SupervisorClient
from understudy.runtime.kit.mailbox import HIGH_WATER_MARK, Mailbox

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
PATIENCE_S: Final = 30.0
"""How long a test waits for what must come; nothing is expected to take as long."""


@pytest.fixture
def address() -> Iterator[str]:
    # Socket paths are short: at most 107 bytes.
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield f"ipc://{folder}/s.sock"
    shutil.rmtree(folder)


@pytest.fixture
def context() -> Iterator[Context]:
    context: Context = zmq.Context()
    yield context
    context.destroy(linger=0)


class Pair:
    """The supervisor's mailbox and one member's."""

    def __init__(self, context: Context, address: str) -> None:
        self.supervisor = Mailbox.bind(context, address)
        self.member = Mailbox.connect(context, address, "engine-0.1")
        send_when_possible(self.member, SUPERVISOR, b"first")
        assert receive_frames(self.supervisor, 1) == [("engine-0.1", b"first")]

    def close(self) -> None:
        self.member.close()
        self.supervisor.close()


@pytest.fixture
def pair(context: Context, address: str) -> Iterator[Pair]:
    pair = Pair(context, address)
    yield pair
    pair.close()


def send_when_possible(mailbox: Mailbox, to: str, frame: bytes) -> None:
    until = time.monotonic() + PATIENCE_S
    while not mailbox.send(to, frame):
        assert time.monotonic() < until, "nobody is there"
        mailbox.wait(0.01)


def receive_frames(mailbox: Mailbox, count: int) -> list[tuple[str, bytes]]:
    """Wait for so many frames, as a loop does: receive, then wait."""
    frames: list[tuple[str, bytes]] = []
    until = time.monotonic() + PATIENCE_S
    while len(frames) < count:
        assert time.monotonic() < until, f"{len(frames)} of {count} frames came"
        mailbox.wait(PATIENCE_S)
        frames += mailbox.receive(512)
    return frames


def test_frames_go_both_ways_and_name_their_sender(pair: Pair) -> None:
    assert pair.member.send(SUPERVISOR, b"up")
    assert receive_frames(pair.supervisor, 1) == [("engine-0.1", b"up")]
    assert pair.supervisor.send("engine-0.1", b"down")
    assert receive_frames(pair.member, 1) == [(SUPERVISOR, b"down")]


def test_frames_keep_their_order_and_no_more_are_taken_than_asked_for(pair: Pair) -> None:
    sent = [str(number).encode() for number in range(1000)]
    for frame in sent:
        assert pair.member.send(SUPERVISOR, frame)
    received: list[bytes] = []
    while len(received) < len(sent):
        pair.supervisor.wait(PATIENCE_S)
        frames = pair.supervisor.receive(7)
        assert len(frames) <= 7
        received += [frame for _, frame in frames]
    assert received == sent


def test_a_message_to_an_unknown_peer_is_not_taken(pair: Pair) -> None:
    assert not pair.supervisor.send("engine-9.1", b"anyone?")
    assert pair.supervisor.unsent == 1


def test_a_member_without_a_supervisor_has_its_messages_not_taken(
    context: Context, address: str
) -> None:
    member = Mailbox.connect(context, address, "engine-0.1")
    assert not member.send(SUPERVISOR, b"anyone?")
    member.wait(0.0)
    assert member.receive(10) == []
    supervisor = Mailbox.bind(context, address)
    send_when_possible(member, SUPERVISOR, b"at last")
    assert receive_frames(supervisor, 1) == [("engine-0.1", b"at last")]
    member.close()
    supervisor.close()


def test_a_supervisor_that_comes_back_is_found_again(context: Context, address: str) -> None:
    pair = Pair(context, address)
    for incarnation in range(3):
        pair.supervisor.close()
        pair.supervisor = Mailbox.bind(context, address)
        frame = str(incarnation).encode()
        while not any(got == ("engine-0.1", frame) for got in pair.supervisor.receive(100)):
            pair.member.send(SUPERVISOR, frame)
            pair.supervisor.wait(0.01)
        assert pair.supervisor.send("engine-0.1", b"back")
        assert (SUPERVISOR, b"back") in receive_frames(pair.member, 1)
    pair.close()


def test_an_address_that_cannot_be_bound_is_an_error(context: Context, tmp_path: Path) -> None:
    with pytest.raises(zmq.ZMQError):
        Mailbox.bind(context, f"ipc://{tmp_path}/no/such/folder/s.sock")
    with pytest.raises(zmq.ZMQError):
        Mailbox.bind(context, f"ipc:///tmp/{'x' * 200}")


def test_an_oversize_frame_is_refused_by_its_receiver_and_later_ones_pass(pair: Pair) -> None:
    oversize = b"x" * (FRAME_BYTES_MAX + 1)
    assert pair.member.send(SUPERVISOR, oversize)
    received: list[bytes] = []
    until = time.monotonic() + PATIENCE_S
    while b"small" not in received:
        # The receiver hung up, and took with it whatever was on its way: it is sent again.
        assert time.monotonic() < until
        pair.member.send(SUPERVISOR, b"small")
        pair.member.wait(0.01)
        pair.supervisor.wait(0.01)
        received += [frame for _, frame in pair.supervisor.receive(100)]
    assert oversize not in received
    assert pair.supervisor.send("engine-0.1", b"heard")
    assert receive_frames(pair.member, 1) == [(SUPERVISOR, b"heard")]


def test_the_largest_frame_passes(pair: Pair) -> None:
    assert pair.member.send(SUPERVISOR, b"x" * FRAME_BYTES_MAX)
    ((_, frame),) = receive_frames(pair.supervisor, 1)
    assert len(frame) == FRAME_BYTES_MAX


def test_messages_to_a_peer_that_does_not_read_are_bounded_and_never_wait(pair: Pair) -> None:
    frame = b"x" * 1000
    taken = sum(pair.supervisor.send("engine-0.1", frame) for _ in range(4 * HIGH_WATER_MARK))
    assert HIGH_WATER_MARK <= taken <= 3 * HIGH_WATER_MARK
    assert pair.supervisor.unsent == 4 * HIGH_WATER_MARK - taken
    assert receive_frames(pair.member, taken) == [(SUPERVISOR, frame)] * taken


def test_a_frame_that_is_too_large_does_not_cut_a_member_off(pair: Pair) -> None:
    """ZeroMQ would end its connection for that, and never come back."""
    send_when_possible(pair.supervisor, "engine-0.1", b"x" * (FRAME_BYTES_MAX + 1))
    send_when_possible(pair.supervisor, "engine-0.1", b"after")
    [(_, large), (_, after)] = receive_frames(pair.member, 2)
    assert len(large) > FRAME_BYTES_MAX  # the codec refuses it
    assert after == b"after"
    send_when_possible(pair.member, SUPERVISOR, b"still here")
    assert receive_frames(pair.supervisor, 1) == [("engine-0.1", b"still here")]


def test_a_frame_of_several_parts_is_no_frame(pair: Pair, context: Context, address: str) -> None:
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.ROUTING_ID, b"\xff\xfe")
    stranger.connect(address)
    for parts in ([b"one", b"two"], [b"a", b"b", b"c"], [b"", b""]):
        stranger.send_multipart(parts)
    stranger.send_multipart([b"whole"])
    assert receive_frames(pair.supervisor, 1) == [("\ufffd\ufffd", b"whole")]
    stranger.close(linger=0)


def test_waiting_ends_when_a_frame_comes(pair: Pair) -> None:
    def send() -> None:
        assert pair.member.send(SUPERVISOR, b"up")

    timer = threading.Timer(0.05, send)
    timer.start()
    started = time.monotonic()
    while not pair.supervisor.receive(1):
        pair.supervisor.wait(PATIENCE_S)
    assert time.monotonic() - started < PATIENCE_S
    timer.join()


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("-inf")])
def test_no_time_to_wait_means_no_wait(pair: Pair, timeout_s: float) -> None:
    pair.supervisor.wait(timeout_s)


def test_a_frame_that_is_there_already_is_not_waited_for(pair: Pair) -> None:
    pair.member.send(SUPERVISOR, b"one")
    pair.member.send(SUPERVISOR, b"two")
    while not pair.supervisor.has_frames():
        pair.supervisor.wait(0.01)
    assert pair.supervisor.receive(1)
    # The descriptor's edge is used up; the second frame must be seen all the same.
    assert receive_frames(pair.supervisor, 1) == [("engine-0.1", b"two")]


def test_a_nudge_makes_up_for_a_swallowed_wake_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame comes, and another thread uses the socket, just as this one is about to wait."""

    class Intrusion:
        """Stands before the poll in ``wait``."""

        def __init__(self, poll: select.poll) -> None:
            self._poll = poll
            self.woken_by: list[tuple[int, int]] = []

        def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
            assert pair.supervisor.send("engine-0.1", b"down")
            while not pair.member.has_frames():
                pass
            pair.member.nudge()
            self.woken_by = self._poll.poll(timeout_ms)
            return self.woken_by

    poll = select.poll()
    poll.register(pair.member.fd, select.POLLIN)
    poll.register(nudges_of(pair.member), select.POLLIN)
    intrusion = Intrusion(poll)
    monkeypatch.setattr(pair.member, "_poll", intrusion)
    for _ in range(10):
        pair.member.wait(PATIENCE_S)
        assert [descriptor for descriptor, _ in intrusion.woken_by] == [nudges_of(pair.member)]
        assert pair.member.receive(10) == [(SUPERVISOR, b"down")]


def nudges_of(mailbox: Mailbox) -> int:
    descriptor = vars(mailbox)["_nudges"]
    assert isinstance(descriptor, int)
    return descriptor


def test_a_thread_that_shares_the_socket_disturbs_no_dialogue(pair: Pair) -> None:
    rounds = 500
    stop = threading.Event()

    def beat() -> None:
        while not stop.is_set():
            pair.member.send(SUPERVISOR, b"beat")
            pair.member.nudge()

    def answer() -> None:
        answered = 0
        while answered < rounds and not stop.is_set():
            pair.supervisor.wait(0.1)
            for peer, frame in pair.supervisor.receive(512):
                if frame != b"beat":
                    answered += 1
                    pair.supervisor.send(peer, frame)

    threads = [threading.Thread(target=target) for target in (beat, answer)]
    for thread in threads:
        thread.start()
    try:
        for number in range(rounds):
            question = str(number).encode()
            send_when_possible(pair.member, SUPERVISOR, question)
            answers: list[tuple[str, bytes]] = []
            while not answers:
                asked = time.monotonic()
                pair.member.wait(PATIENCE_S)
                answers = pair.member.receive(512)
                assert time.monotonic() - asked < PATIENCE_S, "a wake-up was lost"
            assert answers == [(SUPERVISOR, question)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_nudge_without_a_frame_wakes_nobody(pair: Pair) -> None:
    pair.member.nudge()
    pair.member.wait(0.05)
    assert pair.member.receive(10) == []


# The command line's client


def status_reply() -> StatusReply:
    return StatusReply("demo", 1.0, (), (), 0, 0, 0, 0, 0, 0, 0)


def test_a_client_gets_the_reply_it_asked_for(context: Context, address: str) -> None:
    supervisor = Mailbox.bind(context, address)

    def serve() -> None:
        ((peer, raw),) = receive_frames(supervisor, 1)
        assert isinstance(decode(raw).message, StatusRequest)
        for frame in (b"no message", encode(Envelope(SUPERVISOR, 0, 0, 0), Pulse())):
            supervisor.send(peer, frame)
        supervisor.send(peer, encode(Envelope(SUPERVISOR, 0, 0, 0), status_reply()))

    thread = threading.Thread(target=serve)
    thread.start()
    with SupervisorClient(Path(address.removeprefix("ipc://"))) as client:
        reply = client.request(StatusRequest(), StatusReply, timeout_s=PATIENCE_S)
    assert reply == status_reply()
    thread.join()
    supervisor.close()


def test_a_client_without_a_supervisor_is_told_so_in_time(address: str) -> None:
    with (
        SupervisorClient(Path(address.removeprefix("ipc://"))) as client,
        pytest.raises(Unavailable, match="does not answer"),
    ):
        client.request(StatusRequest(), StatusReply, timeout_s=0.05)


def test_a_client_whose_supervisor_does_not_answer_is_told_so_in_time(
    context: Context, address: str
) -> None:
    supervisor = Mailbox.bind(context, address)
    with (
        SupervisorClient(Path(address.removeprefix("ipc://"))) as client,
        pytest.raises(Unavailable, match="does not answer"),
    ):
        client.request(StatusRequest(), StatusReply, timeout_s=0.2)
    supervisor.close()


def test_clients_of_one_process_have_identities_of_their_own(
    context: Context, address: str
) -> None:
    supervisor = Mailbox.bind(context, address)
    path = Path(address.removeprefix("ipc://"))
    with SupervisorClient(path) as one, SupervisorClient(path) as other:
        assert one.send(Pulse(), timeout_s=PATIENCE_S)
        assert other.send(Pulse(), timeout_s=PATIENCE_S)
        peers = {peer for peer, _ in receive_frames(supervisor, 2)}
    assert len(peers) == 2
    supervisor.close()
