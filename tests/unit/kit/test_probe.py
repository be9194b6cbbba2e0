"""What the kernel says of real processes, and of what a file of /proc would say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from understudy.runtime.control.health import ProcessState
from understudy.runtime.kit.probe import ProcProbe

SLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def test_a_process_is_alive_until_it_is_killed_and_then_ending_or_gone() -> None:
    probe = ProcProbe()
    with subprocess.Popen(SLEEP, stdin=subprocess.PIPE) as process:
        started = probe.start_time(process.pid)
        assert started > 0
        assert probe.state(process.pid, started) is ProcessState.ALIVE
        assert probe.state(process.pid, started + 1) is ProcessState.ENDING, "another process"
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert probe.state(process.pid, started) is ProcessState.ENDING, "a zombie"
    assert probe.state(process.pid, started) is ProcessState.ENDING
    assert probe.start_time(process.pid) == 0


def test_a_stopped_process_is_alive() -> None:
    probe = ProcProbe()
    with subprocess.Popen(SLEEP, stdin=subprocess.PIPE) as process:
        started = probe.start_time(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert probe.state(process.pid, started) is ProcessState.ALIVE
        process.kill()


def test_of_a_process_that_told_no_start_time_nothing_is_known() -> None:
    assert ProcProbe().state(os.getpid(), 0) is ProcessState.UNKNOWN


@pytest.mark.parametrize(
    ("state", "flags", "expected"),
    [
        ("S", 0, ProcessState.ALIVE),
        ("D", 0, ProcessState.ALIVE),
        ("R", 0x4, ProcessState.ENDING),
        ("Z", 0, ProcessState.ENDING),
        ("X", 0, ProcessState.ENDING),
    ],
)
def test_a_big_process_is_ending_long_before_it_is_gone(
    tmp_path: Path, state: str, flags: int, expected: ProcessState
) -> None:
    (tmp_path / "9").mkdir()
    fields = [state, "1", "9", "9", "0", "-1", str(flags), *["0"] * 12, "777", "0"]
    (tmp_path / "9" / "stat").write_text(f"9 (a ) name) {' '.join(fields)}")
    probe = ProcProbe(tmp_path)
    assert probe.start_time(9) == 777
    assert probe.state(9, 777) is expected
