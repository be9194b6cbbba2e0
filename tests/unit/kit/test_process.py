"""What processes stand on: restarts under virtual time, dying with a parent, locks."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.kit.process import (
    CALM_S,
    TIRELESS,
    WAVE_S,
    Death,
    Lock,
    LockHeld,
    RestartHistory,
    RestartPolicy,
    has_open,
    lock_holder,
    prepare_run_directory,
    remove_stale_socket,
    waves_of_death,
)

POLICY = RestartPolicy()


def test_a_first_death_is_answered_at_once() -> None:
    history = RestartHistory(POLICY)
    assert history.delay_after_death(1000.0, jitter=1.0) == 0.0
    assert history.restarts == 1


def test_further_deaths_wait_twice_as_long_each() -> None:
    history = RestartHistory(RestartPolicy(deaths_max=10))
    delays = [history.delay_after_death(100.0 + death, jitter=1.0) for death in range(8)]
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]


def test_jitter_spreads_over_the_second_half_of_the_backoff() -> None:
    for jitter, expected in ((0.0, 0.5), (0.5, 0.75), (1.0, 1.0)):
        history = RestartHistory(POLICY)
        history.delay_after_death(0.0, jitter=jitter)
        assert history.delay_after_death(1.0, jitter=jitter) == expected


def test_a_process_that_dies_a_fourth_time_within_a_minute_stays_down() -> None:
    history = RestartHistory(POLICY)
    for death in range(3):
        assert history.delay_after_death(death * 20.0, jitter=0.0) is not None
    assert history.delay_after_death(59.9, jitter=0.0) is None
    assert history.restarts == 3


def test_a_process_that_lived_for_a_minute_starts_at_once_again() -> None:
    history = RestartHistory(POLICY)
    history.delay_after_death(0.0, jitter=1.0)
    history.delay_after_death(10.0, jitter=1.0)
    assert history.delay_after_death(71.5, jitter=1.0) == 0.0


def test_a_process_that_takes_its_time_to_fail_waits_ever_longer() -> None:
    history = RestartHistory(POLICY)
    now, delays = 0.0, []
    for _ in range(9):
        delay = history.delay_after_death(now, jitter=1.0)
        assert delay is not None
        delays.append(delay)
        now += delay + 30.0
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_what_everything_hangs_on_is_started_again_for_ever_and_at_once_if_it_had_served() -> None:
    history = RestartHistory(POLICY)
    history.follow(TIRELESS)
    assert [history.delay_after_death(2.0 * n, jitter=1.0) for n in range(1, 30)] == [0.0] * 29
    quick = [history.delay_after_death(58.1 + 0.01 * n, jitter=1.0) for n in range(1, 20)]
    assert quick[:4] == [0.1, 0.2, 0.4, 0.8]
    assert quick[-1] == TIRELESS.backoff_max_s


@given(
    gaps=st.lists(st.floats(0.0, 200.0), max_size=40),
    jitter=st.floats(0.0, 1.0),
)
def test_never_more_than_the_intensity_within_any_window(gaps: list[float], jitter: float) -> None:
    assert POLICY.deaths_max is not None
    history = RestartHistory(POLICY)
    now, starts = 0.0, []
    for gap in gaps:
        now += gap
        delay = history.delay_after_death(now, jitter=jitter)
        if delay is None:
            break
        assert 0.0 <= delay <= POLICY.backoff_max_s
        starts.append(now)
        assert sum(start >= now - POLICY.window_s for start in starts) <= POLICY.deaths_max
        now += delay


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
os.close(1)
sys.stdin.read()
"""
CHILD = """
import sys
from understudy.runtime.kit.process import die_with_parent
die_with_parent(int(sys.argv[1]))
import os, time
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_child_dies_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        descriptor = os.pidfd_open(child_pid)
        try:
            parent.kill()
            readable, _, _ = select.select([descriptor], [], [], 10.0)
            assert readable, "the child outlived its parent"
        finally:
            os.close(descriptor)


def test_a_child_whose_parent_is_already_gone_ends_at_once() -> None:
    code = "from understudy.runtime.kit.process import die_with_parent; die_with_parent(1 << 30)"
    child = subprocess.run([sys.executable, "-c", code], check=False)
    assert child.returncode == -signal.SIGKILL


def test_the_run_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "a" / "run"
    prepare_run_directory(run_dir)
    prepare_run_directory(run_dir)
    assert run_dir.stat().st_mode & 0o777 == 0o700


def test_a_run_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigurationError, match=r"open to other users \(mode 755\)"):
        prepare_run_directory(tmp_path)


def test_a_run_directory_that_is_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigurationError, match="File exists"):
        prepare_run_directory(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="not a directory"):
        prepare_run_directory(tmp_path / "link")


def test_a_lock_names_its_holder_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    lock = Lock.acquire(path, timeout_s=0.0)
    holder = lock_holder(path)
    assert holder is not None
    assert holder.pid == os.getpid()
    with pytest.raises(LockHeld) as caught:
        Lock.acquire(path, timeout_s=0.05)
    assert caught.value.pid == os.getpid()
    lock.release()
    assert lock_holder(path) is None
    Lock.acquire(path, timeout_s=0.0).release()


def test_a_lock_file_left_by_a_killed_process_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("12345\n")
    assert lock_holder(path) is None
    lock = Lock.acquire(path, timeout_s=0.0)
    assert path.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_who_looks_at_a_lock_does_not_stop_who_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    reader = os.open(path, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(reader, fcntl.LOCK_SH)
    with pytest.raises(LockHeld):
        Lock.acquire(path, timeout_s=0.0)
    os.close(reader)
    Lock.acquire(path, timeout_s=1.0).release()


def test_the_holder_of_the_lock_removes_a_stale_socket(tmp_path: Path) -> None:
    path = tmp_path / "supervisor.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    lock = Lock.acquire(tmp_path / "lock", timeout_s=0.0)
    remove_stale_socket(path, lock)
    assert not path.exists()
    remove_stale_socket(path, lock)
    lock.release()


def deaths(*told: tuple[str, float]) -> list[Death]:
    return [Death(name, at) for name, at in told]


def test_engines_that_die_together_make_a_wave_and_one_that_dies_often_makes_none() -> None:
    assert waves_of_death(deaths(("a", 0.0), ("b", WAVE_S)), 2) == 1
    assert waves_of_death(deaths(("a", 0.0), ("b", WAVE_S + 0.1)), 2) == 0
    assert waves_of_death(deaths(*(("a", float(at)) for at in range(10))), 2) == 0
    assert waves_of_death(deaths(*(("a", float(at)) for at in range(10))), 1) == 0


def test_a_wave_needs_a_majority() -> None:
    assert waves_of_death(deaths(("a", 0.0), ("b", 1.0)), 4) == 0
    assert waves_of_death(deaths(("a", 0.0), ("b", 1.0), ("c", 2.0)), 4) == 1
    assert waves_of_death(deaths(("a", 0.0), ("b", 1.0)), 3) == 1


def test_waves_are_counted_in_a_row_until_it_was_calm() -> None:
    pair = [("a", 0.0), ("b", 1.0)]
    thrice = [(name, at + after) for after in (0.0, 60.0, 120.0) for name, at in pair]
    assert waves_of_death(deaths(*thrice), 2) == 3
    late = [(name, at + 121.0 + CALM_S) for name, at in pair]
    assert waves_of_death(deaths(*thrice, *late), 2) == 1


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0.0, 5.0)), max_size=40),
    st.integers(2, 5),
)
def test_each_wave_takes_a_majority_of_deaths_of_its_own(
    told: list[tuple[str, float]], num_engines: int
) -> None:
    now, history = 0.0, []
    for name, later_s in told:
        now += later_s
        history.append(Death(name, now))
    waves = waves_of_death(history, num_engines)
    assert 0 <= waves <= len(history) // max(2, num_engines // 2 + 1)
    if len({death.name for death in history}) < 2:
        assert waves == 0


def test_who_has_a_file_open_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not has_open(os.getpid(), path)
    with path.open("w"):
        assert has_open(os.getpid(), path)
    assert not has_open(2**22 + 1, path)


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    code = (
        "import os, resource, signal\n"
        "from understudy.runtime.kit.process import leave_no_core\n"
        "leave_no_core(); leave_no_core()\n"
        "assert max(resource.getrlimit(resource.RLIMIT_CORE)) <= 1\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path)
    assert done.returncode == -signal.SIGSEGV
    assert not list(tmp_path.iterdir())
