"""The mailbox of a process: one ZeroMQ socket, bounded, and never waiting.

The rules behind the options were each measured: a ROUTER without ``ROUTER_MANDATORY`` drops
messages to a slow or unknown peer in silence; a socket without ``IMMEDIATE`` fills a pipe that
leads nowhere; each incarnation of an actor needs an identity of its own, or a ROUTER mixes the
dead with the living. A message that cannot be sent now is not kept here: the session above sends
it again.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import Final

import zmq

from understudy.protocol.codec import FRAME_BYTES_MAX
from understudy.runtime.kit.actor import SUPERVISOR

HIGH_WATER_MARK: Final = 10_000
"""Messages that may wait in each direction for each peer."""


class Mailbox:
    """Non-blocking frames in and out.

    ZeroMQ's sockets may be used by one thread at a time; a lock lets the thread that sends
    heartbeats share the socket with the loop.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._lock = threading.Lock()
        self._is_router = socket.type == zmq.ROUTER
        self._nudges = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)
        self._poll.register(self._nudges, select.POLLIN)
        self.unsent = 0
        self.misshapen = 0
        """What came in another number of parts than a frame has."""

    @classmethod
    def bind(cls, context: zmq.Context[zmq.Socket[bytes]], address: str) -> Mailbox:
        """The supervisor's mailbox: many peers, each known by its identity.

        Raises:
            zmq.ZMQError: the address cannot be bound.
        """
        socket = context.socket(zmq.ROUTER)
        _set_limits(socket)
        # Whoever sends more is cut off for good. A member has no such limit: it would be cut off
        # itself, and what is too large for it the codec refuses.
        socket.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            socket.bind(address)
        except zmq.ZMQError:
            socket.close(linger=0)
            raise
        return cls(socket)

    @classmethod
    def connect(
        cls, context: zmq.Context[zmq.Socket[bytes]], address: str, identity: str
    ) -> Mailbox:
        """A member's mailbox: its one peer is the supervisor, which may come later."""
        socket = context.socket(zmq.DEALER)
        _set_limits(socket)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 100)
        socket.setsockopt(zmq.ROUTING_ID, identity.encode())
        socket.connect(address)
        return cls(socket)

    @property
    def fd(self) -> int:
        """Readable, once, when the socket's state may have changed (edge-triggered)."""
        return int(self._socket.getsockopt(zmq.FD))

    def has_frames(self) -> bool:
        """Whether a frame can be received now. Re-arms ``fd``."""
        with self._lock:
            events = self._socket.getsockopt(zmq.EVENTS)
        assert isinstance(events, int)
        return bool(events & zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Block until a frame is there, or the time is over.

        It waits on descriptors and not on the socket, which would have to stay locked meanwhile
        and so starve the heartbeats.
        """
        if timeout_s <= 0 or self.has_frames():
            return
        if self._poll.poll(timeout_s * 1000):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._nudges)

    def nudge(self) -> None:
        """Wake the thread in ``wait`` if a frame is there.

        Any use of the socket may swallow the descriptor's edge, so a thread that used it while
        another waits has to pass the news on.
        """
        if self.has_frames():
            os.eventfd_write(self._nudges, 1)

    def receive(self, frames_max: int) -> list[tuple[str, bytes]]:
        """Take what is there, at most so many: (peer, frame)."""
        frames = []
        with self._lock:
            for _ in range(frames_max):
                try:
                    parts = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if self._is_router and len(parts) == 2:
                    frames.append((parts[0].decode(errors="replace"), parts[1]))
                elif not self._is_router and len(parts) == 1:
                    frames.append((SUPERVISOR, parts[0]))
                else:
                    self.misshapen += 1
        return frames

    def send(self, to: str, frame: bytes) -> bool:
        """Hand a frame to the transport; whether it took it."""
        parts = [to.encode(), frame] if self._is_router else [frame]
        with self._lock:
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno not in {zmq.EAGAIN, zmq.EHOSTUNREACH}:
                    raise
                self.unsent += 1
                return False
        return True

    def close(self) -> None:
        """Close the socket; what was sent last may still go out within a second."""
        with self._lock:
            self._socket.close(linger=1000)
        os.close(self._nudges)


def _set_limits(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
