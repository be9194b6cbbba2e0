"""The engine: runs the sequences that it is given, a step at a time, and reports every step.

One process for each GPU. Knows nothing of text, tenants or HTTP, and keeps nothing that cannot be
made again from a request and the output it already has: when it dies, another goes on.

When the supervisor is gone, the engine plays on in silence. With the next session it says what it
holds, and what it added to each request, and is told what to drop.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from heapq import heappop, heappush
from typing import Final, NamedTuple, Protocol

from understudy.protocol.messages import (
    Assign,
    Cancel,
    Capacity,
    Heartbeat,
    Hello,
    Inventory,
    Message,
    ResetPrefixCache,
    Role,
    StepOutput,
)
from understudy.protocol.request import FinishReason, TokenRow, portions
from understudy.runtime.kit.actor import SUPERVISOR, Outbox
from understudy.runtime.kit.clock import Clock
from understudy.runtime.kit.membership import Membership, MembershipChange
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.decision import (
    Draws,
    Flight,
    OutOfMemory,
    OverlappingRunner,
    Runner,
    StepPlan,
)
from understudy.runtime.scheduling.scheduler import NO_DRAFTS, Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.scheduling.speculation import Speculator

ABANDONED_AFTER_S: Final = 60.0
"""Without a supervisor for so long, the engine drops what it holds: nobody will ask for it."""
ENDED_KEPT_MAX: Final = 1024
ENDED_KEPT_S: Final = 10.0
"""How many requests, and for how long, are remembered after their end: a supervisor that died may
not have heard of it, and it takes a while until its death is noticed."""
INVENTORY_TOKENS: Final = 64 * 1024
"""Tokens in one message of an inventory, unless a single request has more."""


SHED_PAUSE_S: Final = 0.002
SHED_PAUSE_MAX_S: Final = 1.0
"""After a step that did not fit: whoever else uses the memory may give it back. Doubled each time.
"""


class StepCard(Protocol):
    """Where the engine notes which requests the present step runs, for whoever finds it dead."""

    def enter(self, request_ids: list[int]) -> None:
        """A step with these requests begins."""
        ...

    def leave(self) -> None:
        """The step has ended well."""
        ...


class _Output:
    """What this engine added to one request, in the form in which an inventory tells it."""

    __slots__ = ("finish", "logprobs", "position", "sequence", "vector")

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.position = sequence.num_output_tokens
        self.logprobs: list[bytes] = []
        self.finish = 0
        self.vector = b""

    def row(self) -> TokenRow:
        """All of it."""
        sequence = self.sequence
        return TokenRow(
            sequence.request_id,
            sequence.attempt,
            self.position,
            tuple(sequence.token_ids[sequence.num_prompt_tokens + self.position :]),
            sequence.prefix_hash,
            self.finish,
            tuple(self.logprobs),
            self._num_cached_tokens(),
            vector=self.vector,
        )

    def _num_cached_tokens(self) -> int:
        """Known with the first token: before it, another engine may yet make that one."""
        has_first = self.position == 0 and (self.sequence.num_output_tokens or self.vector)
        return (self.sequence.num_cached_tokens or 0) if has_first else 0


class _Done(NamedTuple):
    """A step that is over."""

    draws: Draws

    def collect(self) -> Draws:
        """See ``Flight``."""
        return self.draws


class _InTurn(NamedTuple):
    """A runner that comes back from a step when it is over."""

    runner: Runner

    @property
    def overlaps(self) -> bool:
        """See ``OverlappingRunner``."""
        return False

    def launch(self, plan: StepPlan) -> Flight:
        """See ``OverlappingRunner``."""
        return _Done(self.runner.execute(plan))


class _Step(NamedTuple):
    """A step under way."""

    plan: StepPlan
    flight: Flight
    begun_at: float


class _Ended(NamedTuple):
    """An output that is complete, and since when."""

    output: _Output
    at: float


class Engine:
    """The engine actor: scheduler, KV blocks and runner, and the session with the supervisor."""

    def __init__(
        self,
        hello: Hello,
        *,
        scheduler_config: SchedulerConfig,
        num_blocks: int,
        enable_prefix_caching: bool = True,
        speculator: Speculator | None = None,
        runner: Runner | OverlappingRunner,
        card: StepCard,
        clock: Clock,
    ) -> None:
        self.outbox = Outbox()
        self._runner: OverlappingRunner = (
            runner if isinstance(runner, OverlappingRunner) else _InTurn(runner)
        )
        self._speculator = speculator
        # A guess begins behind the last token, so that one has to be known first.
        self._overlaps = self._runner.overlaps and speculator is None
        self._under_way: _Step | None = None
        """The step that the device computes between two turns."""
        self._card = card
        self._clock = clock
        self._step = 0
        self._num_shed = 0
        self._stepped_at: float | None = None
        """When the last step ended, if the engine has had work since."""
        self._pause_until = float("-inf")
        self._phase = "idle"
        self._phase_since = clock.now()
        self._membership = Membership(hello, self.outbox)
        self._kv_cache_manager = KVCacheManager(
            num_blocks=num_blocks,
            block_size=scheduler_config.block_size,
            enable_prefix_caching=enable_prefix_caching,
        )
        self._scheduler = Scheduler(scheduler_config, self._kv_cache_manager)
        self._outputs: dict[int, _Output] = {}
        self._ended: OrderedDict[int, _Ended] = OrderedDict()
        self._deadlines: list[tuple[float, int, int]] = []
        """When which attempt of a request has to be over; a heap."""
        self._alone_since: float | None = None

    @property
    def wake_at(self) -> float | None:
        """At once while there is work, unless the device has to be given time."""
        if self._under_way is None and not self._scheduler.has_work:
            return self._membership.wake_at
        return min(max(self._clock.now(), self._pause_until), self._membership.wake_at)

    def handle(self, message: Message, sender: str, now: float) -> None:  # noqa: ARG002
        """Take in a message from the supervisor, the only one who speaks to an engine."""
        self._change(self._membership.handle(message, now), now)
        match message:
            case Assign():
                self._assign(message, now)
            case Cancel(request_id):
                self._scheduler.cancel(request_id)
                self._outputs.pop(request_id, None)
            case ResetPrefixCache():
                self._kv_cache_manager.reset_prefix_cache()
            case _:
                pass

    def lose(self, peer: str, now: float) -> None:  # noqa: ARG002
        """The supervisor has not listened for too long: ask for a new session."""
        self._change(self._membership.leave(now), now)

    def decide(self, now: float) -> None:
        """Run one step, if there is work, and report it.

        Where the device can compute by itself, the next step is launched before that: it has
        work while this one is taken in, reported and told.
        """
        self._change(self._membership.decide(now), now)
        if self._alone_since is not None and now >= self._alone_since + ABANDONED_AFTER_S:
            self._drop_all()
        if now < self._pause_until:
            return
        self._end_late(now)
        step = self._under_way or self._begin_next()
        if step is None:
            return
        self._under_way = self._begin_ahead()
        self._report(self._end(step))

    def heartbeat(self, now: float) -> Heartbeat:
        """What the engine is doing. Called from another thread, and changes nothing."""
        return Heartbeat(
            step=self._step,
            phase=self._phase,
            phase_for_s=now - self._phase_since,
            blocks_free=self._kv_cache_manager.num_free_blocks,
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            num_shed=self._num_shed,
            num_draft_tokens=0 if self._speculator is None else self._speculator.num_draft_tokens,
            num_accepted_tokens=(
                0 if self._speculator is None else self._speculator.num_accepted_tokens
            ),
        )

    def land(self) -> None:
        """The engine is to end: wait for what is under way, so that nobody is blamed for it."""
        if self._under_way is not None:
            self._under_way.flight.collect()
            self._under_way = None
            self._end_phase()

    def check_integrity(self) -> None:
        """Assert that scheduler, KV cache and outputs agree with each other."""
        self._scheduler.check_integrity()
        assert all(not output.finish for output in self._outputs.values())

    def _drafts(self) -> Mapping[int, Rows[int]]:
        """Guesses behind the running sequences."""
        running = self._scheduler.running
        if self._speculator is None or not running:
            return NO_DRAFTS
        self._enter("draft")
        self._card.enter([sequence.request_id for sequence in running])
        begun_at = self._clock.now()
        drafts = self._speculator.propose(running)
        self._speculator.note_proposal(self._clock.now() - begun_at)
        if self._stepped_at is not None:
            self._speculator.note_between(begun_at - self._stepped_at)
        self._card.leave()
        self._enter("idle")
        return drafts

    def _begin_next(self) -> _Step | None:
        """Launch the next step, if there is one and it fits."""
        plan = self._scheduler.schedule(self._drafts())
        if plan is None:
            self._stepped_at = None
            return None
        self._begin_phase_of(plan)
        begun_at = self._clock.now()
        try:
            return _Step(plan, self._runner.launch(plan), begun_at)
        except OutOfMemory:
            self._shed(plan)
            return None

    def _shed(self, plan: StepPlan) -> None:
        """Go on with less after a step that did not fit."""
        self._scheduler.shed(plan)
        self._num_shed += 1
        self._step += 1
        pause_s = SHED_PAUSE_S * 2.0 ** min(self._scheduler.num_sheds_in_a_row, 16)
        self._pause_until = self._clock.now() + min(pause_s, SHED_PAUSE_MAX_S)
        self._end_phase()

    def _begin_ahead(self) -> _Step | None:
        """Launch the step behind the one that is under way, if there can be one already.

        The requests of that step are on the card: all of this one are among them.
        """
        plan = self._scheduler.schedule_ahead() if self._overlaps else None
        if plan is None:
            return None
        try:
            return _Step(plan, self._runner.launch(plan), self._clock.now())
        except OutOfMemory:
            self._scheduler.withdraw_ahead()
            return None

    def _end(self, step: _Step) -> list[TokenRow]:
        """Take in what a step drew."""
        try:
            draws = step.flight.collect()
        except OutOfMemory:  # of what takes memory at its end, no step is launched ahead
            self._shed(step.plan)
            return []
        if self._speculator is not None:
            self._stepped_at = self._clock.now()
            self._speculator.note(step.plan, draws, self._stepped_at - step.begun_at)
        rows = self._scheduler.update(step.plan, draws)
        self._step += 1
        if self._under_way is None:
            self._end_phase()
        else:
            self._begin_phase_of(self._under_way.plan)
        return rows

    def _begin_phase_of(self, plan: StepPlan) -> None:
        self._enter("step")
        self._card.enter([scheduled.sequence.request_id for scheduled in plan.scheduled])

    def _end_phase(self) -> None:
        self._card.leave()
        self._enter("idle")

    def _report(self, rows: list[TokenRow]) -> None:
        """Tell the supervisor what a step made, now or with the next inventory."""
        rows = [row for row in rows if self._is_wanted(row)]
        for row in rows:
            output = self._outputs[row.request_id]
            if row.logprobs:
                output.logprobs.extend(row.logprobs)
            if row.finish:
                del self._outputs[row.request_id]
                output.finish = row.finish
                output.vector = row.vector
                self._ended[row.request_id] = _Ended(output, self._clock.now())
        # Without a session nobody hears of an end, however long ago it was.
        is_open = self._membership.is_open
        self._forget_ended(self._clock.now() - ENDED_KEPT_S if is_open else -math.inf)
        if self._membership.is_open:
            for some in portions(rows, rows_max=len(rows)):
                self.outbox.send(SUPERVISOR, StepOutput(self._step, some))

    def _forget_ended(self, heard_until: float) -> None:
        """Forget ends that everybody has heard of, and the oldest of too many."""
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if len(self._ended) <= ENDED_KEPT_MAX and oldest.at > heard_until:
                return
            self._ended.popitem(last=False)

    def _is_wanted(self, row: TokenRow) -> bool:
        """Whether a row is of the attempt that is here; of others, cancelled ends come late."""
        output = self._outputs.get(row.request_id)
        return output is not None and output.sequence.attempt == row.attempt

    def _end_late(self, now: float) -> None:
        """End what is past its deadline before it takes part in another step."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id, attempt = heappop(self._deadlines)
            output = self._outputs.get(request_id)
            if output is not None and output.sequence.attempt == attempt:
                self._scheduler.cancel(request_id, FinishReason.DEADLINE)

    def _assign(self, assign: Assign, now: float) -> None:
        sequence = Sequence(assign.request, attempt=assign.attempt, output=assign.output)
        known = self._outputs.get(sequence.request_id)
        if known is not None and known.sequence.attempt >= sequence.attempt:
            return
        self._outputs[sequence.request_id] = _Output(sequence)
        if assign.deadline_s is not None:
            deadline = (now + assign.deadline_s, sequence.request_id, sequence.attempt)
            heappush(self._deadlines, deadline)
        if assign.is_suspect:
            self._scheduler.add_suspect(sequence)
        else:
            self._scheduler.add(sequence)

    def _change(self, change: MembershipChange | None, now: float) -> None:
        match change:
            case MembershipChange.JOINED:
                self._alone_since = None
                self._tell_inventory()
            case MembershipChange.LOST:
                self._alone_since = now
                self._forget_ended(now - ENDED_KEPT_S)
            case None:
                pass

    def _tell_inventory(self) -> None:
        """Say what is here, in messages of bounded size."""
        rows: list[TokenRow] = []
        size = 0
        ended = [ended.output for ended in self._ended.values()]
        for output in (*ended, *self._outputs.values()):
            row = output.row()
            row_size = len(row.tokens) + len(row.vector) // 4
            if rows and size + row_size > INVENTORY_TOKENS:
                self.outbox.send(SUPERVISOR, Inventory(tuple(rows), is_last=False))
                rows, size = [], 0
            rows.append(row)
            size += row_size
        self.outbox.send(SUPERVISOR, Inventory(tuple(rows), is_last=True))

    def _drop_all(self) -> None:
        for request_id in list(self._outputs):
            self._scheduler.cancel(request_id)
        self._outputs.clear()
        self._ended.clear()
        self._alone_since = None

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._phase_since = self._clock.now()


def engine_hello(
    name: str,
    *,
    pid: int,
    start_time: int,
    model: str,
    numerics: str,
    scheduler_config: SchedulerConfig,
    num_blocks: int,
    pools_only: bool = False,
) -> Hello:
    """How an engine introduces itself."""
    capacity = Capacity(
        max_num_seqs=scheduler_config.max_num_seqs,
        max_model_len=scheduler_config.max_model_len,
        num_blocks=num_blocks,
        block_size=scheduler_config.block_size,
        pools_only=pools_only,
    )
    return Hello(
        Role.ENGINE,
        name,
        pid,
        model=model,
        capacity=capacity,
        start_time=start_time,
        numerics=numerics,
    )
