"""What has to hold at every moment, looked at while it happens and judged without the product.

``golden`` says what a request's output is, from its content and seed alone: no scheduler, no
engine, no sequence has a hand in it. ``Watch`` reads over the supervisor's shoulder what it writes
down and what leaves it. ``CheckedRunner`` remembers what was put into each KV block.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from understudy.protocol.messages import Assign, Deliver, Failed, Message
from understudy.protocol.request import (
    FinishReason,
    Pooling,
    Request,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.control.ledger import Entry
from understudy.runtime.echo import splitmix64
from understudy.runtime.kit.actor import Effect, OpenSession, Send
from understudy.runtime.scheduling.decision import Flight, OverlappingRunner, StepPlan
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence
from understudy.runtime.storage.journal import Degraded, Journal
from understudy.runtime.storage.records import Admit, End, Record, Step, Vector

VOCAB_SIZE: Final = 500
HIDDEN_SIZE: Final = 8
_GOLDEN_RATIO: Final = 0x9E3779B97F4A7C15


class Golden(NamedTuple):
    """A request's whole output, and why it ends."""

    tokens: list[int]
    finish: FinishReason
    vector: bytes = b""


def golden(request: Request, *, max_model_len: int) -> Golden:
    """What an echo has to answer, whatever happens to it on the way."""
    if request.pooling is not None:
        return Golden([], FinishReason.STOP, _bag_of_tokens(request, request.pooling))
    params = request.params
    length_max = min(params.max_tokens, max_model_len - len(request.prompt))
    tokens: list[int] = []
    for position in range(length_max):
        tokens.append(splitmix64(params.seed + position * _GOLDEN_RATIO) % VOCAB_SIZE)
        if position >= params.min_tokens and tokens[-1] in params.stop_token_ids:
            return Golden(tokens, FinishReason.STOP)
    return Golden(tokens, FinishReason.LENGTH)


def _bag_of_tokens(request: Request, pooling: Pooling) -> bytes:
    """The vector that an echo makes of a prompt."""
    counts = Counter(token % HIDDEN_SIZE for token in request.prompt)
    kept = [float(counts[place]) for place in range(pooling.dimensions or HIDDEN_SIZE)]
    length = math.hypot(*kept) or 1.0
    return struct.pack(f"<{len(kept)}f", *[count / length for count in kept])


@dataclass
class Written:
    """What the journal holds of one request."""

    tokens: list[int] = field(default_factory=list)
    is_over: bool = False
    attempt: int = 0
    """The latest that was handed to an engine."""
    vector: bytes = b""


class Watch:
    """Looks over the shoulders of all the supervisors of a history, one after the other."""

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        """What the clients have asked, by id."""
        self.is_disk_sound = True
        """Whether the disk has taken everything so far."""
        self._written: dict[int, Written] = {}
        self._epoch_max = 0

    def begin(self, entries: Iterable[Entry]) -> None:
        """The next supervisor has read these from what the one before it wrote down."""
        self._written = {
            entry.request_id: Written(
                list(entry.output), bool(entry.finish), entry.attempt, entry.vector
            )
            for entry in entries
        }
        for request_id, written in self._written.items():
            self._check_output(request_id, written)

    def write(self, records: Sequence[Record]) -> None:
        """Records have reached the journal."""
        for record in records:
            match record:
                case Admit(request):
                    assert request.request_id not in self._written, f"{request}: admitted again"
                    assert request == self.requests[request.request_id], f"{request}: changed"
                    self._written[request.request_id] = Written()
                case Step(rows):
                    for row in rows:
                        self._write_row(row)
                case Vector(request_id, vector):
                    written = self._written[request_id]
                    assert not written.is_over, f"{request_id}: a vector after the end"
                    written.vector = vector
                case End(request_id):
                    written = self._written[request_id]
                    assert not written.is_over, f"{request_id}: ended twice"
                    written.is_over = True
                case _:
                    pass

    def leave(self, effects: Iterable[Effect]) -> None:
        """This is about to leave the supervisor: whatever it tells is in the journal."""
        for effect in effects:
            match effect:
                case Send(_, message):
                    self._leave(message)
                case OpenSession(peer, epoch):
                    assert epoch > self._epoch_max, f"{peer}: epoch {epoch} is not new"
                    self._epoch_max = epoch
                case _:
                    pass

    def _leave(self, message: Message) -> None:
        match message:
            case Deliver(rows):
                for row in rows:
                    told = self._written[row.request_id]
                    end = row.position + len(row.tokens)
                    known = told.tokens[row.position : end]
                    assert known == list(row.tokens), f"{row.request_id}: told before written"
                    assert row.vector in {b"", told.vector}, f"{row.request_id}: told unwritten"
                    assert told.is_over or not row.finish, f"{row.request_id}: end not written"
            case Failed(request_id) if request_id in self._written:
                assert self._written[request_id].is_over, f"{request_id}: failure not written"
            case Assign(request, attempt, output) if request.request_id in self.requests:
                assert request == self.requests[request.request_id], f"{request}: changed"
                told = self._written[request.request_id]
                assert not told.is_over, f"{request.request_id}: runs after its end"
                assert attempt > told.attempt, f"{request.request_id}: attempt {attempt} again"
                assert list(output) == told.tokens, f"{request.request_id}: resumed elsewhere"
                told.attempt = attempt
            case _:
                pass

    def _write_row(self, row: TokenRow) -> None:
        written = self._written[row.request_id]
        assert not written.is_over, f"{row.request_id}: tokens after the end"
        assert row.position == len(written.tokens), f"{row.request_id}: a gap, or twice"
        written.tokens += row.tokens
        written.is_over = bool(row.finish)
        assert row.prefix_hash == extend_prefix_hash(0, written.tokens), f"{row.request_id}: hash"

    def _check_output(self, request_id: int, written: Written) -> None:
        request, tokens = self.requests[request_id], written.tokens
        whole = golden(request, max_model_len=len(request.prompt) + len(tokens))
        assert tokens == whole.tokens, f"{request_id}: the journal holds other tokens"
        known = {b"", whole.vector}
        assert written.vector in known, f"{request_id}: the journal holds another vector"


