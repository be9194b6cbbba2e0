"""The ledger: what is known of every request, and which tokens count.

A token counts only if it comes from the engine that the request is with now, under that engine's
present epoch, for the present attempt, at the next position, and with the hash of everything
before it. All else is refused here, so a token can neither be lost, nor come twice, nor come from
an engine that was given up: whatever the network and the processes do, the output in the ledger is
one straight line.

A request that has ended is kept for a while, so that a client can join its stream again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain, islice
from typing import Final, NamedTuple

from understudy.protocol.packed_logprobs import are_packed
from understudy.protocol.request import (
    FinishReason,
    Request,
    TokenRow,
    extend_prefix_hash,
)
from understudy.protocol.timeline import (
    ASSIGNED,
    BEGUN,
    ENDED,
    EVENTS_MAX,
    QUEUED,
    RESUMED,
    RequestTimeline,
    TimelineEvent,
)

RETENTION_S: Final = 600.0
"""For how long after its end a stream can be joined again."""
RETAINED_TOKENS_MAX: Final = 32 * 1024 * 1024
"""Prompt and output tokens of ended requests, and what gateways keep with them, at four bytes a
token; the oldest are forgotten first."""


TIMELINES_LOOKED_AT_MAX: Final = 4096
"""Requests that are looked at to find a tenant's latest ones."""


_INFINITY: Final = float("inf")


class Verdict(Enum):
    """What became of a row."""

    ACCEPTED = "accepted"
    STALE = "stale"
    """From an earlier attempt or epoch, or of a request that has ended. Harmless."""
    BROKEN = "broken"
    """From the right engine and attempt, but it does not continue the output."""


@dataclass(slots=True)
class Entry:
    """One admitted request."""

    request: Request
    admitted_at: float
    subscribers: list[str] = field(default_factory=list)
    """The identities of the gateways that the output goes to."""
    attempt: int = 0
    """How often it was given to an engine."""
    engine: str | None = None
    """The identity of the engine that it is with; ``None`` while it waits."""
    epoch: int = 0
    numerics: str | None = None
    """The class of numerics that its output has; ``None`` before it was given to an engine."""
    progress_at: float = 0.0
    """When it was admitted, assigned for the first time, or last got a token.

    Further assignments are no progress: a request that ends every engine it is given to would
    never be given up.
    """
    output: list[int] = field(default_factory=list)
    logprobs: Sequence[bytes] = field(default_factory=list)
    """Of each token, packed; a list while the request lives."""
    prefix_hash: int = 0
    vector: bytes = b""
    """What the prompt was pooled to; see ``TokenRow``."""
    finish: int = 0
    """A ``FinishReason``, or 0 while the request goes on."""
    error_code: str = ""
    error_message: str = ""
    ended_at: float = 0.0
    num_cached_tokens: int = 0
    """Of the prompt, in the cache of the engine that made the first token."""
    assigned_at: float = 0.0
    """When it was given to an engine for the first time; 0: not by this supervisor."""
    first_token_at: float = 0.0

    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    """Of the drafted ones."""
    events: list[TimelineEvent] = field(default_factory=list)
    """What happened to it, as far as this supervisor saw it."""

    def note(self, what: str, now: float, engine: str = "") -> None:
        """Remember that something happened."""
        if len(self.events) < EVENTS_MAX or what == ENDED:
            self.events.append(TimelineEvent(now - self.admitted_at, what, engine))

    @property
    def timeline(self) -> RequestTimeline:
        """What became of it so far."""
        return RequestTimeline(
            self.request_id,
            self.request.group_id,
            len(self.request.prompt),
            len(self.output),
            self.num_cached_tokens,
            self.num_draft_tokens,
            self.num_accepted_tokens,
            self.finish,
            self.error_code,
            tuple(self.events),
        )

    @property
    def deadline_at(self) -> float:
        """When its answer has to be complete."""
        deadline_s = self.request.deadline_s
        return _INFINITY if deadline_s is None else self.admitted_at + deadline_s

    @property
    def due_at(self) -> float:
        """When it is of no use any more to go on waiting."""
        first_token_s = self.request.first_token_s
        if first_token_s is None or self.output:
            return self.deadline_at
        return min(self.deadline_at, self.admitted_at + first_token_s)

    @property
    def request_id(self) -> int:
        """The request's id."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.request.prompt) + len(self.output)

    @property
    def num_answer_tokens(self) -> int:
        """Of the output, what is not the client's prompt said again."""
        return max(0, len(self.output) - len(self.request.params.echoed))

    @property
    def num_kept(self) -> int:
        """What it takes to keep it, as a number of tokens of four bytes."""
        return self.num_tokens + (len(self.request.presentation) + len(self.vector)) // 4

    @property
    def is_void(self) -> bool:
        """Whether it was called off before anything came of it: nobody wants to join that."""
        return self.finish == FinishReason.CANCELLED and not self.output

    def end_row(self, finish: FinishReason) -> TokenRow:
        """A row that ends the output where it is."""
        position = len(self.output)
        return TokenRow(self.request_id, self.attempt, position, (), self.prefix_hash, finish)

    def rows_from(self, position: int, num_tokens_max: int) -> list[TokenRow]:
        """All output from a position on, in rows of limited length; the last has the end."""
        rows = []
        prefix_hash = 0
        length = len(self.output)
        if length - position > num_tokens_max:
            prefix_hash = extend_prefix_hash(0, self.output[:position])
        for start in range(position, length, num_tokens_max) or [position]:
            end = start + num_tokens_max
            tokens = tuple(self.output[start:end])
            is_last = end >= length
            prefix_hash = self.prefix_hash if is_last else extend_prefix_hash(prefix_hash, tokens)
            rows.append(
                TokenRow(
                    self.request_id,
                    self.attempt,
                    start,
                    tokens,
                    prefix_hash,
                    self.finish if is_last else 0,
                    tuple(self.logprobs[start:end]),
                    self.num_cached_tokens,
                    vector=self.vector,
                )
            )
        return rows


