"""The image: what a recovery would give if the process died now. Pure.

The journal's writer keeps it up to date beside what it writes, and a recovery builds it from what
it reads, so there is one notion of what the records mean. It answers for streams that are joined
again, and it is what a checkpoint is made of.

Requests are held packed: an admission as the bytes that lie in the journal, tokens as 32-bit
numbers. Ended requests are kept for a while, within a limit of bytes; the oldest go first.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Final

from understudy.protocol.request import FinishReason
from understudy.runtime.storage.kept_logprobs import KeptLogprobs
from understudy.runtime.storage.records import Admit, CheckpointPayload, Usage, unpack_admit

SERIAL_MASK: Final = (1 << 32) - 1
_CHANGED_STEPS_MAX: Final = 16
RUN_STEPS_MAX: Final = 32
"""A batch's tokens are dealt out to its requests after so many steps at the latest."""
USAGE_DAYS_KEPT: Final = 92
_OVERHEAD_BYTES: Final = 512
"""What a request costs beside its tokens."""


@dataclass(frozen=True, slots=True)
class Retention:
    """For how long ended requests are kept, so that their streams can be joined again."""

    seconds: float = 600.0
    bytes_max: int = 32 * 1024 * 1024


class Held:
    """One request in the image."""

    __slots__ = (
        "admit",
        "attempt",
        "base",
        "batch",
        "blank",
        "code",
        "ended_at",
        "engine",
        "epoch",
        "finish",
        "is_kept",
        "logprobs",
        "message",
        "num_cached_tokens",
        "output",
        "prefix_hash",
        "request_id",
        "serial",
        "vector",
    )

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.request_id = 0
        self.admit = b""
        """The packed admission; empty for a serial that is heard of before, or without, one."""
        self.attempt = 0
        self.engine: str | None = None
        self.epoch = 0
        self.output: list[int] | array[int] = array("I")
        """A list while it grows, and 32 bits for each token when it does not, to be small."""
        self.logprobs = bytearray()
        self.num_cached_tokens = 0
        self.vector = b""
        self.prefix_hash = 0
        """Of the output; up to date after ``update``, but only in a writer."""
        self.finish = 0
        self.ended_at = 0.0
        self.code = ""
        self.message = ""
        self.base = 0
        """The segment where what is known of the request begins."""
        self.batch: Batch | None = None
        self.blank = 0
        """How many steps of the batch's present run were before the request joined."""
        self.is_kept = False
        """Whether tokens are collected; a recovery spares itself those of forgotten requests."""

    @property
    def num_bytes(self) -> int:
        """About how much memory, and room in a checkpoint, the request takes."""
        output_bytes = 4 * len(self.output) + len(self.logprobs) + len(self.vector)
        return len(self.admit) + output_bytes + _OVERHEAD_BYTES

    def update(self) -> None:
        """Bring ``output`` and ``prefix_hash`` up to date."""
        if self.batch is not None:
            self.batch.flush()
            self.prefix_hash = self.batch.prefix_hash_of(self)

    def checkpoint(self) -> CheckpointPayload:
        """Everything that is known of the request, for a checkpoint."""
        self.update()
        return CheckpointPayload(
            self.serial,
            self.request_id,
            self.attempt,
            self.epoch,
            self.finish,
            len(self.output),
            self.prefix_hash,
            self.ended_at,
            self.engine,
            self.code,
            self.message,
            self.admit,
            array("I", self.output).tobytes(),
            bytes(self.logprobs),
            self.num_cached_tokens,
            self.vector,
        )

    def restore(self, payload: CheckpointPayload, base: int) -> None:
        """Take over everything from a checkpoint."""
        self.update()
        self.request_id = payload.request_id
        self.attempt = payload.attempt
        self.epoch = payload.epoch
        self.engine = payload.engine
        self.code = payload.code
        self.message = payload.message
        self.admit = payload.admit
        self.output = array("I", payload.output)
        self.logprobs = bytearray(payload.logprobs)
        self.num_cached_tokens = payload.num_cached_tokens
        self.vector = payload.vector
        self.prefix_hash = payload.prefix_hash
        self.finish = payload.finish
        self.ended_at = payload.ended_at
        self.base = base


