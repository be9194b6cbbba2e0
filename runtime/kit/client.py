"""A plain, blocking line to the supervisor, for the command line and the launcher.

Speaks datagrams only, so it needs no session. Imports neither asyncio nor anything heavy: the
time that ``understudy status`` takes is mostly the time of its imports.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import zmq

from understudy.protocol.codec import Envelope, decode, encode
from understudy.protocol.errors import ProtocolError, Unavailable
from understudy.protocol.messages import Message
from understudy.runtime.kit.actor import SUPERVISOR
from understudy.runtime.kit.mailbox import Mailbox

R = TypeVar("R")

_numbers = itertools.count(1)


class SupervisorClient:
    """Sends datagrams to the supervisor that answers at ``socket``, and waits for replies."""

    def __init__(self, socket: Path) -> None:
        self._identity = f"client-{os.getpid()}.{next(_numbers)}"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._mailbox = Mailbox.connect(self._context, f"ipc://{socket}", self._identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._mailbox.close()
        self._context.term()

    def send(self, message: Message, *, timeout_s: float = 1.0) -> bool:
        """Send a datagram; whether it left within the time."""
        frame = encode(Envelope(self._identity, 0, 0, 0), message)
        until = time.monotonic() + timeout_s
        while not self._mailbox.send(SUPERVISOR, frame):
            if time.monotonic() >= until:
                return False
            # A connection that comes up is an event of the socket, on which this waits.
            self._mailbox.wait(0.01)
        return True

    def request(self, message: Message, reply: type[R], *, timeout_s: float) -> R:
        """Send a datagram and wait for the reply of this class.

        Raises:
            Unavailable: nobody answered within the time.
        """
        until = time.monotonic() + timeout_s
        if self.send(message, timeout_s=timeout_s):
            while (left_s := until - time.monotonic()) > 0:
                self._mailbox.wait(left_s)
                for _, raw in self._mailbox.receive(16):
                    try:
                        answer = decode(raw).message
                    except ProtocolError:
                        continue
                    if isinstance(answer, reply):
                        return answer
        raise Unavailable("the supervisor does not answer")