class WatchedJournal:
    """The journal, and who reads along."""

    def __init__(self, journal: Journal, watch: Watch) -> None:
        self._journal = journal
        self._watch = watch
        self._pending: list[Record] = []

    def append(self, added: Sequence[Record]) -> None:
        """See ``Journal``."""
        self._pending += added
        self._journal.append(added)

    def commit(self, now: float) -> object:
        """See ``Journal``; if the process dies in the write, nothing counts as written."""
        result = self._journal.commit(now)
        assert result.is_written or not self._watch.is_disk_sound, "a sound disk was not written"
        pending, self._pending = self._pending, []
        self._watch.write(pending)
        return result

    @property
    def wake_at(self) -> float | None:
        """See ``Journal``."""
        return self._journal.wake_at

    @property
    def degraded(self) -> Degraded | None:
        """See ``Journal``."""
        return self._journal.degraded


class CheckedRunner:
    """A runner that insists on finding in the KV blocks what its sequences believe is there."""

    overlaps = True

    def __init__(self, runner: OverlappingRunner, *, block_size: int) -> None:
        self._runner = runner
        self._block_size = block_size
        self._blocks: dict[int, tuple[int, list[int]]] = {}
        """For each block, its place in its sequence and the tokens whose keys and values it holds.
        """
        self._undecided: list[tuple[EngineSequence, int, list[int]]] = []
        """Sequences, and positions in them whose tokens were not known when they were written, at
        the ends of these."""

    def launch(self, plan: StepPlan) -> Flight:
        """See ``OverlappingRunner``."""
        for sequence, position, tokens in self._undecided:
            tokens.append(sequence.token_ids[position])
        self._undecided.clear()
        if plan.is_ahead:
            self._write_ahead(plan)
        else:
            self._write(plan)
        return self._runner.launch(plan)

    def _write_ahead(self, plan: StepPlan) -> None:
        size = self._block_size
        for sequence, _, _ in plan.scheduled:
            position = sequence.num_tokens
            for place in range(-(-position // size)):
                self._check(sequence, place, position)
            place = position // size
            tokens = sequence.token_ids[place * size : position]
            self._blocks[sequence.block_table[place]] = (place, tokens)
            self._undecided.append((sequence, position, tokens))

    def _write(self, plan: StepPlan) -> None:
        size = self._block_size
        self._blocks |= {target: self._blocks[source] for source, target in plan.copies}
        for sequence, _, _ in plan.scheduled:
            place, rest = divmod(sequence.num_computed_tokens, size)
            if rest:
                self._check(sequence, place, sequence.num_computed_tokens)
        for sequence, num_tokens, draft in plan.scheduled:
            computed = sequence.num_computed_tokens + num_tokens
            for place in range(sequence.num_computed_tokens // size, -(-computed // size)):
                tokens = [*sequence.token_ids, *draft][
                    place * size : min((place + 1) * size, computed)
                ]
                self._blocks[sequence.block_table[place]] = (place, tokens)
        # What the step itself writes can be read in it, by whichever sequence shares the block.
        for sequence, num_tokens, draft in plan.scheduled:
            computed = sequence.num_computed_tokens + num_tokens
            known = computed - len(draft)
            for place in range(-(-known // size)):
                self._check(sequence, place, known)

    def _check(self, sequence: EngineSequence, place: int, computed: int) -> None:
        size = self._block_size
        believed = sequence.token_ids[place * size : min((place + 1) * size, computed)]
        at, tokens = self._blocks[sequence.block_table[place]]
        assert (at, tokens[: len(believed)]) == (place, believed), f"{sequence}: lost KV"
