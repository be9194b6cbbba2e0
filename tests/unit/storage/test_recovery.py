from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.storage.story import LONG, Known, Story, as_known, everything, read, reopen
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import FinishReason
from understudy.runtime.storage import records
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.records import RECORD_HEAD_BYTES
from understudy.runtime.storage.recovery import DAMAGE_CODE, Recovery
from understudy.runtime.storage.segments import MAGIC, segment_name
from understudy.runtime.storage.virtual_disk import VirtualDisk

OPTIONS = JournalOptions(retention=LONG, segment_bytes=900)


def tell(
    disk: VirtualDisk, story: Story, *, turns: int = 12, options: JournalOptions = OPTIONS
) -> int:
    """Write a journal of several segments; gives how many segments that are."""
    journal = Journal.open(disk, options, 0.0).journal
    for turn in range(turns):
        if turn % 4 == 0:
            journal.append(story.opening(2))
        live = story.live
        journal.append([story.step(live, count=1 + turn % 2)])
        if turn % 5 == 4:
            journal.append([story.step(live, finishing=live[:1]), story.end(live[1])])
        journal.commit(0.1 * turn)
    disk.crash_process()
    return len(disk.names())


def ids(recovery: Recovery) -> tuple[set[int], set[int]]:
    live = {held.admit.request.request_id for held in recovery.live}
    affected = {held.admit.request.request_id for held in recovery.affected}
    return live, affected


def check_honesty(recovery: Recovery, story: Story) -> None:
    """What goes on is exactly what was; what fails has a true beginning; nobody is both."""
    live, affected = ids(recovery)
    assert not live & affected
    for held in recovery.live:
        truth = story.known[held.admit.request.request_id]
        assert as_known(held) == truth
    for held in recovery.affected:
        truth = story.known[held.admit.request.request_id]
        assert held.admit == truth.admit
        assert held.output == truth.output[: len(held.output)]
        assert held.logprobs == truth.logprobs[: len(held.output)]
    named = {request_id for damage in recovery.damage for request_id in damage.affected}
    assert named == affected
    missing = set(story.live) - live - affected
    assert len(missing) <= recovery.statistics.lost_admissions


def test_every_flipped_bit_of_a_closed_segment_is_seen_and_never_makes_a_wrong_token() -> None:
    disk, story = VirtualDisk(), Story()
    count = tell(disk, story, options=replace(OPTIONS, segment_bytes=250))
    name = segment_name(count - 1)
    for offset in range(disk.size(name)):
        for bit in range(8):
            disk.corrupt(name, offset, 1 << bit)

            recovery = read(disk)

            disk.corrupt(name, offset, 1 << bit)
            (damage,) = recovery.damage
            assert damage.segment == name
            assert damage.offset <= offset
            check_honesty(recovery, story)


def test_a_flipped_bit_in_any_segment_is_seen_or_costs_the_very_last_record() -> None:
    disk, story = VirtualDisk(), Story()
    count = tell(disk, story, options=replace(OPTIONS, segment_bytes=2000))
    last = segment_name(count)
    for name in disk.names():
        for offset in range(disk.size(name)):
            disk.corrupt(name, offset, 1 << offset % 8)

            recovery = read(disk)

            disk.corrupt(name, offset, 1 << offset % 8)
            if recovery.damage:
                check_honesty(recovery, story)
            else:
                assert name == last
                assert recovery.statistics.torn_bytes > 0


def test_a_cut_at_every_byte_of_the_last_turn_costs_no_more_than_that_turn() -> None:
    disk, story = VirtualDisk(), Story()
    journal = Journal.open(disk, JournalOptions(retention=LONG), 0.0).journal
    journal.append(story.opening(3))
    journal.append([story.step(story.live) for _ in range(40)])
    journal.commit(0.1)
    before, length = dict(story.known), disk.size(segment_name(1))
    journal.append([story.step(story.live)])
    journal.commit(0.2)
    for cut in range(length, disk.size(segment_name(1))):
        twin = disk.copy()
        twin.truncate(segment_name(1), cut)

        opened = reopen(twin)

        assert everything(opened) == before
        assert opened.recovery.statistics.torn_bytes == cut - length
        assert twin.size(segment_name(1)) == length
        twin.crash_process()
        again = reopen(twin)
        assert everything(again) == before
        assert again.recovery.statistics.torn_bytes == 0


