"""Listening sockets: bound, inherited, passed by systemd, and shared by two processes."""

from __future__ import annotations

import os
import socket

import pytest

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.kit.listening import (
    address_of,
    inherited,
    listen,
    take_passed_descriptor,
)


def test_a_port_in_use_is_said_in_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("127.0.0.1", 70_000)])
def test_an_address_that_is_none_is_said_in_one_line(host: str, port: int) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen on"):
        listen(host, port)


def test_any_address_of_the_machine_will_do() -> None:
    for host in ("", "0.0.0.0", "::1", "localhost"):
        with listen(host, 0) as listener:
            assert listener.getsockname()[1] > 0


def test_a_connection_waits_while_nobody_accepts_and_the_next_listener_gets_it() -> None:
    with listen("127.0.0.1", 0) as first:
        second = inherited(os.dup(first.fileno()))
        address = first.getsockname()
    with second, socket.create_connection(address) as client:
        client.sendall(b"hello")
        second.setblocking(True)
        connection, _ = second.accept()
        with connection:
            assert connection.recv(5) == b"hello"


def test_an_inherited_socket_is_kept_from_children() -> None:
    with listen("127.0.0.1", 0) as first:
        copy = os.dup(first.fileno())
        os.set_inheritable(copy, True)
        with inherited(copy) as second:
            assert not second.get_inheritable()


def test_a_descriptor_that_is_no_listening_socket_is_said_in_one_line() -> None:
    with pytest.raises(ConfigurationError, match="file descriptor 999: Bad file descriptor"):
        inherited(999)
    here, there = socket.socketpair()
    with here, there:
        message = f"file descriptor {here.fileno()}: not a listening TCP socket"
        with pytest.raises(ConfigurationError, match=message):
            inherited(here.fileno())
        assert os.fstat(here.fileno())


def test_what_systemd_passes_is_taken_by_the_process_that_it_is_for_and_no_other() -> None:
    environment = {"LISTEN_PID": "7", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http", "HOME": "/"}
    assert take_passed_descriptor(dict(environment), pid=7) == 3
    assert take_passed_descriptor(dict(environment), pid=8) is None
    assert take_passed_descriptor({}, pid=7) is None
    assert take_passed_descriptor({"LISTEN_PID": "7", "LISTEN_FDS": "0"}, pid=7) is None
    take_passed_descriptor(environment, pid=7)
    assert environment == {"HOME": "/"}


def test_more_than_one_passed_socket_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected 1 socket, got '2'"):
        take_passed_descriptor({"LISTEN_PID": "7", "LISTEN_FDS": "2"}, pid=7)


def test_an_address_is_told_as_clients_write_it() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert address_of(listener) == f"127.0.0.1:{listener.getsockname()[1]}"
    with listen("::1", 0) as listener:
        assert address_of(listener) == f"[::1]:{listener.getsockname()[1]}"