class Duplicated(NamedTuple):
    """An idempotency key that is known already."""

    group_id: int
    body_digest: bytes


class Ledger:
    """Every request that was admitted: the living, and for a while those that have ended."""

    def __init__(self) -> None:
        self._living: dict[int, Entry] = {}
        self._ended: OrderedDict[int, Entry] = OrderedDict()
        self._ended_tokens = 0
        self._groups: dict[int, list[int]] = {}
        self._keys: dict[bytes, Duplicated] = {}

    def __len__(self) -> int:
        return len(self._living)

    def get(self, request_id: int) -> Entry | None:
        """The entry of a living request."""
        return self._living.get(request_id)

    def find(self, request_id: int) -> Entry | None:
        """The entry of a request that lives, or has ended not long ago."""
        return self._living.get(request_id) or self._ended.get(request_id)

    def group(self, group_id: int, tenant: str | None = None) -> list[Entry]:
        """The entries of a group that are known, by index; only this tenant's, if one is named."""
        found = [self.find(request_id) for request_id in self._groups.get(group_id, ())]
        entries = [entry for entry in found if entry is not None]
        return [entry for entry in entries if tenant in {None, entry.request.tenant}]

    def timelines(self, tenant: str, group_id: int, requests_max: int) -> list[RequestTimeline]:
        """What became of a group's requests or, for group 0, of a tenant's latest ones."""
        if group_id:
            entries = self.group(group_id, tenant)
        else:
            known = chain(reversed(self._living.values()), reversed(self._ended.values()))
            looked_at = islice(known, TIMELINES_LOOKED_AT_MAX)
            entries = [entry for entry in looked_at if entry.request.tenant == tenant]
        return [entry.timeline for entry in entries[:requests_max]]

    def duplicated(self, key: bytes) -> Duplicated | None:
        """Which group came with this idempotency key first."""
        return self._keys.get(key) if key else None

    def entries(self) -> list[Entry]:
        """All living requests, oldest first."""
        return list(self._living.values())

    def admit(self, request: Request, now: float) -> Entry:
        """Enter a request. From here on it will end, exactly once."""
        entry = Entry(request, now, progress_at=now)
        entry.note(QUEUED, now)
        self.restore(entry)
        return entry

    def restore(self, entry: Entry) -> None:
        """Enter a request as it was known before."""
        request = entry.request
        assert self.find(request.request_id) is None, "a request is entered once"
        if entry.finish:
            self._retain(entry)
        else:
            self._living[request.request_id] = entry
        self._groups.setdefault(request.group_id, []).append(request.request_id)
        # The first of a group stands for it: if it was refused, so is the call.
        is_first = request.request_id == request.group_id
        if request.idempotency_key and is_first and not entry.is_void:
            duplicated = Duplicated(request.group_id, request.body_digest)
            self._keys.setdefault(request.idempotency_key, duplicated)

    def assign(self, request_id: int, engine: str, epoch: int, now: float) -> Entry:
        """Give a waiting request to an engine, as a new attempt."""
        entry = self._living[request_id]
        assert entry.engine is None, "a request is with one engine at a time"
        entry.attempt += 1
        entry.engine = engine
        entry.epoch = epoch
        entry.note(ASSIGNED if entry.attempt == 1 else RESUMED, now, engine)
        if entry.attempt == 1:
            entry.progress_at = entry.assigned_at = now
        return entry

    def release(self, request_id: int) -> Entry:
        """Take a request back from its engine; what it has put out stays."""
        entry = self._living[request_id]
        entry.engine = None
        return entry

    def accept(self, row: TokenRow, engine: str, epoch: int, now: float) -> Verdict:
        """Take in what an engine says it made in a step."""
        entry = self._living.get(row.request_id)
        if entry is None or entry.engine != engine or entry.epoch != epoch:
            return Verdict.STALE
        if entry.attempt != row.attempt:
            return Verdict.STALE
        if row.position != len(entry.output):
            return Verdict.BROKEN
        return self._append(entry, row, now)

    def adopt(self, row: TokenRow, engine: str, epoch: int, now: float) -> TokenRow | None:
        """Take in all that an engine added to a request, whether it is known already or not.

        Accepted if the engine still has the present attempt: the request is with it (again), and
        what is new of the output is returned, as a row. ``None`` if the engine should drop it.
        """
        entry = self._living.get(row.request_id)
        if entry is None or entry.attempt != row.attempt or entry.engine not in {None, engine}:
            return None
        position = len(entry.output)
        known = position - row.position
        if known < 0 or list(row.tokens[:known]) != entry.output[row.position :]:
            return None
        rest = row._replace(
            position=position,
            tokens=row.tokens[known:],
            logprobs=row.logprobs[known:],
            num_cached_tokens=0 if position else row.num_cached_tokens,
        )
        if self._append(entry, rest, now) is not Verdict.ACCEPTED:
            return None
        entry.engine = engine
        entry.epoch = epoch
        return rest

    def end(
        self, entry: Entry, finish: FinishReason, now: float, *, code: str = "", message: str = ""
    ) -> None:
        """End a living request."""
        assert not entry.finish, "a request ends once"
        entry.finish = finish
        entry.error_code = code
        entry.error_message = message
        entry.ended_at = now
        entry.note(ENDED, now, entry.engine or "")
        entry.engine = None
        del self._living[entry.request_id]
        self._retain(entry)
        if entry.is_void:
            self._release_key(entry.request)

    def forget(self, entry: Entry) -> None:
        """Forget an ended request, if it is still known."""
        if entry.request_id in self._ended:
            self._forget(entry)

    def forget_old(self, now: float) -> None:
        """Forget ended requests that are past their time, or too many."""
        while self._ended:
            oldest = next(iter(self._ended.values()))
            is_old = now >= oldest.ended_at + RETENTION_S
            if not is_old and self._ended_tokens <= RETAINED_TOKENS_MAX:
                return
            self._forget(oldest)

    def check_integrity(self) -> None:
        """Every request is in one place, and in its group."""
        assert not self._living.keys() & self._ended.keys()
        assert self._ended_tokens == sum(entry.num_kept for entry in self._ended.values())
        grouped = sorted(member for group in self._groups.values() for member in group)
        assert grouped == sorted((*self._living, *self._ended))
        for entry in self._living.values():
            assert not entry.finish
            assert entry.prefix_hash == extend_prefix_hash(0, entry.output)

    def _append(self, entry: Entry, row: TokenRow, now: float) -> Verdict:
        num_told = 0 if entry.request.params.logprobs is None else len(row.tokens)
        if len(row.logprobs) != num_told or not are_packed(row.logprobs):
            return Verdict.BROKEN
        prefix_hash = extend_prefix_hash(entry.prefix_hash, row.tokens)
        if prefix_hash != row.prefix_hash:
            return Verdict.BROKEN
        if not entry.output:
            entry.first_token_at = now
            if row.tokens or row.vector:
                entry.note(BEGUN, now, entry.engine or "")
        entry.output.extend(row.tokens)
        if row.num_draft_tokens:
            entry.num_draft_tokens += row.num_draft_tokens
            entry.num_accepted_tokens += max(len(row.tokens) - 1, 0)
        if row.logprobs:
            assert isinstance(entry.logprobs, list), "an output grows while its request lives"
            entry.logprobs.extend(row.logprobs)
        entry.prefix_hash = prefix_hash
        entry.vector = row.vector
        entry.num_cached_tokens = entry.num_cached_tokens or row.num_cached_tokens
        entry.progress_at = now
        return Verdict.ACCEPTED

    def _retain(self, entry: Entry) -> None:
        self._ended[entry.request_id] = entry
        self._ended_tokens += entry.num_kept

    def _forget(self, entry: Entry) -> None:
        request = entry.request
        del self._ended[request.request_id]
        self._ended_tokens -= entry.num_kept
        group = self._groups[request.group_id]
        group.remove(request.request_id)
        if not group:
            del self._groups[request.group_id]
            self._release_key(request)

    def _release_key(self, request: Request) -> None:
        """Let the next call with a group's idempotency key be a new one."""
        duplicated = self.duplicated(request.idempotency_key)
        if duplicated is not None and duplicated.group_id == request.group_id:
            del self._keys[request.idempotency_key]
