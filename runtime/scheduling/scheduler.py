"""Decides, before each step of the model, which sequence gets how many tokens.

Why there is no prefill phase
-----------------------------
It is usual to tell two stories: prefill reads the prompt, decode writes the answer. To the model
they are one act: compute tokens that are known, and at the last of them draw another. So a sequence
is nothing but a row of known tokens and a mark, ``num_computed_tokens``, that lags behind its end.
The scheduler has one rule: **move the marks until they catch up**, within the step's budget::

      █ computed   ▒ this step (14 tokens)   ░ later steps            what others call it

    A ████████████████▒                       catches up, draws       decode
    B ██████████▒                             catches up, draws       decode
    C ████▒▒▒▒▒▒▒▒░░░░░░░                     draws nothing yet       chunked prefill
    D ▒▒▒▒                                    catches up, draws       prefill
    E ░░░░░░░░░░░░                            waits                   queued

A sequence that was preempted, or that comes from an engine that died, is a row whose mark stands at
0, output and all. A prefix found in the cache is a mark that starts further on; a draft to verify
is a longer row. None of them is a case here, and no step is of one kind or another.

Order
-----
Running sequences come first, most urgent first: by priority, then by arrival. Tokens that are left
over start waiting sequences, first come first served; nobody is passed over for being big, so
nobody starves. A sequence starts only when all its tokens fit the free blocks. From then on only
growth, a block at a time, can exhaust the pool: see ``preemption``. A sequence that cannot fit even
alone is cut by its ``num_tokens_max``, or ends at once, so nothing waits for blocks that will never
come.

Knows nothing of text, tensors, time or the bus. Its caller runs one step after another:
``schedule``, execute, ``update``. ``add`` and ``cancel`` may come at any moment between them. While
a device computes a step, ``schedule_ahead`` may plan the one behind it.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Final

from understudy.protocol.errors import ConfigurationError
from understudy.protocol.packed_logprobs import pack_logprobs
from understudy.protocol.request import FinishReason, TokenRow
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.decision import (
    Draw,
    Draws,
    NoDraw,
    Pooled,
    SampledToken,
    ScheduledSequence,
    StepPlan,
)
from understudy.runtime.scheduling.preemption import preempt_last, urgency
from understudy.runtime.scheduling.sequence import Sequence, SequenceStatus

NO_DRAFTS: Final[Mapping[int, Rows[int]]] = MappingProxyType({})
FORCED_AHEAD_MAX: Final = 32
"""Tokens behind a sequence that are known before they are drawn, taken in one step: each of them
takes a row of logits."""
NOBODY_FORCED: Final[frozenset[int]] = frozenset()
STEPS_BEFORE_WIDENING: Final = 8
"""Steps that must fit before the budget, once halved, is doubled again."""
SHEDS_MAX: Final = 16
"""After so many steps in a row that did not fit, a sequence that cannot be cut down is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits of a step and of a sequence.

    Raises:
        ConfigurationError: One line for each value that is not positive.
    """

    max_num_seqs: int
    """Sequences that run at once."""
    max_num_batched_tokens: int
    """The budget: tokens computed in one step, over all sequences."""
    max_model_len: int
    """Tokens of one sequence, prompt and output."""
    block_size: int
    """Slots of a KV block."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        problems = [f"{name} must be at least 1, not {n}" for name, n in values.items() if n < 1]
        if problems:
            raise ConfigurationError(*problems)


