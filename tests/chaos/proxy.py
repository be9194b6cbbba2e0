"""A bad network between the members of a cluster and their supervisor, on real sockets.

The proxy binds the supervisor's socket in one run directory and connects to the supervisor's own
in another, with the identity of each member that speaks. What it does to a frame on its way is
drawn from a seed.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

import zmq

_LOOK_EVERY_MS: Final = 5
HEARD_MAX: Final = 1000
FORGED_MAX: Final = 32
TO_SUPERVISOR: Final = "to supervisor"
TO_MEMBER: Final = "to member"


class Weather(NamedTuple):
    """What happens to each frame, each independently of the others."""

    loss: float = 0.0
    duplication: float = 0.0
    delay: float = 0.0
    """How many frames are held back, so that later ones overtake them."""
    delay_max_s: float = 0.05
    cut: Collection[tuple[str, str]] = ()
    """(name of a member, direction) of which no frame arrives."""


class _Held(NamedTuple):
    due_at: float
    number: int
    """Breaks ties, so that frames are never compared."""
    socket: zmq.Socket[bytes]
    parts: list[bytes]


class Proxy:
    """Carries frames between two sockets, from a thread of its own."""

    def __init__(self, members_socket: Path, supervisor_socket: Path, *, seed: int) -> None:
        self.weather = Weather()
        self.num_lost = 0
        self._supervisor = f"ipc://{supervisor_socket}"
        self._random = random.Random(seed)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._front.bind(f"ipc://{members_socket}")
        self._back: dict[bytes, zmq.Socket[bytes]] = {}
        self._held: list[_Held] = []
        self._numbers = itertools.count()
        self._forged: queue.Queue[tuple[bytes, list[bytes]]] = queue.Queue(FORGED_MAX)
        self.heard: deque[tuple[bytes, bytes]] = deque(maxlen=HEARD_MAX)
        """The latest frames to members, with whom they were for."""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._context.destroy(linger=0)

    @property
    def members(self) -> list[bytes]:
        """The identities that have spoken so far."""
        return list(self._back)

    def forge(self, identity: bytes, parts: list[bytes]) -> None:
        """Send a member something that its supervisor never said. Waits while much is waiting."""
        self._forged.put((identity, parts))

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        while not self._is_over.is_set():
            for socket, _ in poller.poll(_LOOK_EVERY_MS):
                if socket is self._front:
                    identity, frame = self._front.recv_multipart()
                    if identity not in self._back:
                        self._back[identity] = self._connect(identity)
                        poller.register(self._back[identity], zmq.POLLIN)
                    self._carry(identity, TO_SUPERVISOR, self._back[identity], [frame])
            for identity, back in self._back.items():
                while back.poll(0):
                    (frame,) = back.recv_multipart()
                    self.heard.append((identity, frame))
                    self._carry(identity, TO_MEMBER, self._front, [identity, frame])
            for _ in range(self._forged.qsize()):
                # No more than were there: what the others say must not wait for them.
                identity, parts = self._forged.get()
                self._send(self._front, [identity, *parts])
            now = time.monotonic()
            while self._held and self._held[0].due_at <= now:
                held = heapq.heappop(self._held)
                self._send(held.socket, held.parts)

    def _connect(self, identity: bytes) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, identity)
        socket.connect(self._supervisor)
        return socket

    def _carry(
        self, identity: bytes, direction: str, socket: zmq.Socket[bytes], parts: list[bytes]
    ) -> None:
        weather, draw = self.weather, self._random.random
        name = identity.decode(errors="replace").rpartition(".")[0]
        if (name, direction) in weather.cut or draw() < weather.loss:
            self.num_lost += 1
            return
        for _ in range(2 if draw() < weather.duplication else 1):
            if draw() < weather.delay:
                due_at = time.monotonic() + draw() * weather.delay_max_s
                heapq.heappush(self._held, _Held(due_at, next(self._numbers), socket, parts))
            else:
                self._send(socket, parts)

    def _send(self, socket: zmq.Socket[bytes], parts: list[bytes]) -> None:
        try:
            socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError:
            self.num_lost += 1
