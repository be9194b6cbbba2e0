"""The journal under anything, against the story it was told: plain dicts and tuples.

Two journals get the same records: one compacts all the time, the other never. Whatever happens to
the processes, both give back the story as of the last commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.unit.storage.story import LONG, Known, Story, as_known, everything
from understudy.protocol.request import FinishReason
from understudy.runtime.storage.journal import Journal, JournalOptions, Opened
from understudy.runtime.storage.records import Record, Step
from understudy.runtime.storage.recovery import DAMAGE_CODE
from understudy.runtime.storage.segment_writer import SyncPolicy
from understudy.runtime.storage.virtual_disk import DiskFaults, Killed, VirtualDisk

PLAIN = JournalOptions(retention=LONG, segment_bytes=4000, segments_max=1 << 30)
COMPACTING = replace(
    PLAIN, segment_bytes=700, compact_above_bytes=2000, portion_bytes=300, segments_max=5
)
TICK_S = 0.05


class Telling(RuleBasedStateMachine):
    """What both machines do: tell records, and remember every state since the last commit."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1.0
        self.story = Story()
        self.pending: list[Record] = []
        self.states: list[dict[int, Known]] = [{}]

    def tell(self, record: Record) -> None:
        self.pending.append(record)
        self.states.append(dict(self.story.known))

    def choose(self, picks: Sequence[int]) -> list[int]:
        """Some of the living, each once, in the order of the picks."""
        live = self.story.live
        return list(dict.fromkeys(live[pick % len(live)] for pick in picks)) if live else []

    @rule(wants_logprobs=st.booleans())
    def admit(self, wants_logprobs: bool) -> None:
        if len(self.story.live) < 8:
            self.tell(self.story.admit(wants_logprobs=wants_logprobs))

    @rule(pick=st.integers(0, 7))
    def assign(self, pick: int) -> None:
        for request_id in self.choose([pick]):
            self.tell(self.story.assign(request_id))

    @rule(times=st.integers(1, 40), all_but=st.integers(0, 9))
    def steps(self, times: int, all_but: int) -> None:
        """Steps of a batch that stays the same, as there are most."""
        live = self.story.live
        batch = live[:all_but] + live[all_but + 1 :]
        for _ in range(times):
            self.tell(self.story.step(batch))

    @rule(
        picks=st.lists(st.integers(0, 7), min_size=1, max_size=8),
        counts=st.lists(st.integers(0, 3), min_size=8, max_size=8),
        ending=st.integers(0, 31),
    )
    def odd_step(self, picks: list[int], counts: list[int], ending: int) -> None:
        """A step of any batch, with any number of tokens, in which some end."""
        rows = []
        for index, request_id in enumerate(self.choose(picks)):
            finish = FinishReason.LENGTH if ending >> index & 1 else None
            tokens = [self.story.random.randrange(1 << 32) for _ in range(counts[index])]
            if tokens or finish:
                rows.append(self.story.row(request_id, tokens=tokens, finish=finish))
        self.tell(Step(tuple(rows)))

    @rule(pick=st.integers(0, 7))
    def end(self, pick: int) -> None:
        for request_id in self.choose([pick]):
            self.tell(self.story.end(request_id))

    @rule(ahead=st.integers(1, 1000))
    def reserve(self, ahead: int) -> None:
        self.tell(self.story.reserve(self.story.epoch + ahead))


class CrashingProcess(Telling):
    """Processes die; disks do what they are told."""

    @initialize(policy=st.sampled_from(SyncPolicy), seed=st.integers(0, 1000))
    def start(self, policy: SyncPolicy, seed: int) -> None:
        self.disks = (VirtualDisk(seed), VirtualDisk(seed))
        self.options = (replace(PLAIN, policy=policy), replace(COMPACTING, policy=policy))
        self.epoch = 0
        self.journals = self.open_all()

    def open_all(self) -> list[Journal]:
        opened = [
            Journal.open(disk, options, self.now)
            for disk, options in zip(self.disks, self.options, strict=True)
        ]
        for one in opened:
            assert everything(one) == self.story.known
            assert not one.recovery.damage
            assert one.recovery.epoch >= self.epoch
            assert list(everything(one))[: len(one.recovery.live)] == self.story.live
        return [one.journal for one in opened]

    @rule(ticks=st.integers(0, 40))
    def commit(self, ticks: int) -> None:
        self.now += ticks * TICK_S
        for journal in self.journals:
            journal.append(self.pending)
            assert journal.commit(self.now).is_written
        self.pending = []
        self.states = self.states[-1:]
        self.epoch = self.story.epoch

    @rule()
    def rest(self) -> None:
        self.commit(1)
        for _ in range(20):
            self.commit(1)

    @rule()
    def crash(self) -> None:
        """The process dies between two turns: what was not committed was told to nobody."""
        for disk in self.disks:
            disk.crash_process()
        self.forget_pending()
        self.journals = self.open_all()

    @precondition(lambda self: self.options[0].policy is SyncPolicy.STRICT)
    @rule()
    def crash_machine(self) -> None:
        for disk in self.disks:
            disk.crash_machine()
        self.forget_pending()
        self.journals = self.open_all()

    @rule(after_bytes=st.integers(0, 3000))
    def die_in_a_write(self, after_bytes: int) -> None:
        """The process dies in the middle of a turn: what is there is some beginning of it."""
        for index, disk in enumerate(self.disks):
            twin = disk.copy()
            journal = Journal.open(twin, self.options[index], self.now).journal
            journal.append(self.pending)
            twin.faults.kill_after_bytes = after_bytes
            with contextlib.suppress(Killed):
                journal.commit(self.now)
            twin.crash_process()
            opened = Journal.open(twin, self.options[index], self.now)
            assert everything(opened) in self.states
            assert not opened.recovery.damage

    def forget_pending(self) -> None:
        self.story.known = dict(self.states[0])
        self.story.epoch = self.epoch
        self.states = self.states[:1]
        self.pending = []