class Scheduler:
    """Holds every sequence of one engine, from ``add`` to its end."""

    def __init__(self, config: SchedulerConfig, kv_cache_manager: KVCacheManager) -> None:
        assert config.block_size == kv_cache_manager.block_size
        self._config = config
        self._kv_cache_manager = kv_cache_manager
        self._sequences: dict[int, Sequence] = {}
        # Sorted by urgency, so that tokens are granted from the front and taken from the back: a
        # victim never has a share of the step yet.
        self._running: list[Sequence] = []
        # Why not a deque: a cancelled sequence has to leave the middle at once. This takes from
        # and puts to either end, and deletes by id, in constant time.
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._suspects: OrderedDict[int, Sequence] = OrderedDict()
        self._forcing: set[int] = set()
        """Request ids of sequences that may have to say something."""
        # Tokens of a step: what the configuration allows, less where a step did not fit.
        self._budget = config.max_num_batched_tokens
        self._steps_since_shed = 0
        self.num_sheds_in_a_row = 0
        """Steps that did not fit since the last one that did."""
        self._ended: list[TokenRow] = []
        self._num_arrivals = 0
        self._step = 0
        self._plan: StepPlan | None = None
        self._ahead: StepPlan | None = None
        """The step behind the plan's, if that is planned as well."""
        self._started: list[Sequence] = []
        """Sequences that the plan starts; what they share of it is not computed before it ends."""

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do or to report."""
        return bool(self._sequences or self._ended)

    @property
    def num_running(self) -> int:
        """Sequences that own blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that own none, preempted ones included."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; if there is nothing to do for it, it ends with the next step.

        A newer attempt at a request replaces the one that is here; an older one, or the same once
        more, is dropped.
        """
        current = self._sequences.get(sequence.request_id)
        if current is not None:
            if sequence.attempt <= current.attempt:
                return
            self._remove(current)
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        # The last token of a sequence is drawn but never computed, and needs no slot.
        tokens_max = min(self._config.max_model_len, self._kv_cache_manager.tokens_max + 1)
        sequence.num_tokens_max = min(sequence.num_tokens_max, tokens_max)
        finish = self._finish_before_start(sequence)
        if finish is not None:
            sequence.status = SequenceStatus.FINISHED
            self._ended.append(sequence.row(finish))
            return
        self._sequences[sequence.request_id] = sequence
        self._waiting[sequence.request_id] = sequence
        if sequence.params.echoed or sequence.params.thinking is not None:
            self._forcing.add(sequence.request_id)

    def add_suspect(self, sequence: Sequence) -> None:
        """Take in a sequence that may have killed an engine.

        Until it has made a token, its steps are run with nobody else in them and before any other:
        if it kills this engine too, it is convicted, and nobody has to share the guilt.
        """
        self.add(sequence)
        if sequence.status is not SequenceStatus.FINISHED:
            self._suspects[sequence.request_id] = sequence

    def cancel(self, request_id: int, finish: FinishReason = FinishReason.CANCELLED) -> bool:
        """End a sequence, and free its blocks at once; ``False`` if it is not here (any more).

        If a step is under way, what it computes for the sequence is dropped.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._remove(sequence)
        self._ended.append(sequence.row(finish))
        return True

    @property
    def running(self) -> Rows[Sequence]:
        """Sequences that own blocks, most urgent first."""
        return self._running

    def schedule(self, drafts: Mapping[int, Rows[int]] = NO_DRAFTS) -> StepPlan | None:
        """Plan the next step, or ``None`` if there is no work.

        ``drafts`` are guesses behind sequences that have caught up, by request id. They take part
        as far as budget and blocks last.

        The blocks for it are allocated. A plan that was not carried out may be replaced by
        calling this again: marks move in ``update`` alone.
        """
        assert self._ahead is None, "two steps are under way"
        if self._plan is not None:
            self._withdraw()
        if not self.has_work:
            return None
        scheduled: list[ScheduledSequence] = []
        forced = NOBODY_FORCED
        if self._suspects:
            preempted = self._run_suspect(scheduled)
        else:
            preempted = self._continue_running(scheduled)
            if not preempted:  # blocks are short, and who had to give way would come first
                self._start_waiting(scheduled)
            forced = self._add_drafts(scheduled, drafts)
        assert scheduled or not self._sequences, "a step must bring someone forward"
        self._step += 1
        copies = self._kv_cache_manager.take_copies()
        self._plan = StepPlan(self._step, tuple(scheduled), preempted, copies, forced)
        return self._plan

    def schedule_ahead(self) -> StepPlan | None:
        """Plan the step behind the latest, before it is known what that one draws.

        Only where it would be planned in any case, and draws need nothing but the model: all
        running sequences draw in the step under way, each takes part in this one with a single
        token, and nobody waits who could start in it. Else ``None``: ``update``, then ``schedule``.
        A sequence that has ended by then, by a stop token or because it was cancelled, takes part
        in vain, and who waits for its place has it a step later.
        """
        if self._plan is None or self._ahead is not None or self._suspects:
            return None
        shares = [
            share
            for share in self._plan.scheduled
            if share.sequence.status is SequenceStatus.RUNNING
        ]
        if len(shares) < len(self._running) or not all(share.leads_on for share in shares):
            return None
        # Who is full with the token that is under way has no part in the next step.
        shares = [s for s in shares if s.sequence.num_tokens + 1 < s.sequence.num_tokens_max]
        if not shares or (self._waiting and len(shares) < self._config.max_num_seqs):
            return None
        manager = self._kv_cache_manager
        if not all(manager.allocate(each.sequence, each.num_tokens + 1) for each in shares):
            return None
        for share in shares:
            # What this step itself fills is not offered: nobody knows yet with which token.
            manager.plan(share.sequence, share.num_tokens)
        self._step += 1
        following = [
            share if share.num_tokens == 1 else share._replace(num_tokens=1) for share in shares
        ]
        self._ahead = StepPlan(self._step, tuple(following), is_ahead=True)
        return self._ahead

    def withdraw_ahead(self) -> None:
        """What ``schedule_ahead`` planned is not carried out."""
        self._ahead = None

    def update(self, plan: StepPlan, draws: Draws) -> list[TokenRow]:
        """Take in what the step brought; a row for each sequence that got a token or ended.

        ``draws`` has tokens, or a vector, for each scheduled sequence that ``samples``.
        """
        assert plan is self._plan, "a step is taken in once, and in its turn"
        self._plan, self._ahead = self._ahead, None
        self._started.clear()
        self._widen_budget()
        rows, self._ended = self._ended, []
        for sequence, num_tokens, draft in plan.scheduled:
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # cancelled or replaced while the step ran
            drawn = draws.get(sequence.request_id)
            sequence.num_computed_tokens += num_tokens - len(draft)
            if drawn is NoDraw.WAITING:
                sequence.num_computed_tokens -= 1  # the next step draws behind the same token
            elif sequence.num_computed_tokens == sequence.num_tokens:
                row = self._take(sequence, drawn)
                is_guessed = draft and sequence.request_id not in plan.forced
                rows.append(row._replace(num_draft_tokens=len(draft)) if is_guessed else row)
        self._kv_cache_manager.settle()
        return rows

    def shed(self, plan: StepPlan) -> None:
        """A step did not fit the device: plan smaller ones, and make room.

        The budget is halved, down to a single token, and the less urgent half of the running
        sequences gives its blocks back. A sequence that again and again does not fit alone ends
        with an error.
        """
        assert plan is self._plan, "only the latest step can be shed"
        assert self._ahead is None, "and only with nothing behind it"
        self._withdraw()
        self.num_sheds_in_a_row += 1
        is_small = len(plan.scheduled) == 1 and plan.num_tokens <= self._config.block_size
        if is_small and self.num_sheds_in_a_row >= SHEDS_MAX:
            self.num_sheds_in_a_row = 0
            sequence = plan.scheduled[0].sequence
            self._remove(sequence)
            self._ended.append(sequence.row(FinishReason.ERROR))
            return
        self._budget = max(plan.num_tokens // 2, 1)
        self._steps_since_shed = 0
        for _ in range(len(self._running) // 2):
            self._preempt_last()

    def check_integrity(self) -> None:
        """Assert that every sequence is in one place, and every block is accounted for."""
        assert len(self._running) <= self._config.max_num_seqs
        assert self._running == sorted(self._running, key=urgency)
        assert self._sequences == self._waiting | {s.request_id: s for s in self._running}
        assert len(self._sequences) == len(self._running) + len(self._waiting)
        for sequence in self._running:
            assert sequence.status is SequenceStatus.RUNNING, sequence
            assert sequence.num_computed_tokens < sequence.num_tokens, sequence
        for sequence in self._waiting.values():
            assert sequence.status is SequenceStatus.WAITING, sequence
            assert sequence.num_computed_tokens == 0, sequence
            assert not sequence.block_table, sequence
        self._kv_cache_manager.check_integrity(self._running)

    def _continue_running(self, scheduled: list[ScheduledSequence]) -> tuple[int, ...]:
        """Grant tokens to running sequences; the request ids of those that had to give way."""
        budget = self._budget
        preempted: list[int] = []
        for sequence in self._running:  # victims leave from its end, behind this one
            if budget == 0:
                break
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            while not self._kv_cache_manager.allocate(sequence, num_tokens):
                victim = self._preempt_last()
                preempted.append(victim.request_id)
                if victim is sequence:
                    return tuple(preempted)
            budget -= self._grant(sequence, budget, scheduled)
        return tuple(preempted)

    def _run_suspect(self, scheduled: list[ScheduledSequence]) -> tuple[int, ...]:
        """Give the step to the first suspect alone, whoever has to give way for it."""
        sequence = next(iter(self._suspects.values()))
        preempted: list[int] = []
        if sequence.status is SequenceStatus.WAITING:
            if len(self._running) >= self._config.max_num_seqs:
                preempted.append(self._preempt_last().request_id)
            while not self._kv_cache_manager.start(sequence):
                preempted.append(self._preempt_last().request_id)
            self._start(sequence)
        self._grant(sequence, self._budget, scheduled)
        return tuple(preempted)

    def _start_waiting(self, scheduled: list[ScheduledSequence]) -> None:
        """Start waiting sequences while budget, places and blocks last."""
        budget = self._budget - sum(share.num_tokens for share in scheduled)
        while self._waiting and budget > 0 and len(self._running) < self._config.max_num_seqs:
            sequence = next(iter(self._waiting.values()))
            if not self._kv_cache_manager.start(sequence):
                break
            self._start(sequence)
            budget -= self._grant(sequence, budget, scheduled)

    def _start(self, sequence: Sequence) -> None:
        """A waiting sequence has its blocks: it runs."""
        del self._waiting[sequence.request_id]
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=urgency)
        self._started.append(sequence)

    def _grant(
        self, sequence: Sequence, tokens_max: int, scheduled: list[ScheduledSequence]
    ) -> int:
        """Schedule the next tokens of a running sequence, and say how many."""
        num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, tokens_max)
        self._kv_cache_manager.plan(sequence, num_tokens)
        scheduled.append(ScheduledSequence(sequence, num_tokens))
        return num_tokens

    def _add_drafts(
        self, scheduled: list[ScheduledSequence], drafts: Mapping[int, Rows[int]]
    ) -> frozenset[int]:
        """Lengthen rows by guesses: worth free blocks and what the budget has left, no more.

        What a sequence has to say next is as good as a guess, and always comes true: gives the
        request ids for whom it was taken.
        """
        if not drafts and not self._forcing:
            return NOBODY_FORCED
        forced: set[int] = set()
        left = self._budget - sum(share.num_tokens for share in scheduled)
        for place, share in enumerate(scheduled):
            if not share.samples:
                continue
            sequence = share.sequence
            draft = tuple(drafts.get(sequence.request_id, ())[:left])
            if sequence.request_id in self._forcing:
                room = min(left, sequence.num_tokens_max - sequence.num_tokens - 1)
                ahead = sequence.forced_ahead(max(0, min(room, FORCED_AHEAD_MAX)))
                if ahead:
                    draft = ahead
                    forced.add(sequence.request_id)
            if not draft:
                continue
            num_tokens = share.num_tokens + len(draft)
            if self._kv_cache_manager.allocate(share.sequence, num_tokens):
                scheduled[place] = ScheduledSequence(share.sequence, num_tokens, draft)
                left -= len(draft)
        return frozenset(forced)

    def _preempt_last(self) -> Sequence:
        """Put the least urgent running sequence back at the front of those that wait."""
        victim = preempt_last(self._running, self._kv_cache_manager)
        self._wait_again(victim)
        return victim

    def _wait_again(self, sequence: Sequence) -> None:
        self._waiting[sequence.request_id] = sequence
        self._waiting.move_to_end(sequence.request_id, last=False)

    def _withdraw(self) -> None:
        """The plan is not carried out: who was started for it waits again."""
        self._plan = None
        self._kv_cache_manager.withdraw()
        started, self._started = self._started, []
        for sequence in reversed(started):
            if sequence.status is SequenceStatus.RUNNING:
                self._running.remove(sequence)
                # What the cache had for it may be part of the step that was not.
                sequence.num_computed_tokens = 0
                self._kv_cache_manager.free(sequence)
                sequence.status = SequenceStatus.WAITING
                self._wait_again(sequence)

    def _widen_budget(self) -> None:
        """After enough steps that fitted, allow larger ones again."""
        self.num_sheds_in_a_row = 0
        self._steps_since_shed += 1
        if self._steps_since_shed >= STEPS_BEFORE_WIDENING:
            self._steps_since_shed = 0
            self._budget = min(2 * self._budget, self._config.max_num_batched_tokens)

    def _take(self, sequence: Sequence, drawn: Draw | None) -> TokenRow:
        """Take in draws; a sequence that got none has numbers that are not finite, and ends."""
        if isinstance(drawn, tuple):
            return self._append(sequence, drawn)
        if isinstance(drawn, Pooled):
            self._remove(sequence)
            row = sequence.row(FinishReason.STOP)
            num_cached_tokens = sequence.num_cached_tokens or 0
            return row._replace(num_cached_tokens=num_cached_tokens, vector=drawn.vector)
        if drawn is None:
            self._kv_cache_manager.discard(sequence)
        self._remove(sequence)
        finish = FinishReason.ERROR if drawn is None else FinishReason.REFUSED
        return sequence.row(finish)

    def _append(self, sequence: Sequence, drawn: tuple[SampledToken, ...]) -> TokenRow:
        """Give a sequence its next tokens, and let it go if the last of them is among them."""
        self._suspects.pop(sequence.request_id, None)
        is_first = sequence.num_output_tokens == 0
        finish = sequence.append(drawn[0].token_id)
        num_taken = 1
        while finish is None and num_taken < len(drawn):
            finish = sequence.append(drawn[num_taken].token_id)
            num_taken += 1
        # All but the last of them were drafted, so they are computed.
        sequence.num_computed_tokens += num_taken - 1
        if finish is not None:
            self._remove(sequence)
        taken = drawn[:num_taken]
        tokens = tuple([one.token_id for one in taken])
        logprobs = tuple([pack_logprobs(one.logprobs) for one in taken if one.logprobs is not None])
        row = sequence.row(finish, tokens, logprobs)
        if is_first and sequence.num_cached_tokens:
            return row._replace(num_cached_tokens=sequence.num_cached_tokens)
        return row

    def _remove(self, sequence: Sequence) -> None:
        """Let a sequence go, and take its blocks back."""
        del self._sequences[sequence.request_id]
        self._suspects.pop(sequence.request_id, None)
        self._forcing.discard(sequence.request_id)
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._kv_cache_manager.free(sequence)
        else:
            del self._waiting[sequence.request_id]
        sequence.status = SequenceStatus.FINISHED

    def _finish_before_start(self, sequence: Sequence) -> FinishReason | None:
        """How a sequence ends that has nothing left to do here, or that cannot begin."""
        prompt_max = min(self._config.max_model_len, self._kv_cache_manager.tokens_max)
        if sequence.num_output_tokens == 0 and not 0 < sequence.num_prompt_tokens <= prompt_max:
            return FinishReason.ERROR
        return sequence.finish_reason() if sequence.pooling is None else None
