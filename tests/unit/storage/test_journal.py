"""The journal: what it keeps, forgets and compacts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.storage.story import (
    OPTIONS,
    SMALL,
    Story,
    as_known,
    everything,
    live_a_while,
    reopen,
    settle,
    start,
)
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.storage.image import Retention
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.records import Forget, Step
from understudy.runtime.storage.segment_writer import SyncPolicy
from understudy.runtime.storage.segments import segment_name
from understudy.runtime.storage.virtual_disk import DiskFaults, VirtualDisk


def test_an_empty_directory_is_an_empty_journal() -> None:
    opened = reopen(VirtualDisk())

    assert everything(opened) == {}
    assert opened.recovery.epoch == 0
    assert not opened.recovery.damage


def test_everything_that_was_committed_comes_back() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    journal.append(story.opening(3))
    journal.append(story.opening(1, wants_logprobs=True))
    first, second, third, fourth = story.live
    journal.append([story.step(story.live) for _ in range(70)])
    journal.append([story.step([first, second, fourth], count=3)])
    journal.append([story.step(story.live, finishing=[second]), story.end(third)])
    journal.append([story.assign(first, "engine-1.7"), story.step([fourth, first])])
    journal.append([story.reserve(900)])
    assert journal.commit(1.0).is_written
    disk.crash_process()

    opened = reopen(disk)

    assert everything(opened) == story.known
    assert opened.recovery.epoch == 900
    assert opened.recovery.statistics.torn_bytes == 0


def test_vectors_come_back_and_move_on_when_the_journal_is_compacted() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk, SMALL)
    journal.append(story.opening(3))
    one, other, _ = story.live
    journal.append([*story.pool(one), *story.pool(other, dimensions=300)])
    journal.commit(1.0)
    for now in (2.0, 102.0):
        live_a_while(journal, story, 400, now=now)
        gone = [n for n, known in story.known.items() if known.finish and not known.vector]
        journal.append([Forget(number) for number in gone])
        for number in gone:
            del story.known[number]
    journal.commit(200.0)
    settle(journal)
    assert journal.statistics.compactions > 0
    disk.crash_process()

    found = everything(reopen(disk))

    assert found[one] == story.known[one]
    assert len(found[other].vector) == 1200
    assert found == story.known


def test_what_is_to_be_forgotten_does_not_come_back() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    journal.append(story.opening(4))
    first, second, third, _ = story.live
    journal.append([story.step(story.live, finishing=[first, second]), story.end(third)])
    journal.append([Forget(first)])
    journal.commit(1.0)
    journal.append([Forget(third), Forget(123456)])
    journal.commit(2.0)
    assert journal.held(first) is None
    disk.crash_process()
    del story.known[first], story.known[third]

    for _ in range(2):
        opened = reopen(disk)
        assert everything(opened) == story.known
        assert not opened.recovery.damage
        settle(opened.journal)
        disk.crash_process()


def test_what_was_not_committed_is_not_there() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    journal.append(story.opening(1))
    journal.commit(1.0)
    known = dict(story.known)
    journal.append([story.step(story.live)])
    disk.crash_process()

    assert everything(reopen(disk)) == known


def test_a_turn_is_one_write() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    writes = disk.writes
    journal.append(story.opening(5))
    journal.append([story.step(story.live) for _ in range(5)])
    journal.commit(1.0)

    assert disk.writes == writes + 1


def test_an_idle_turn_writes_nothing() -> None:
    disk = VirtualDisk()
    journal = start(disk)
    writes = disk.writes

    for turn in range(20):
        assert journal.commit(float(turn)).is_written

    assert disk.writes == writes
    assert journal.wake_at is None


def test_a_step_of_a_full_batch_takes_few_bytes_a_token() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    journal.append(story.opening(32))
    journal.append([story.step(story.live)])
    journal.commit(1.0)

    sizes = []
    for turn in range(64):
        journal.append([story.step(story.live)])
        sizes.append(journal.commit(1.0 + turn / 100).num_bytes)

    assert sorted(sizes)[32] <= 5 * 32
    assert sum(sizes) <= 6 * 32 * len(sizes)


def test_rows_of_two_steps_of_one_engine_may_come_in_one_record() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    journal.append(story.opening(2))
    rows = story.step(story.live).rows + story.step(story.live).rows
    journal.append([Step(rows)])
    journal.append([story.step(story.live)])
    journal.commit(1.0)
    disk.crash_process()

    assert everything(reopen(disk)) == story.known


def test_a_row_that_was_journalled_before_is_our_own_mistake() -> None:
    story = Story()
    journal = start(VirtualDisk())
    journal.append(story.opening(1))
    step = story.step(story.live)
    journal.append([step])
    journal.commit(1.0)
    journal.append([*story.opening(1), story.step(story.live), step])

    with pytest.raises(AssertionError, match="in order"):
        journal.commit(2.0)


def test_an_empty_step_is_nothing() -> None:
    journal = start(VirtualDisk())
    journal.append([Step(())])

    assert journal.commit(0.5).num_bytes == 0


def test_requests_are_held_while_they_live_and_after() -> None:
    story = Story()
    journal = start(VirtualDisk())
    journal.append(story.opening(2, wants_logprobs=True))
    first, second = story.live
    journal.append([story.step(story.live, finishing=[second]), story.step([first])])
    journal.commit(1.0)

    for request_id in (first, second):
        held = journal.held(request_id)
        assert held is not None
        assert as_known(held) == story.known[request_id]
    assert journal.held(12345) is None


def test_an_ended_request_is_forgotten_after_its_time() -> None:
    disk, story = VirtualDisk(), Story()
    options = JournalOptions(retention=Retention(seconds=600))
    journal = start(disk, options)
    journal.append(story.opening(1))
    (request_id,) = story.live
    journal.append([story.end(request_id)])
    journal.commit(100.0)
    journal.commit(699.0)
    assert journal.held(request_id) is not None
    disk.crash_process()

    early = Journal.open(disk, options, 699.0).journal
    assert early.held(request_id) is not None
    early.commit(701.0)
    assert early.held(request_id) is None
    disk.crash_process()
    assert Journal.open(disk, options, 702.0).recovery.ended == ()


def test_ended_requests_are_forgotten_when_they_are_too_many() -> None:
    disk, story = VirtualDisk(), Story()
    options = JournalOptions(retention=Retention(bytes_max=10_000))
    journal = start(disk, options)
    for _ in range(50):
        journal.append(story.opening(1))
        journal.append([story.end(story.live[0])])
        journal.commit(1.0)
    journal.commit(1.0)
    held = [request_id for request_id in story.known if journal.held(request_id) is not None]
    disk.crash_process()

    assert 5 < len(held) < 15
    assert held == list(story.known)[-len(held) :]
    assert Journal.open(disk, options, 2.0).recovery.ended == tuple(held)


def test_a_clock_that_starts_anew_makes_nobody_older() -> None:
    disk, story = VirtualDisk(), Story()
    options = JournalOptions(retention=Retention(seconds=600))
    journal = Journal.open(disk, options, 50_000.0).journal
    admit = replace(story.admit(), admitted_at=50_000.0)
    journal.append([admit, *story.opening(1)])
    ended = story.live[1]
    journal.append([story.end(ended)])
    journal.commit(50_001.0)
    disk.crash_machine()

    journal, recovery = Journal.open(disk, options, 5.0)
    assert [held.admit.admitted_at for held in recovery.live] in ([4.0], [])
    disk.crash_process()
    journal, recovery = Journal.open(disk, options, 300.0)
    if recovery.ended:
        assert recovery.ended == (ended,)
        journal.commit(606.0)
        assert journal.held(ended) is None


def test_a_full_segment_is_followed_by_the_next() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk, replace(OPTIONS, segment_bytes=2000))
    live_a_while(journal, story, 200)
    disk.crash_process()

    assert len(disk.names()) > 5
    assert everything(reopen(disk)) == story.known


def test_a_compacted_journal_stays_small_and_says_the_same() -> None:
    small, large, story = VirtualDisk(), VirtualDisk(), Story()
    compacting = start(small, replace(SMALL, retention=Retention(seconds=1.0)))
    plain = start(large, replace(OPTIONS, segment_bytes=3000))
    for turn in range(3000):
        records = []
        while len(story.live) < 4:
            records += story.opening(1)
        running = story.live
        records.append(story.step(running, finishing=running[:1] if turn % 9 == 8 else ()))
        for journal in (compacting, plain):
            journal.append(records)
            journal.commit(1.0 + turn * 0.01)
    settle(compacting)
    live = {number: known for number, known in story.known.items() if known.finish is None}
    small.crash_process()
    large.crash_process()

    assert compacting.statistics.compactions > 5
    assert sum(map(small.size, small.names())) < 30_000
    assert everything(reopen(large)) == story.known
    assert everything(reopen(small, now=600.0)).items() >= live.items()


def test_compaction_adds_no_more_than_a_portion_to_a_commit() -> None:
    disk, story = VirtualDisk(), Story()
    options = replace(SMALL, portion_bytes=2000, retention=Retention(seconds=0.2))
    journal = start(disk, options)
    sizes = []
    for turn in range(400):
        while len(story.live) < 8:
            journal.append(story.opening(1))
        live = story.live
        journal.append([story.step(live, finishing=live[:1])])
        sizes.append(journal.commit(1.0 + turn * 0.01).num_bytes)

    assert journal.statistics.compactions > 2
    assert 1500 < max(sizes[1:]) < 2000 + 1500


def test_old_segments_go_only_when_their_heirs_are_on_the_medium() -> None:
    disk, story = VirtualDisk(faults=DiskFaults(sync_s=1e9)), Story()
    journal = start(disk, SMALL)
    live_a_while(journal, story, 500)

    assert segment_name(1) in disk.names()
    assert journal.statistics.compactions == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_crash_of_the_machine_costs_a_compacted_journal_nothing_that_was_durable(
    seed: int,
) -> None:
    disk, story = VirtualDisk(seed), Story(seed)
    options = replace(SMALL, policy=SyncPolicy.STRICT)
    journal = start(disk, options)
    live_a_while(journal, story, 150 + 10 * seed)
    disk.crash_machine()

    opened = reopen(disk, options)

    assert everything(opened) == story.known
    assert not opened.recovery.damage


def test_a_second_supervisor_is_refused() -> None:
    disk = VirtualDisk(name="/some/where")
    start(disk)

    with pytest.raises(ConfigurationError, match="/some/where: another supervisor has this"):
        start(disk)


def test_a_closed_journal_can_be_opened_by_others() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk)
    journal.append(story.opening(1))
    journal.close(1.0)
    disk.crash_machine()

    assert everything(reopen(disk)) == story.known
