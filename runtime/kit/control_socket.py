"""The socket by which an operator's command reaches a launcher and hears how far it is.

One word goes in; lines come back, the last of them with an exit status. A unix socket in the run
directory, which only its owner can open. Never blocks the side that answers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from understudy.protocol.errors import Unavailable

COMMAND_BYTES_MAX: Final = 64
LINE_BYTES_MAX: Final = 4096
CALLERS_MAX: Final = 8
_COMMAND_WITHIN_S: Final = 0.25


class Caller:
    """A command that came in, and the line back to who gave it. It may hang up at any time."""

    def __init__(self, connection: socket.socket, command: str) -> None:
        self.command = command
        self._connection = connection

    def say(self, line: str) -> None:
        """Tell how far it is."""
        self._send(f"say {line}")

    def end(self, status: int, line: str) -> None:
        """Tell the outcome, and hang up."""
        self._send(f"end {status} {line}")
        self.hang_up()

    def hang_up(self) -> None:
        """Say nothing more; without an outcome, the command counts as not done."""
        self._connection.close()

    def _send(self, text: str) -> None:
        with suppress(OSError):  # whoever asked does not listen any more
            self._connection.send(text.encode()[:LINE_BYTES_MAX])


class ControlSocket:
    """The answering side. The holder of the run directory's lock makes one."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        """Readable when somebody calls."""
        self.socket.bind(os.fspath(path))
        path.chmod(0o600)
        self.socket.listen(CALLERS_MAX)
        self.socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()

    def accept(self) -> Caller | None:
        """The next command, if one has come."""
        try:
            connection, _ = self.socket.accept()
        except BlockingIOError:
            return None
        try:
            # It is sent with the call: this waits for nobody but one who never sends it.
            connection.settimeout(_COMMAND_WITHIN_S)
            command = connection.recv(COMMAND_BYTES_MAX).decode(errors="replace")
        except OSError:
            command = ""
        connection.setblocking(False)
        if not command:
            connection.close()
            return None
        return Caller(connection, command)


class Outcome:
    """What a command came to; known when its lines have all been read."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.line = ""


def give_command(path: Path, command: str, outcome: Outcome) -> Iterator[str]:
    """Give a command, and yield the lines that come back until there is an ``outcome``.

    Raises:
        Unavailable: nobody listens there, or whoever did ended before the command was done.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with closing(connection):
        try:
            connection.connect(os.fspath(path))
            connection.send(command.encode())
            while answer := connection.recv(LINE_BYTES_MAX).decode(errors="replace"):
                kind, _, rest = answer.partition(" ")
                if kind == "end":
                    status, _, outcome.line = rest.partition(" ")
                    outcome.status = int(status)
                    return
                yield rest
        except OSError as error:
            raise Unavailable(f"{path}: {error.strerror}") from error
    raise Unavailable("the launcher ended before it was done")
