"""The journal and its disk: policies, short writes, full and failing disks, crashes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.storage.story import (
    OPTIONS,
    SMALL,
    Known,
    Story,
    as_known,
    everything,
    live_a_while,
    read,
    reopen,
    settle,
    start,
)
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import FinishReason
from understudy.runtime.storage.journal import Journal
from understudy.runtime.storage.records import Record
from understudy.runtime.storage.segment_writer import SyncPolicy
from understudy.runtime.storage.segments import segment_name
from understudy.runtime.storage.virtual_disk import DiskFaults, VirtualDisk


def test_a_directory_that_cannot_be_written_says_what_to_do() -> None:
    disk = VirtualDisk(faults=DiskFaults(is_read_only=True), name="/read/only")

    with pytest.raises(ConfigurationError, match=r"/read/only: .*make the directory writable"):
        start(disk)


def test_under_strict_a_commit_is_durable() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk, replace(OPTIONS, policy=SyncPolicy.STRICT))
    journal.append(story.opening(1))

    assert journal.commit(1.0).is_durable
    disk.crash_machine()
    assert everything(reopen(disk)) == story.known


def test_under_process_a_commit_is_written_and_no_more() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    journal.append(story.opening(1))
    result = journal.commit(1.0)

    assert result.is_written
    assert not result.is_durable
    assert journal.wake_at is None


def test_under_group_a_commit_is_durable_after_a_tenth_of_a_second() -> None:
    disk, story = VirtualDisk(faults=DiskFaults(sync_s=0.03)), Story()
    options = replace(OPTIONS, policy=SyncPolicy.GROUP)
    journal = Journal.open(disk, options, 10.0).journal
    journal.commit(10.05)
    journal.append(story.opening(1))
    assert not journal.commit(10.06).is_durable
    now = 10.06
    while journal.wake_at is not None:
        now = journal.wake_at
        journal.commit(now)

    assert journal.commit(now).is_durable
    assert 10.1 < now < 10.2
    disk.crash_machine()
    assert everything(reopen(disk)) == story.known


def test_under_group_a_slow_disk_never_makes_a_turn_wait() -> None:
    disk, story = VirtualDisk(faults=DiskFaults(sync_s=5.0)), Story()
    journal = start(disk, replace(OPTIONS, policy=SyncPolicy.GROUP, segment_bytes=2000))
    live_a_while(journal, story, 300)

    assert journal.degraded is None
    settle(journal)
    assert journal.commit(1000.0).is_durable


@pytest.mark.parametrize("policy", SyncPolicy)
def test_short_writes_are_written_to_the_end(policy: SyncPolicy) -> None:
    disk, story = VirtualDisk(faults=DiskFaults(short_writes=0.9)), Story()
    journal = start(disk, replace(OPTIONS, policy=policy))
    live_a_while(journal, story, 50)
    disk.crash_process()

    assert everything(reopen(disk)) == story.known


def test_a_full_disk_degrades_and_heals() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk, SMALL)
    live_a_while(journal, story, 20)
    disk.faults.is_full = True
    live_a_while(journal, story, 30, now=10.0)
    assert journal.degraded is not None
    assert journal.degraded.reason == "No space left on device"
    assert journal.degraded.since == 10.0
    assert not journal.commit(11.0).is_written
    disk.faults.is_full = False
    live_a_while(journal, story, 10, now=12.0)
    settle(journal)

    assert journal.degraded is None
    assert journal.statistics.degradations == 1
    live_a_while(journal, story, 10, now=600.0)
    disk.crash_process()
    opened = reopen(disk)
    assert everything(opened) == story.known
    assert not opened.recovery.damage


def test_a_degraded_journal_answers_for_its_requests() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    disk.faults.is_full = True
    live_a_while(journal, story, 30)

    for request_id, known in story.known.items():
        held = journal.held(request_id)
        assert held is not None
        assert as_known(held) == known


def test_a_degraded_journal_tries_again_less_and_less_often() -> None:
    disk = VirtualDisk(faults=DiskFaults(is_full=True))
    journal = start(disk)
    tries = []
    now = 0.0
    for _ in range(8):
        assert journal.wake_at is not None
        tries.append(journal.wake_at - now)
        now = journal.wake_at
        journal.commit(now)

    assert tries == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_crash_while_degraded_loses_the_tail_and_nothing_else() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    live_a_while(journal, story, 20)
    known = dict(story.known)
    disk.faults.is_full = True
    live_a_while(journal, story, 20, now=10.0)
    disk.crash_process()
    disk.faults.is_full = False

    opened = reopen(disk)

    assert everything(opened) == known
    assert not opened.recovery.damage


def test_a_crash_while_healing_lets_requests_go_on_from_before_the_gap() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk, replace(OPTIONS, portion_bytes=1))
    journal.append(story.opening(6))
    journal.append([story.step(story.live) for _ in range(5)])
    journal.commit(1.0)
    before = dict(story.known)
    disk.faults.is_full = True
    journal.append([story.step(story.live) for _ in range(3)])
    journal.commit(2.0)
    disk.faults.is_full = False
    for turn in range(3):
        journal.append([story.step(story.live)])
        journal.commit(5.0 + turn)
    disk.crash_process()

    opened = reopen(disk)

    found = everything(opened)
    moved = [number for number, known in found.items() if known == story.known[number]]
    behind = [number for number, known in found.items() if known == before[number]]
    assert len(moved) == 3
    assert len(behind) == 3
    assert opened.recovery.statistics.behind == 3
    assert opened.recovery.statistics.gaps == 1
    assert not opened.recovery.damage
    assert not opened.recovery.affected


@pytest.mark.parametrize("policy", [SyncPolicy.GROUP, SyncPolicy.STRICT])
def test_a_failing_sync_degrades_and_heals(policy: SyncPolicy) -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk, replace(OPTIONS, policy=policy))
    disk.faults.sync_errors = 1.0
    live_a_while(journal, story, 30)
    assert journal.degraded is not None
    assert journal.degraded.reason == "Input/output error"
    disk.faults.sync_errors = 0.0
    live_a_while(journal, story, 10, now=10.0)
    settle(journal)

    assert journal.degraded is None
    disk.crash_machine()
    assert everything(reopen(disk)) == story.known


def test_a_disk_that_is_full_at_the_start_makes_a_degraded_journal() -> None:
    disk, story = VirtualDisk(faults=DiskFaults(is_full=True)), Story()
    journal = start(disk)
    assert journal.degraded is not None
    live_a_while(journal, story, 5)
    disk.faults.is_full = False
    settle(journal)
    disk.crash_process()

    assert everything(reopen(disk)) == story.known


def test_every_byte_at_which_the_process_may_die_in_a_write_is_survived() -> None:
    story = Story()
    disk = VirtualDisk()
    journal = start(disk)
    journal.append(story.opening(2))
    journal.append([story.step(story.live)])
    journal.commit(0.5)
    states = [dict(story.known)]
    turn: list[Record] = []
    for _ in range(2):
        for tell in (
            lambda: story.step(story.live),
            story.admit,
            lambda: story.step(story.live),
            lambda: story.step(story.live, count=2),
        ):
            turn.append(tell())
            states.append(dict(story.known))
    turn.append(story.end(story.live[0], FinishReason.CANCELLED))
    states.append(dict(story.known))
    before = disk.size(segment_name(1))
    journal.append(turn)
    size = journal.commit(0.6).num_bytes
    reached = 0
    for kept in range(size + 1):
        twin = disk.copy()
        twin.truncate(segment_name(1), before + kept)

        recovery = read(twin)

        found = {held.admit.request.request_id: as_known(held) for held in recovery.live}
        matching = [i for i, state in enumerate(states) if found == _living(state)]
        assert matching, f"{kept} bytes of the turn are no state of the story"
        assert reached <= matching[0] <= reached + 1
        reached = matching[0]
        assert not recovery.damage
    assert reached == len(states) - 1


def _living(state: dict[int, Known]) -> dict[int, Known]:
    return {number: known for number, known in state.items() if known.finish is None}