class Batch:
    """Requests whose tokens come together, step after step.

    The tokens of a step are kept as they came, and a run of steps is dealt out to the requests at
    once, by turning it round: that costs a fraction of appending each token by itself. A member
    that leaves takes its column along; one that joins gets a column whose upper part is blank.
    """

    __slots__ = (
        "ids",
        "is_wanted",
        "members",
        "prefix_hashes",
        "step_bytes",
        "steps",
        "unanchored",
    )

    def __init__(self, ids: tuple[int, ...], members: list[Held]) -> None:
        self.ids = ids
        """The members' request ids, where a writer asks for them."""
        self.members = members
        self.step_bytes = 4 * len(members)
        """How many bytes the tokens of one step are, one for each member."""
        self.steps: list[list[int]] = []
        """One token for each member, step by step."""
        self.prefix_hashes: tuple[int, ...] = ()
        """Of the members' outputs after the latest step; empty in a recovery."""
        self.unanchored = 0
        """How many steps ago the journal last proved where the members stand."""
        self.is_wanted = any(held.is_kept for held in members)

    def flush(self) -> None:
        """Deal out what was collected."""
        if not self.steps:
            return
        for held, column in zip(self.members, zip(*self.steps, strict=True), strict=True):
            if held.is_kept:
                held.output.extend(column[held.blank :] if held.blank else column)
            held.blank = 0
        self.steps = []

    def join(self, ids: tuple[int, ...], joined: list[Held]) -> None:
        """Further requests come in behind the others; ``ids`` are those of all then."""
        self._flush_long_run()
        blank = [0] * len(joined)
        for step in self.steps:
            step += blank
        for held in joined:
            if held.batch is not None:
                held.batch.leave(held)
            held.batch = self
            held.blank = len(self.steps)
            self.is_wanted = self.is_wanted or held.is_kept
        self.members += joined
        self.step_bytes = 4 * len(self.members)
        self.ids = ids

    def leave(self, held: Held) -> None:
        """One member goes; the others stay together."""
        self._flush_long_run()
        index = self.members.index(held)
        column = [step.pop(index) for step in self.steps]
        if held.is_kept:
            held.output.extend(column[held.blank :])
        held.blank = 0
        held.batch = None
        del self.members[index]
        self.step_bytes = 4 * len(self.members)
        self.ids = self.ids[:index] + self.ids[index + 1 :]
        if self.prefix_hashes:
            held.prefix_hash = self.prefix_hashes[index]
            self.prefix_hashes = self.prefix_hashes[:index] + self.prefix_hashes[index + 1 :]

    def _flush_long_run(self) -> None:
        """Changing a column of each collected step costs more than dealing a long run out."""
        if len(self.steps) > _CHANGED_STEPS_MAX:
            self.flush()

    def dissolve(self) -> None:
        """All members part."""
        self.flush()
        for index, held in enumerate(self.members):
            held.batch = None
            if self.prefix_hashes:
                held.prefix_hash = self.prefix_hashes[index]

    def prefix_hash_of(self, held: Held) -> int:
        """The hash of a member's output."""
        if not self.prefix_hashes:
            return held.prefix_hash
        return self.prefix_hashes[self.members.index(held)]


@dataclass(frozen=True, slots=True)
class HeldRequest:
    """A request as the journal knows it, living or ended."""

    admit: Admit
    attempt: int
    engine: str | None
    """The identity of the engine that it was last given to."""
    epoch: int
    output: tuple[int, ...]
    prefix_hash: int
    logprobs: KeptLogprobs
    """One for each token of the output, or empty."""
    finish: FinishReason | None
    """``None`` while the request lives."""
    code: str = ""
    """The error that its client was told, if it was."""
    message: str = ""
    ended_at: float = 0.0
    num_cached_tokens: int = 0
    """Of the prompt, in the cache of the engine that made the first token."""
    vector: bytes = b""
    """What the prompt was pooled to."""


