"""Usage in the journal: the latest of each day comes back, whatever happens to segments."""

from __future__ import annotations

import pytest

from tests.unit.storage.story import OPTIONS, SMALL, Story, live_a_while, reopen, start
from understudy.protocol.usage import DayUsage
from understudy.runtime.storage import records
from understudy.runtime.storage.image import USAGE_DAYS_KEPT
from understudy.runtime.storage.journal import Journal
from understudy.runtime.storage.records import Usage
from understudy.runtime.storage.segments import segment_name
from understudy.runtime.storage.virtual_disk import VirtualDisk


def usage(tenant: str, day: int, tokens: int) -> Usage:
    return Usage(tenant, DayUsage(day, 1, tokens, 0, tokens, 0.5))


def found(disk: VirtualDisk) -> dict[tuple[str, int], int]:
    """The output tokens of each tenant and day."""
    recovered = reopen(disk).recovery
    assert not recovered.damage
    return {(one.tenant, one.usage.day): one.usage.output_tokens for one in recovered.usage}


def test_a_record_of_usage_comes_back() -> None:
    one = Usage("acme", DayUsage(20_000, 1, 2, 3, 4, 5.5))
    data = b"before" + records.encode_usage(one) + b"after"
    assert records.decode_usage(data, 6, len(data) - 5) == one


def test_the_latest_of_each_day_counts() -> None:
    disk = VirtualDisk()
    journal = start(disk)
    journal.append([usage("a", 1, 10), usage("b", 1, 5)])
    journal.commit(1.0)
    journal.append([usage("a", 1, 20), usage("a", 2, 1)])
    journal.commit(2.0)
    disk.crash_process()
    assert found(disk) == {("a", 1): 20, ("a", 2): 1, ("b", 1): 5}
    disk.crash_process()
    assert found(disk) == {("a", 1): 20, ("a", 2): 1, ("b", 1): 5}


def test_usage_outlives_the_segments_that_it_was_written_in() -> None:
    disk, story = VirtualDisk(), Story()
    journal = start(disk, SMALL)
    journal.append([usage("a", 1, 10)])
    journal.commit(1.0)
    live_a_while(journal, story, 2000)
    assert journal.statistics.compactions > 0
    assert segment_name(1) not in disk.names()
    disk.crash_process()
    assert found(disk) == {("a", 1): 10}


def test_a_segment_that_is_torn_at_its_beginning_loses_nothing_of_what_was_before() -> None:
    disk = VirtualDisk()
    journal = start(disk)
    journal.append([usage(tenant, 1, 10) for tenant in "abcdef"])
    journal.commit(1.0)
    disk.crash_process()
    second = Journal.open(disk, OPTIONS, 2.0).journal
    second.close(3.0)
    name = max(disk.names())
    whole = len(disk.read(name))
    for length in range(whole):
        torn = disk.copy()
        torn.truncate(name, length)
        assert found(torn) == {(tenant, 1): 10 for tenant in "abcdef"}, length


def test_only_so_many_days_are_kept() -> None:
    disk = VirtualDisk()
    journal = start(disk)
    for day in range(USAGE_DAYS_KEPT + 10):
        journal.append([usage("a", day, day)])
    journal.commit(1.0)
    disk.crash_process()
    assert sorted(day for _, day in found(disk)) == list(range(10, USAGE_DAYS_KEPT + 10))


@pytest.mark.parametrize("raw", [b"", b"\x00", b"\x82\xa6tenant\xa1a"])
def test_what_is_no_usage_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        records.decode_usage(raw, 0, len(raw))
