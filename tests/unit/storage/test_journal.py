from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.storage.story import LONG, Known, Story, as_known, everything, read, reopen
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import FinishReason
from understudy.runtime.storage.image import Retention
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.records import Record, Step
from understudy.runtime.storage.segment_writer import SyncPolicy
from understudy.runtime.storage.segments import segment_name
from understudy.runtime.storage.virtual_disk import DiskFaults, VirtualDisk

OPTIONS = JournalOptions(retention=LONG)
SMALL = replace(OPTIONS, segment_bytes=3000, compact_above_bytes=9000, portion_bytes=600)


def start(disk: VirtualDisk, options: JournalOptions = OPTIONS) -> Journal:
    return Journal.open(disk, options, 0.0).journal


def settle(journal: Journal, now: float = 500.0) -> None:
    """Let the journal do what it does in idle time."""
    for _ in range(100_000):
        if journal.wake_at is None:
            return
        now = max(now, journal.wake_at) + 1e-3
        journal.commit(now)
    raise AssertionError("the journal does not come to rest")


def live_a_while(
    journal: Journal, story: Story, turns: int, *, batch: int = 4, now: float = 1.0
) -> None:
    """Turns in which requests come, get tokens and end."""
    for turn in range(turns):
        while len(story.live) < batch:
            journal.append(story.opening(1))
        live = story.live
        journal.append([story.step(live, finishing=live[:1] if turn % 9 == 8 else ())])
        journal.commit(now + turn * 0.01)


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
    assert [held.admit.admitted_at for held in recovery.live] in ([5.0], [])
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
