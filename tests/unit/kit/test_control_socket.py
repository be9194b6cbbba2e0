"""The control socket: a command goes in, lines come back, and one of them is the outcome."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from understudy.protocol.errors import Unavailable
from understudy.runtime.kit.control_socket import Caller, ControlSocket, Outcome, give_command

WAIT_S = 30.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.sock"


@pytest.fixture
def control(path: Path) -> Iterator[ControlSocket]:
    with ControlSocket(path) as control:
        yield control


def answering(control: ControlSocket, answer: Callable[[Caller], None]) -> threading.Thread:
    """A thread that takes one command and answers it."""

    def wait_and_answer() -> None:
        select.select([control.socket], [], [], WAIT_S)
        caller = control.accept()
        assert caller is not None
        answer(caller)

    thread = threading.Thread(target=wait_and_answer)
    thread.start()
    return thread


def test_lines_come_back_and_the_last_is_the_outcome(control: ControlSocket, path: Path) -> None:
    commands: list[str] = []

    def answer(caller: Caller) -> None:
        commands.append(caller.command)
        caller.say("one of two")
        caller.say("two of two")
        caller.end(75, "not all was done")

    thread = answering(control, answer)
    outcome = Outcome()
    assert list(give_command(path, "restart", outcome)) == ["one of two", "two of two"]
    thread.join()
    assert (outcome.status, outcome.line) == (75, "not all was done")
    assert commands == ["restart"]


def test_nobody_who_listens_is_said(path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        list(give_command(path, "restart", Outcome()))
    ControlSocket(path).socket.close()
    with pytest.raises(Unavailable, match="Connection refused"):
        list(give_command(path, "restart", Outcome()))


def test_an_end_without_an_outcome_is_no_success(control: ControlSocket, path: Path) -> None:
    def answer(caller: Caller) -> None:
        caller.say("so far")
        caller.hang_up()

    thread = answering(control, answer)
    lines = give_command(path, "restart", outcome := Outcome())
    assert next(lines) == "so far"
    with pytest.raises(Unavailable, match="ended before it was done"):
        next(lines)
    thread.join()
    assert outcome.status is None


def test_a_caller_who_hangs_up_does_no_harm(control: ControlSocket, path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(path))
        client.send(b"restart")
        caller = control.accept()
    assert caller is not None
    caller.say("nobody hears this")
    caller.end(0, "nor this")


def test_nothing_is_accepted_from_who_says_nothing(control: ControlSocket, path: Path) -> None:
    assert control.accept() is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(path))
        assert control.accept() is None


def test_only_its_owner_can_reach_it_and_a_stale_one_is_replaced(
    control: ControlSocket, path: Path
) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    with ControlSocket(path):
        assert path.is_socket()