class FailingDisk(Telling):
    """Disks fail, fill up and lose what was not synced; machines die."""

    @initialize(policy=st.sampled_from(SyncPolicy), seed=st.integers(0, 1000))
    def start(self, policy: SyncPolicy, seed: int) -> None:
        self.disk = VirtualDisk(seed)
        self.options = replace(COMPACTING, policy=policy)
        self.journal = Journal.open(self.disk, self.options, self.now).journal
        self.was_whole = True

    @rule(
        faults=st.builds(
            DiskFaults,
            short_writes=st.sampled_from([0.0, 0.5]),
            write_errors=st.sampled_from([0.0, 0.3, 1.0]),
            sync_errors=st.sampled_from([0.0, 0.3]),
            sync_s=st.sampled_from([0.0, 0.2, 5.0]),
            is_full=st.booleans(),
        )
    )
    def fail(self, faults: DiskFaults) -> None:
        self.disk.faults = faults

    @rule()
    def mend(self) -> None:
        self.disk.faults = DiskFaults()

    @rule(ticks=st.integers(0, 100))
    def commit(self, ticks: int) -> None:
        self.now += ticks * TICK_S
        self.journal.append(self.pending)
        result = self.journal.commit(self.now)
        assert result.is_written or self.journal.degraded is not None
        self.pending = []
        self.states = self.states[-1:]
        for request_id, known in self.story.known.items():
            held = self.journal.held(request_id)
            assert held is not None
            assert held.output == known.output

    @rule()
    def heal(self) -> None:
        """Once the disk is well, the journal becomes so by itself."""
        self.mend()
        self.commit(0)
        for _ in range(400):
            if self.journal.wake_at is None:
                break
            self.now = max(self.now, self.journal.wake_at) + 1e-3
            self.journal.commit(self.now)
        assert self.journal.degraded is None
        assert self.journal.wake_at is None

    @rule()
    def crash_process(self) -> None:
        is_whole = self.journal.degraded is None
        self.disk.crash_process()
        self.story.known = dict(self.states[0])
        found = self.reopen()
        if is_whole:
            assert found == self.story.known
        self.go_on_from(found)

    @rule()
    def crash_machine(self) -> None:
        self.commit(0)
        is_durable = self.journal.degraded is None and self.journal.commit(self.now).is_durable
        self.disk.crash_machine()
        found = self.reopen()
        if is_durable:
            assert found == self.story.known
        self.go_on_from(found)

    def reopen(self) -> dict[int, Known]:
        self.disk.faults = DiskFaults()
        opened: Opened = Journal.open(self.disk, self.options, self.now)
        self.journal = opened.journal
        found = everything(opened)
        for affected in opened.recovery.affected:
            failed = self.journal.held(affected.admit.request.request_id)
            assert failed is not None
            found[affected.admit.request.request_id] = as_known(failed)
        for request_id, known in found.items():
            truth = self.story.known[request_id]
            assert known.output == truth.output[: len(known.output)], "no wrong token, ever"
            assert known.logprobs == truth.logprobs[: len(known.logprobs)]
            if known.finish is not None and known.code != DAMAGE_CODE:
                assert known.output == truth.output
        return found

    def go_on_from(self, found: dict[int, Known]) -> None:
        self.story.known = found
        self.pending = []
        self.states = [dict(found)]


FEW = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCrashingProcess = CrashingProcess.TestCase
TestCrashingProcess.settings = FEW
TestFailingDisk = FailingDisk.TestCase
TestFailingDisk.settings = FEW