def test_a_missing_segment_is_named_and_only_its_requests_fail() -> None:
    disk, story = VirtualDisk(), Story()
    count = tell(disk, story, turns=30)
    for number in range(1, count):
        twin = disk.copy()
        twin.remove(segment_name(number))

        recovery = read(twin)

        if number == 1:
            # Without a header that says so, nobody knows that there was a first segment.
            assert recovery.damage or recovery.statistics.records > 0
            continue
        assert [damage.segment for damage in recovery.damage] == [segment_name(number)]
        assert recovery.damage[0].reason == "the file is missing"
        check_honesty(recovery, story)


def test_exchanged_segments_are_noticed() -> None:
    disk, story = VirtualDisk(), Story()
    tell(disk, story, turns=30)
    disk.rename(segment_name(2), "aside")
    disk.rename(segment_name(3), segment_name(2))
    disk.rename("aside", segment_name(3))

    recovery = read(disk)

    assert [damage.reason for damage in recovery.damage] == [
        "it is segment 3 under another's name",
        "it is segment 2 under another's name",
    ]
    check_honesty(recovery, story)


def test_a_segment_that_cannot_be_read_is_refused() -> None:
    disk, story = VirtualDisk(), Story()
    tell(disk, story, turns=30)
    disk.faults.unreadable = {segment_name(3)}

    recovery = read(disk)

    assert [damage.reason for damage in recovery.damage] == [
        "the file cannot be read: Input/output error"
    ]
    check_honesty(recovery, story)


def test_whoever_a_later_anchor_or_end_proves_right_goes_on() -> None:
    """Damage early on; then a quiet time in which nothing of the living is lost."""
    disk, story = VirtualDisk(), Story()
    options = JournalOptions(retention=LONG, segment_bytes=400)
    journal = Journal.open(disk, options, 0.0).journal
    journal.append(story.opening(2))
    stays, ends = story.live
    journal.append([story.step([stays, ends])])
    journal.commit(0.1)
    for _ in range(8):
        # Segments that say nothing of the two.
        journal.append(story.opening(1))
        journal.append([story.end(story.live[-1])])
        journal.commit(0.2)
    quiet = segment_name(3)
    for turn in range(40):
        journal.append([story.step([stays, ends])])
        journal.commit(0.3 + turn * 0.01)
    journal.append([story.end(ends)])
    journal.commit(0.9)
    disk.crash_process()
    disk.corrupt(quiet, 300, 4)

    opened = reopen(disk)

    (damage,) = opened.recovery.damage
    assert damage.segment == quiet
    assert stays in ids(opened.recovery)[0]
    found = everything(opened)
    assert found[stays] == story.known[stays]
    assert found[ends] == story.known[ends]


def test_whoever_damage_concerns_ends_with_an_error_and_stays_ended() -> None:
    disk, story = VirtualDisk(), Story()
    tell(disk, story, turns=30)
    disk.corrupt(segment_name(4), 200, 1)

    journal, recovery = reopen(disk)

    assert recovery.affected
    for held in recovery.affected:
        request_id = held.admit.request.request_id
        failed = journal.held(request_id)
        assert failed is not None
        assert failed.finish is FinishReason.ERROR
        assert failed.code == DAMAGE_CODE
        truth = story.known[request_id]
        assert failed.output == truth.output[: len(failed.output)]
    disk.crash_process()
    again = read(disk)
    assert ids(again)[1] == set()
    assert ids(again)[0] == ids(recovery)[0]


def test_a_damaged_segment_is_put_aside_when_nobody_needs_it() -> None:
    disk, story = VirtualDisk(), Story()
    tell(disk, story, turns=30)
    disk.corrupt(segment_name(4), 200, 1)
    journal, recovery = reopen(disk)
    now = 1000.0
    while journal.wake_at is not None:
        now = max(now, journal.wake_at) + 1e-3
        journal.commit(now)
    disk.crash_process()

    names = disk.names()

    assert segment_name(4) + ".damaged" in names
    assert len(names) == 2
    opened = reopen(disk)
    assert not opened.recovery.damage
    assert ids(opened.recovery)[0] == ids(recovery)[0]
    held = {n: k for n, k in everything(opened).items() if k.code != DAMAGE_CODE}
    assert held == {n: story.known[n] for n in held}


