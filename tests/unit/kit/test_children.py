"""Watching child processes: their ends, signals, and stopping them in time."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy.runtime.kit.children import Child, Watch, watch
from understudy.runtime.kit.process import ProcessSpec, RestartPolicy

FOREVER = "import time; time.sleep(600)"
STUBBORN = f"""
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(os.environ["FIFO"], "w") as fifo:
    fifo.write("up")
{FOREVER}
"""
WAIT_S = 30.0


@pytest.fixture
def watching() -> Iterator[Watch]:
    """A watch; whatever it still watches at the end is killed."""
    with watch() as watching:
        yield watching


def child(tmp_path: Path, code: str, **environment: str) -> Child:
    """A child that runs some code; it also gets the flags that every child gets."""
    spec = ProcessSpec(
        name="child",
        argv=(sys.executable, "-c", code),
        environment=environment,
        restart=RestartPolicy(),
    )
    return Child(spec, last_words=tmp_path / "child.error")


def start_stubborn_child(watching: Watch, tmp_path: Path) -> Child:
    """A child that has just told, through a pipe, that it ignores being asked to end."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    stubborn = child(tmp_path, STUBBORN, FIFO=str(fifo))
    watching.start(stubborn)
    assert fifo.read_text() == "up"
    return stubborn


def test_an_end_is_told_with_its_status(watching: Watch, tmp_path: Path) -> None:
    failing = child(tmp_path, "raise SystemExit(7)")
    pid = watching.start(failing)
    (end,) = watching.wait(WAIT_S)
    assert (end.child, end.pid, end.status) == (failing, pid, 7)
    assert failing.process is None


def test_a_death_by_a_signal_is_told_as_its_negative_number(
    watching: Watch, tmp_path: Path
) -> None:
    killed = child(tmp_path, FOREVER)
    watching.start(killed)
    killed.send_signal(signal.SIGKILL)
    (end,) = watching.wait(WAIT_S)
    assert end.status == -signal.SIGKILL


def test_a_signal_to_stop_ends_the_wait_and_is_counted(watching: Watch) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGHUP)
    assert watching.wait(WAIT_S) == []
    assert watching.stop_signals == 2


def test_signals_mean_what_they_meant_before_once_the_watch_is_over() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watch():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_children_that_end_when_asked_are_not_killed(watching: Watch, tmp_path: Path) -> None:
    children = [child(tmp_path, FOREVER) for _ in range(3)]
    for each in children:
        watching.start(each)
    assert watching.stop(children, limit_s=WAIT_S)
    assert [each.process for each in children] == [None, None, None]


def test_a_child_that_does_not_end_in_time_is_killed(watching: Watch, tmp_path: Path) -> None:
    stubborn = start_stubborn_child(watching, tmp_path)
    assert not watching.stop([stubborn], limit_s=0.05)
    assert stubborn.process is None


def test_a_second_signal_to_stop_means_now(watching: Watch, tmp_path: Path) -> None:
    stubborn = start_stubborn_child(watching, tmp_path)
    watching.stop_signals = 1
    os.kill(os.getpid(), signal.SIGINT)
    assert not watching.stop([stubborn], limit_s=3600.0)


def test_last_words_are_those_of_the_last_life(watching: Watch, tmp_path: Path) -> None:
    code = (
        "import os, sys; words = [w for w in sys.argv if w.startswith('--last-words=')][0];"
        "open(words.partition('=')[2], 'w').write('no model\\n') if 'SPEAK' in os.environ else None"
    )
    speaking = child(tmp_path, code, SPEAK="1")
    watching.start(speaking)
    watching.wait(WAIT_S)
    assert speaking.last_words() == "no model"
    speaking.spec = child(tmp_path, code).spec
    watching.start(speaking)
    watching.wait(WAIT_S)
    assert speaking.last_words() == ""


def test_a_child_is_in_a_process_group_of_its_own(watching: Watch, tmp_path: Path) -> None:
    own = child(tmp_path, FOREVER)
    pid = watching.start(own)
    assert os.getpgid(pid) == pid
    watching.stop([own], limit_s=WAIT_S)


def test_a_socket_that_is_attended_to_ends_the_wait(watching: Watch) -> None:
    here, there = socket.socketpair()
    with here, there:
        watching.attend(here)
        there.send(b"x")
        assert watching.wait(WAIT_S) == []
        assert here.recv(1) == b"x"


def test_a_child_inherits_the_descriptors_of_its_spec_and_no_others(
    watching: Watch, tmp_path: Path
) -> None:
    given, kept = os.pipe()
    code = (
        f"import os; os.fstat({given})\ntry: os.fstat({kept})\nexcept OSError: raise SystemExit(9)"
    )
    heir = child(tmp_path, code)
    heir.spec = dataclasses.replace(heir.spec, descriptors=(given,))
    watching.start(heir)
    (end,) = watching.wait(WAIT_S)
    os.close(given)
    os.close(kept)
    assert end.status == 9
