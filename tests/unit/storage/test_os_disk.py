from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.storage.story import LONG, Story, everything
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.storage.disk import OsDisk
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.segment_writer import SyncPolicy
from understudy.runtime.storage.segments import segment_name

OPTIONS = JournalOptions(retention=LONG, segment_bytes=2000)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("policy", SyncPolicy)
def test_a_journal_on_a_real_disk_comes_back(tmp_path: Path, policy: SyncPolicy) -> None:
    story = Story()
    options = replace(OPTIONS, policy=policy)
    for now in range(3):
        disk = OsDisk(tmp_path / "journal", lock_wait_s=0)
        opened = Journal.open(disk, options, float(now))
        assert everything(opened) == story.known
        journal = opened.journal
        journal.append(story.opening(3))
        for turn in range(50):
            journal.append([story.step(story.live)])
            journal.commit(now + turn * 0.01)
        journal.close(now + 0.9)


def test_nobody_else_may_read_a_journal(tmp_path: Path) -> None:
    journal = Journal.open(OsDisk(tmp_path / "journal"), OPTIONS, 0.0).journal

    assert mode_of(tmp_path / "journal") == 0o700
    for path in (tmp_path / "journal").iterdir():
        assert mode_of(path) == 0o600
    journal.close(1.0)


def test_a_second_process_is_refused_and_the_first_is_named_by_its_lock(tmp_path: Path) -> None:
    journal = Journal.open(OsDisk(tmp_path), OPTIONS, 0.0).journal

    with pytest.raises(ConfigurationError, match="another supervisor has this journal"):
        Journal.open(OsDisk(tmp_path, lock_wait_s=0.05), OPTIONS, 0.0)

    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    journal.close(1.0)
    Journal.open(OsDisk(tmp_path, lock_wait_s=0), OPTIONS, 1.0).journal.close(1.0)


def test_a_predecessor_that_is_still_dying_is_waited_for(tmp_path: Path) -> None:
    dying = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(dying, fcntl.LOCK_EX)
    timer = threading.Timer(0.1, os.close, [dying])
    timer.start()

    journal = Journal.open(OsDisk(tmp_path, lock_wait_s=60), OPTIONS, 0.0).journal

    journal.close(1.0)
    timer.join()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from understudy.runtime.storage.disk import OsDisk\n"
        "OsDisk(Path(sys.argv[1])).lock()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": "deploy/editable"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)

    Journal.open(OsDisk(tmp_path, lock_wait_s=0), OPTIONS, 0.0).journal.close(0.0)


def test_a_place_that_is_no_directory_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigurationError, match="make the directory writable"):
        Journal.open(OsDisk(tmp_path / "file" / "journal"), OPTIONS, 0.0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_says_what_to_do(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(ConfigurationError, match="Permission denied"):
        Journal.open(OsDisk(tmp_path / "journal"), OPTIONS, 0.0)


def test_a_sync_beside_the_turns_is_noticed_when_it_is_done(tmp_path: Path) -> None:
    disk = OsDisk(tmp_path)
    disk.lock()
    file = disk.create(segment_name(1))
    assert file.write(b"abc") == 3
    file.start_sync(0.0)
    disk.close()

    assert file.poll_sync(0.0)
    assert file.poll_sync(0.0)
    file.close()
    disk.sync(segment_name(1))
    assert disk.size(segment_name(1)) == 3
    assert disk.read(segment_name(1), 2) == b"ab"


def test_a_file_that_is_closed_during_its_sync_is_closed_after_it(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    disk = OsDisk(tmp_path)
    file = disk.create(segment_name(1))
    file.start_sync(0.0)
    file.close()
    disk.close()

    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_failing_sync_is_told_once(tmp_path: Path) -> None:
    disk = OsDisk(tmp_path)
    file = disk.create(segment_name(1))
    file.close()
    file.start_sync(0.0)
    disk.close()

    with pytest.raises(OSError, match="Bad file descriptor"):
        file.poll_sync(0.0)
    assert file.poll_sync(0.0)


def test_files_can_be_cut_renamed_and_removed(tmp_path: Path) -> None:
    disk = OsDisk(tmp_path)
    file = disk.create("one")
    file.write(b"12345")
    file.close()
    disk.truncate("one", 2)
    disk.rename("one", "two")
    assert disk.names() == ["two"]
    assert disk.read("two") == b"12"
    disk.remove("two")
    disk.remove("two")
    assert disk.names() == []
    disk.close()