def test_several_damaged_places_are_all_named() -> None:
    disk, story = VirtualDisk(), Story()
    tell(disk, story, turns=40)
    disk.corrupt(segment_name(2), 150, 1)
    disk.corrupt(segment_name(5), 150, 1)
    disk.remove(segment_name(7))

    recovery = read(disk)

    assert [damage.segment for damage in recovery.damage] == [
        segment_name(2),
        segment_name(5),
        segment_name(7),
    ]
    check_honesty(recovery, story)


def test_lost_admissions_are_counted() -> None:
    disk, story = VirtualDisk(), Story()
    journal = Journal.open(disk, replace(OPTIONS, segment_bytes=1), 0.0).journal
    for turn in range(6):
        journal.append([story.admit()])
        journal.commit(0.1 * turn)
    disk.crash_process()
    disk.remove(segment_name(3))
    disk.remove(segment_name(4))

    recovery = read(disk)

    assert recovery.statistics.lost_admissions == 2
    check_honesty(recovery, story)


def test_a_journal_of_a_newer_version_is_left_alone() -> None:
    disk, story = VirtualDisk(name="/the/journal"), Story()
    tell(disk, story)
    name = segment_name(1)
    data = bytearray(disk.read(name))
    stop = RECORD_HEAD_BYTES + int.from_bytes(data[:4], "little")
    at = RECORD_HEAD_BYTES + len(MAGIC)
    data[at : at + 2] = (2).to_bytes(2, "little")
    data[:8] = records.frame(bytes(data[8:stop]))
    for offset in range(stop):
        disk.corrupt(name, offset, disk.read(name)[offset] ^ data[offset])
    before = {name: disk.read(name) for name in disk.names()}

    with pytest.raises(ConfigurationError, match="/the/journal: the journal has format 2"):
        reopen(disk)

    assert {name: disk.read(name) for name in disk.names()} == before
    disk.lock()


def test_records_that_contradict_each_other_fail_their_request_only() -> None:
    """The ledger's own hash of an output does not fit the tokens: nobody may get them."""
    disk, story = VirtualDisk(), Story()
    journal = Journal.open(disk, OPTIONS, 0.0).journal
    journal.append(story.opening(2))
    wrong, right = story.live
    journal.append([story.step([wrong, right])])
    journal.commit(0.1)
    truth = story.known[wrong]
    story.known[wrong] = replace(truth, prefix_hash=truth.prefix_hash ^ 1)
    for _ in range(40):
        journal.append([story.step([wrong, right])])
    journal.commit(0.2)
    disk.crash_process()

    recovery = read(disk)

    assert ids(recovery) == ({right}, {wrong})
    assert recovery.affected[0].output == ()
    assert "does not fit its own proof" in recovery.damage[0].reason


def test_a_segment_whose_header_was_torn_is_begun_again() -> None:
    disk, story = VirtualDisk(), Story()
    tell(disk, story)
    known = dict(story.known)
    number = len(disk.names()) + 1
    disk.lock()
    disk.create(segment_name(number)).write(b"torn")
    disk.crash_process()

    opened = reopen(disk)

    assert everything(opened) == known
    assert opened.recovery.statistics.torn_bytes == 4
    assert len(disk.names()) == number
    disk.crash_process()
    assert everything(reopen(disk)) == known


def test_a_recovered_journal_goes_on_as_if_nothing_had_been() -> None:
    disk, story = VirtualDisk(), Story()
    for round_number in range(10):
        journal, recovery = reopen(disk, OPTIONS, float(round_number))
        assert not recovery.damage
        journal.append(story.opening(1))
        live = story.live
        for turn in range(9):
            journal.append([story.step(live, count=1 + turn % 3)])
            journal.commit(round_number + turn * 0.01)
        journal.append([story.step(live, finishing=live[:1] if round_number % 3 == 2 else ())])
        journal.commit(round_number + 0.5)
        disk.crash_process()

    found: dict[int, Known] = everything(reopen(disk))

    assert found == story.known
