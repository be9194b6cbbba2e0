"""A story for the journal: what happens to requests, told in records, and remembered plainly.

The memory is the oracle: lists in a dict, and no thought of speed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from understudy.protocol.packed_logprobs import pack_logprobs
from understudy.protocol.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.storage.disk import Disk
from understudy.runtime.storage.image import HeldRequest, Retention
from understudy.runtime.storage.journal import Journal, JournalOptions, Opened
from understudy.runtime.storage.records import Admit, Assign, End, Epoch, Record, Step, beside
from understudy.runtime.storage.recovery import Recovery, recover
from understudy.runtime.storage.virtual_disk import VirtualDisk

LONG = Retention(seconds=1e9)
"""Nothing is forgotten while a test runs."""


@dataclass(frozen=True)
class Known:
    """What the oracle knows of a request."""

    admit: Admit
    attempt: int = 0
    engine: str | None = None
    epoch: int = 0
    output: tuple[int, ...] = ()
    prefix_hash: int = 0
    logprobs: tuple[bytes, ...] = ()
    finish: FinishReason | None = None
    code: str = ""
    message: str = ""
    vector: bytes = b""


@dataclass
class Story:
    """Tells records, and remembers what they mean."""

    seed: int = 0
    known: dict[int, Known] = field(default_factory=dict)
    epoch: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def live(self) -> list[int]:
        return [number for number, known in self.known.items() if known.finish is None]

    def admit(self, *, prompt_tokens: int = 4, wants_logprobs: bool = False) -> Admit:
        request_id = self.random.getrandbits(63)
        params = SamplingParams(
            seed=self.random.getrandbits(64),
            max_tokens=100,
            logit_bias=((3, -1.5),),
            logprobs=2 if wants_logprobs else None,
        )
        prompt = tuple(self.random.randrange(200_000) for _ in range(prompt_tokens))
        request = Request(request_id, request_id ^ 1, prompt, params)
        admit = Admit(request, "gateway-0.1", 0.0, tenant="tenant", key_digest=b"\x00key")
        self.known[request_id] = Known(admit)
        return admit

    def assign(self, request_id: int, engine: str = "engine-0.1") -> Assign:
        known = self.known[request_id]
        self.epoch += 1
        known = replace(known, attempt=known.attempt + 1, engine=engine, epoch=self.epoch)
        self.known[request_id] = known
        return Assign(request_id, known.attempt, engine, known.epoch)

    def row(
        self,
        request_id: int,
        *,
        tokens: Sequence[int] | None = None,
        finish: FinishReason | None = None,
    ) -> TokenRow:
        known = self.known[request_id]
        if tokens is None:
            tokens = (self.random.randrange(200_000),)
        added = tuple(tokens)
        logprobs: tuple[bytes, ...] = ()
        if known.admit.request.params.logprobs is not None:
            logprobs = tuple(
                pack_logprobs(TokenLogprobs(-0.1 * t, ((t, -0.5), (1, -2.1)))) for t in added
            )
        prefix_hash = extend_prefix_hash(known.prefix_hash, added)
        row = TokenRow(
            request_id,
            known.attempt,
            len(known.output),
            added,
            prefix_hash,
            finish or 0,
            logprobs,
        )
        self.known[request_id] = replace(
            known,
            output=known.output + added,
            prefix_hash=prefix_hash,
            logprobs=known.logprobs + logprobs,
            finish=finish,
        )
        return row

    def step(
        self, request_ids: Sequence[int], *, finishing: Sequence[int] = (), count: int = 1
    ) -> Step:
        rows = [
            self.row(
                request_id,
                tokens=[self.random.randrange(200_000) for _ in range(count)],
                finish=FinishReason.STOP if request_id in finishing else None,
            )
            for request_id in request_ids
        ]
        return Step(tuple(rows))

    def pool(self, request_id: int, *, dimensions: int = 8) -> list[Record]:
        """A request ends with a vector."""
        vector = self.random.randbytes(4 * dimensions)
        row = self.row(request_id, tokens=(), finish=FinishReason.STOP)._replace(vector=vector)
        self.known[request_id] = replace(self.known[request_id], vector=vector)
        return [*beside(row), Step((row,))]

    def end(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED) -> End:
        known = replace(self.known[request_id], finish=reason, code="why", message="because")
        self.known[request_id] = known
        return End(request_id, reason, "why", "because")

    def reserve(self, epoch: int) -> Epoch:
        self.epoch = max(self.epoch, epoch)
        return Epoch(epoch)

    def opening(self, count: int, *, wants_logprobs: bool = False) -> list[Record]:
        """Some requests, admitted and assigned."""
        records: list[Record] = []
        for _ in range(count):
            admit = self.admit(wants_logprobs=wants_logprobs)
            records += [admit, self.assign(admit.request.request_id)]
        return records


def as_known(held: HeldRequest) -> Known:
    return Known(
        admit=held.admit,
        attempt=held.attempt,
        engine=held.engine,
        epoch=held.epoch,
        output=held.output,
        prefix_hash=held.prefix_hash,
        logprobs=tuple(held.logprobs),
        finish=held.finish,
        code=held.code,
        message=held.message,
        vector=held.vector,
    )


def everything(opened: Opened) -> dict[int, Known]:
    """All that a journal gives back when it is opened."""
    journal, recovery = opened
    found = {as_known(held).admit.request.request_id: as_known(held) for held in recovery.live}
    for request_id in recovery.ended:
        held = journal.held(request_id)
        assert held is not None
        found[request_id] = as_known(held)
    return found


def reopen(disk: Disk, options: JournalOptions | None = None, now: float = 1000.0) -> Opened:
    return Journal.open(disk, options or JournalOptions(retention=LONG), now)


def read(disk: Disk, now: float = 1000.0) -> Recovery:
    """What a journal says, without taking it."""
    return recover(disk, LONG, now).recovery


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
