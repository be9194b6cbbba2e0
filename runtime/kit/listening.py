"""Listening sockets: bound here, or taken over from whoever bound them for us.

A socket that outlives the process behind it refuses nobody: connections wait in its queue until
the next process accepts them. Knows nothing of HTTP.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import Final

from understudy.protocol.errors import ConfigurationError

BACKLOG: Final = 1024
SEND_BUFFER_BYTES: Final = 16 << 10
"""The kernel's share of what a client may leave unread; Linux doubles it."""

_FIRST_PASSED: Final = 3
"""``SD_LISTEN_FDS_START`` of sd_listen_fds(3)."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ``port`` 0 is any free one.

    Connections inherit the small send buffer, so that clients who do not read cost little.

    Raises:
        ConfigurationError: the address is none, or is in use.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigurationError(f"cannot listen on {host}:{port}: ports end at 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error}") from error
    return listener


def inherited(descriptor: int) -> socket.socket:
    """The listening socket that this process was started with.

    Raises:
        ConfigurationError: the descriptor is not open, or is no listening TCP socket.
    """
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigurationError(f"file descriptor {descriptor}: {error.strerror}") from error
    is_stream = listener.type == socket.SOCK_STREAM
    is_internet = listener.family in {socket.AF_INET, socket.AF_INET6}
    if not (
        is_stream and is_internet and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        listener.detach()
        raise ConfigurationError(f"file descriptor {descriptor}: not a listening TCP socket")
    os.set_inheritable(descriptor, False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.setblocking(False)
    return listener


def take_passed_descriptor(environment: MutableMapping[str, str], *, pid: int) -> int | None:
    """The socket that systemd, or who speaks like it, passed to this process (sd_listen_fds(3)).

    The variables are removed: they are meant for this process and not for its children.

    Raises:
        ConfigurationError: it passed several.
    """
    receiver = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if receiver != str(pid) or count in {"", "0"}:
        return None
    if count != "1":
        raise ConfigurationError(f"LISTEN_FDS: expected 1 socket, got {count!r}")
    return _FIRST_PASSED


def open_listener(host: str, port: int, descriptor: int | None = None) -> socket.socket:
    """The socket to listen on: the one that was passed to this process, or else a new one.

    Raises:
        ConfigurationError: what was passed is no listening socket, or the address is of no use.
    """
    if descriptor is None:
        descriptor = take_passed_descriptor(os.environ, pid=os.getpid())
    return listen(host, port) if descriptor is None else inherited(descriptor)


def address_of(listener: socket.socket) -> str:
    """Where a socket listens, as ``host:port``."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
