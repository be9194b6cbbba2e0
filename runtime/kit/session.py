"""Sessions: messages that arrive once and in order, over a transport that promises nothing.

ZeroMQ loses what was in flight when a connection breaks, and a test's network loses whatever it
is told to. A session makes up for both, so that no actor has to: it numbers messages, acknowledges
them, sends again what was not acknowledged, puts back in order what came out of order and drops
what came twice. This is the sliding window of TCP (RFC 9293) with negative acknowledgements, cut
down to what messages between a few dozen actors need. Pure: time is an argument, frames go in and
come out.

A session is named by its *epoch*, which the supervisor gives out and never gives out twice. A
frame of another epoch is *stale* and is never delivered: this is the fence that keeps an engine
which was given up for dead from being heard again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

from understudy.protocol.codec import PROTOCOL_VERSION, Envelope, decode, encode
from understudy.protocol.errors import ProtocolError
from understudy.protocol.messages import (
    Fenced,
    Hello,
    Message,
    Pulse,
    Resend,
    Welcome,
    is_datagram,
)
from understudy.runtime.kit.actor import CloseSession, Effect, OpenSession, Send

RESEND_AFTER_S: Final = 0.2
RESEND_AFTER_MAX_S: Final = 2.0
RESEND_FRAMES_MAX: Final = 64
"""Frames sent again at once; more would only fill the pipe of a peer that is slow."""
ACK_AFTER_S: Final = 0.04
ACK_AFTER_MESSAGES: Final = 32
GAP_REPORT_EVERY_S: Final = 0.01
WINDOW_MESSAGES_MAX: Final = 65_536
_ABOUT_SESSIONS: Final = (Hello, Welcome, Fenced)
"""What must be understood by an actor that has no session, or another one."""
WINDOW_BYTES_MAX: Final = 256 * 1024 * 1024


class Outgoing(NamedTuple):
    """A frame, ready for the transport."""

    to: str
    frame: bytes


class Received(NamedTuple):
    """A message, ready for the actor."""

    sender: str
    message: Message


class Session:
    """One end of a session: what was sent and not acknowledged, what was received too early."""

    def __init__(self, identity: str, epoch: int, protocol: int = PROTOCOL_VERSION) -> None:
        self._identity = identity
        self.epoch = epoch
        self._protocol = protocol
        self._next_seq = 1
        self._unacked: OrderedDict[int, bytes] = OrderedDict()
        self._unacked_bytes = 0
        self._resend_at: float | None = None
        self._resend_after_s = RESEND_AFTER_S
        # What the peer did not acknowledge in time reaches to _lost_to, and was sent again up to
        # _resent_to.
        self._resent_to = 0
        self._lost_to = 0
        self._received = 0
        self._early: dict[int, Message] = {}
        self._ack_at: float | None = None
        self._ack_owed = 0
        self._gap_reported_at = float("-inf")

    @property
    def next_due(self) -> float | None:
        """When ``due`` will next have something to send."""
        if self._resend_at is None and self._ack_at is None and not self._early:
            return None  # as nearly always: it is asked for each session at each turn
        gap_at = self._gap_reported_at + GAP_REPORT_EVERY_S if self._early else None
        times = [at for at in (gap_at, self._resend_at, self._ack_at) if at is not None]
        return min(times, default=None)

    @property
    def is_broken(self) -> bool:
        """Whether the peer left more unacknowledged than may be kept."""
        return len(self._unacked) > WINDOW_MESSAGES_MAX or self._unacked_bytes > WINDOW_BYTES_MAX

    def sequenced(self, message: Message, now: float) -> bytes:
        """The frame for a message, which is kept until it is acknowledged."""
        frame = encode(
            Envelope(self._identity, self.epoch, self._next_seq, self._received),
            message,
            self._protocol,
        )
        self._unacked[self._next_seq] = frame
        self._unacked_bytes += len(frame)
        self._next_seq += 1
        self._acknowledged()
        if self._resend_at is None:
            self._resend_at = now + self._resend_after_s
        return frame

    def datagram(self, message: Message) -> bytes:
        """The frame for a message outside the order. Safe to call from another thread."""
        envelope = Envelope(self._identity, self.epoch, 0, self._received)
        return encode(envelope, message, self._protocol)

    def receive_ack(self, ack: int, now: float) -> None:
        """Forget what the peer has."""
        if not self._unacked or ack < next(iter(self._unacked)):
            return
        while self._unacked and next(iter(self._unacked)) <= ack:
            _, frame = self._unacked.popitem(last=False)
            self._unacked_bytes -= len(frame)
        self._resend_after_s = RESEND_AFTER_S
        if not self._unacked:
            self._resend_at = None
        elif self._resent_to <= ack < self._lost_to:
            # It has all that was sent again, so it is ready for more of what was lost.
            self._resend_at = now
        else:
            self._resend_at = now + self._resend_after_s

    def receive(self, seq: int, message: Message, now: float) -> list[Message]:
        """Take in a sequenced message; gives what may be delivered now, in order."""
        self._ack_owed += 1
        if self._ack_at is None:
            self._ack_at = now + ACK_AFTER_S
        if self._ack_owed >= ACK_AFTER_MESSAGES:
            self._ack_at = now
        if seq <= self._received:
            return []
        if seq > self._received + WINDOW_MESSAGES_MAX:
            return []
        self._early[seq] = message
        ready = []
        while (following := self._early.pop(self._received + 1, None)) is not None:
            self._received += 1
            ready.append(following)
        return ready

    def due(self, now: float) -> list[bytes]:
        """Frames that should be sent by now: again, or for the first time as a lone answer."""
        frames = []
        if self._early and now >= self._gap_reported_at + GAP_REPORT_EVERY_S:
            self._gap_reported_at = now
            frames.append(self.datagram(Resend(self._received + 1, self._gap_length())))
        if self._resend_at is not None and now >= self._resend_at:
            first = next(iter(self._unacked))
            if not self._resent_to < first <= self._lost_to:
                self._lost_to = self._next_seq - 1
            again = self.resend(first, RESEND_FRAMES_MAX)
            self._resent_to = first + len(again) - 1
            frames += again
            self._resend_after_s = min(2 * self._resend_after_s, RESEND_AFTER_MAX_S)
            self._resend_at = now + self._resend_after_s
        if self._ack_at is not None and now >= self._ack_at:
            frames.append(self.datagram(Pulse()))
            self._acknowledged()
        return frames

    def resend(self, seq: int, count: int) -> list[bytes]:
        """Frames that the peer misses, so far as they are still kept."""
        seqs = range(seq, seq + min(count, RESEND_FRAMES_MAX))
        return [self._unacked[seq] for seq in seqs if seq in self._unacked]

    def _gap_length(self) -> int:
        """How many messages are missing in a row, at most as many as would be sent again."""
        seqs = range(self._received + 1, self._received + 1 + RESEND_FRAMES_MAX)
        return next((n for n, seq in enumerate(seqs) if seq in self._early), RESEND_FRAMES_MAX)

    def _acknowledged(self) -> None:
        """Note that a frame with the latest acknowledgement is on its way."""
        self._ack_at = None
        self._ack_owed = 0


class SessionTable:
    """All sessions of one actor: what lies between its outbox and the transport.

    ``identity`` is the actor's own name on the transport. A table that is told to fence answers
    stale frames with ``Fenced``; only a supervisor does.
    """

    def __init__(self, identity: str, *, fences: bool = False) -> None:
        self.identity = identity
        self._fences = fences
        self._sessions: dict[str, Session] = {}
        self._answers: list[Outgoing] = []
        self.malformed = 0
        self.stale = 0
        self.resent = 0

    def outgoing(self, effects: list[Effect], now: float) -> list[Outgoing]:
        """Carry out an actor's wishes; gives the frames to hand to the transport."""
        frames, self._answers = self._answers, []
        for effect in effects:
            match effect:
                case Send(to, message):
                    frame = self._frame(to, message, now)
                    if frame is not None:
                        frames.append(Outgoing(to, frame))
                case OpenSession(peer, epoch, protocol):
                    self._sessions[peer] = Session(self.identity, epoch, protocol)
                case CloseSession(peer):
                    self._sessions.pop(peer, None)
        return frames

    def datagram(self, to: str, message: Message) -> bytes:
        """The frame for a datagram. Safe to call from another thread."""
        session = self._sessions.get(to)
        if session is not None and not isinstance(message, _ABOUT_SESSIONS):
            return session.datagram(message)
        return encode(Envelope(self.identity, 0, 0, 0), message)

    def incoming(self, peer: str, raw: bytes, now: float) -> list[Received]:
        """Take in a frame that the transport got from ``peer``; gives what to deliver."""
        try:
            envelope, message = decode(raw)
        except ProtocolError:
            self.malformed += 1
            return []
        session = self._sessions.get(peer)
        if envelope.epoch == 0:
            if envelope.seq == 0 and is_datagram(type(message)):
                return [Received(peer, message)]
            self.malformed += 1
            return []
        if session is None or envelope.epoch != session.epoch:
            self._refuse_stale(peer, envelope.epoch)
            return []
        session.receive_ack(envelope.ack, now)
        if envelope.seq > 0:
            return [Received(peer, ready) for ready in session.receive(envelope.seq, message, now)]
        if isinstance(message, Resend):
            frames = session.resend(message.seq, message.count)
            self._answers += [Outgoing(peer, frame) for frame in frames]
            self.resent += len(frames)
            return []
        if not is_datagram(type(message)):
            self.malformed += 1
            return []
        return [Received(peer, message)]

    def due(self, now: float) -> list[Outgoing]:
        """Frames that should be sent by now, whatever the actor wants."""
        frames, self._answers = self._answers, []
        for peer, session in self._sessions.items():
            due = session.next_due
            if due is not None and due <= now:
                frames += [Outgoing(peer, frame) for frame in session.due(now)]
        return frames

    def next_due(self) -> float | None:
        """When ``due`` will next have something to send."""
        times = [due for s in self._sessions.values() if (due := s.next_due) is not None]
        return min(times, default=None)

    def broken(self) -> list[str]:
        """Peers whose sessions are past saving; the sessions are forgotten."""
        peers = [peer for peer, session in self._sessions.items() if session.is_broken]
        for peer in peers:
            del self._sessions[peer]
        return peers

    def _frame(self, to: str, message: Message, now: float) -> bytes | None:
        if is_datagram(type(message)):
            return self.datagram(to, message)
        session = self._sessions.get(to)
        if session is None:
            # The session ended in the same turn in which the actor wrote to it; whoever opens
            # the next one starts from a known state, so nothing is owed to the old one.
            return None
        return session.sequenced(message, now)

    def _refuse_stale(self, peer: str, epoch: int) -> None:
        self.stale += 1
        if self._fences:
            self._answers.append(Outgoing(peer, self.datagram(peer, Fenced(epoch))))