class Image:
    """Every living request, and those that ended lately."""

    def __init__(self, retention: Retention) -> None:
        self.live: dict[int, Held] = {}
        """By request id, oldest first."""
        self.ended: dict[int, Held] = {}
        """By request id, in the order of their ends."""
        self.by_serial: dict[int, Held] = {}
        """The living, and serials that a recovery knows nothing else of."""
        self.epoch = 0
        self.clock = 0.0
        self.next_serial = 1
        self.usage: dict[str, dict[int, Usage]] = {}
        """Of each tenant, by day."""
        self._retention = retention
        self._ended_bytes = 0
        self._expiry_at = float("inf")
        """No ended request is too old before."""

    def get(self, request_id: int) -> Held | None:
        """A request that is held, living or ended."""
        return self.live.get(request_id) or self.ended.get(request_id)

    def admit(self, request_id: int, packed: bytes, base: int) -> Held:
        """Enter a request, under a new serial."""
        serial = self.next_serial
        while serial in self.by_serial:
            serial = _after(serial)
        self.next_serial = _after(serial)
        held = Held(serial)
        held.request_id = request_id
        held.admit = packed
        held.output = []
        held.base = base
        held.is_kept = True
        self.enter(held)
        return held

    def enter(self, held: Held) -> None:
        """Enter a living request that has its serial."""
        assert held.request_id not in self.live, "a request is admitted once"
        self._drop_ended(held.request_id)
        self.live[held.request_id] = self.by_serial[held.serial] = held

    def form_batch(self, ids: tuple[int, ...], members: list[Held]) -> Batch:
        """Let requests come together; batches that they were in before are dissolved.

        So a request's latest tokens are in one batch at most, and their order is plain.
        """
        for held in members:
            if held.batch is not None:
                held.batch.dissolve()
        batch = Batch(ids, members)
        for held in members:
            held.batch = batch
        return batch

    def part_all(self) -> None:
        """Dissolve every batch: steps of the next segment name theirs anew."""
        for held in self.by_serial.values():
            if held.batch is not None:
                held.batch.dissolve()

    def end(self, held: Held, finish: int, now: float, code: str = "", message: str = "") -> None:
        """A living request ends."""
        if held.batch is not None:
            held.batch.leave(held)
        held.output = array("I", held.output)
        held.finish = finish
        held.ended_at = now
        held.code = code
        held.message = message
        del self.by_serial[held.serial]
        del self.live[held.request_id]
        self.keep_ended(held)

    def keep_ended(self, held: Held) -> None:
        """Enter a request that has ended."""
        self._drop_ended(held.request_id)
        self.ended[held.request_id] = held
        self._expiry_at = min(self._expiry_at, held.ended_at + self._retention.seconds)
        self._ended_bytes += held.num_bytes

    def forget(self, held: Held) -> None:
        """Drop a request."""
        if held.finish:
            self._drop_ended(held.request_id)
        else:
            if held.batch is not None:
                held.batch.leave(held)
            del self.live[held.request_id]
            del self.by_serial[held.serial]

    def expire(self, now: float) -> None:
        """Drop ended requests that are too old, or too many."""
        if now < self._expiry_at and self._ended_bytes <= self._retention.bytes_max:
            return
        self._expiry_at = float("inf")
        while self.ended:
            oldest = next(iter(self.ended.values()))
            expiry_at = oldest.ended_at + self._retention.seconds
            if now < expiry_at and self._ended_bytes <= self._retention.bytes_max:
                self._expiry_at = expiry_at
                return
            self._drop_ended(oldest.request_id)

    def unbase(self) -> None:
        """Nothing that is known is surely in any segment."""
        for held in [*self.live.values(), *self.ended.values()]:
            held.base = 0

    def sort(self) -> None:
        """Bring the living into the order of their admission, and the others of their ends."""
        by_age = sorted(
            self.live.values(), key=lambda held: (held.serial - self.next_serial) & SERIAL_MASK
        )
        self.live = {held.request_id: held for held in by_age}
        self.ended = dict(sorted(self.ended.items(), key=lambda item: item[1].ended_at))

    def note_usage(self, usage: Usage) -> None:
        """A tenant has used so much in a day; the oldest of too many days is forgotten."""
        days = self.usage.setdefault(usage.tenant, {})
        days[usage.usage.day] = usage
        if len(days) > USAGE_DAYS_KEPT:
            del days[min(days)]

    def set_clock(self, now: float) -> None:
        """Let time be ``now``. A clock that is behind is that of a machine that started anew."""
        if now < self.clock:
            for held in self.ended.values():
                held.ended_at += now - self.clock
            self._expiry_at = float("-inf")
        self.clock = now

    def num_bytes(self) -> int:
        """About how large a checkpoint of everything would be."""
        return self._ended_bytes + sum(held.num_bytes for held in self.live.values())

    def _drop_ended(self, request_id: int) -> None:
        held = self.ended.pop(request_id, None)
        if held is not None:
            self._ended_bytes -= held.num_bytes


def describe(held: Held) -> HeldRequest:
    """Unpack a request."""
    held.update()
    return HeldRequest(
        admit=unpack_admit(held.admit),
        attempt=held.attempt,
        engine=held.engine,
        epoch=held.epoch,
        output=tuple(held.output),
        prefix_hash=held.prefix_hash,
        logprobs=KeptLogprobs(bytes(held.logprobs)),
        finish=FinishReason(held.finish) if held.finish else None,
        code=held.code,
        message=held.message,
        ended_at=held.ended_at,
        num_cached_tokens=held.num_cached_tokens,
        vector=held.vector,
    )


def _after(serial: int) -> int:
    return (serial + 1) & SERIAL_MASK
