"""What the scheduler decides for one step, and who carries it out.

The words between the scheduler, which knows nothing of tensors, and a runner, which knows nothing
of queues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from understudy.protocol.request import TokenLogprobs
from understudy.runtime.kvcache.kv_cache_manager import BlockCopy
from understudy.runtime.scheduling.sequence import Sequence


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step: the next ``num_tokens`` tokens to compute.

    ::

        token_ids   p0 p1 p2 p3 p4 p5 p6 p7 o0 o1
                    ╰── computed ──╯╰─ now ─╯
                    0              5        8         num_computed_tokens = 5, num_tokens = 3

    With a draft, the last of them are guesses behind ``token_ids``. The blocks for all are in the
    sequence's table already. Valid until the scheduler's ``update`` for this step moves
    ``num_computed_tokens`` on.
    """

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether this step reaches the sequence's last token, so that the next one is drawn."""
        sequence = self.sequence
        reached = sequence.num_computed_tokens + self.num_tokens - len(self.draft)
        return reached == sequence.num_tokens

    @property
    def draws(self) -> bool:
        """Whether it samples, and a token is wanted and not a vector."""
        return self.samples and self.sequence.pooling is None

    @property
    def leads_on(self) -> bool:
        """Whether the sequence's next step can be planned, and drawn, with this one under way."""
        return not self.draft and self.draws and not self.sequence.looks_back


class StepPlan(NamedTuple):
    """One step: what to compute, in the order in which it was granted.

    ``scheduled`` holds a sequence once at most. It is empty in a step in which sequences only end
    (cancelled, or too big for the cache). ``preempted`` names the requests that gave their blocks
    back for this step. ``copies`` come first, all at once: a block may be the source of one and
    the target of another.
    """

    step: int
    scheduled: tuple[ScheduledSequence, ...]
    preempted: tuple[int, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    forced: frozenset[int] = frozenset()
    """Requests whose draft is no guess: they have to say it."""
    is_ahead: bool = False
    """Whether the step before is still under way. Then each share is the one token that that step
    draws, behind all that its sequence knows yet."""

    @property
    def num_tokens(self) -> int:
        """The length of the step's flat batch."""
        return sum(scheduled.num_tokens for scheduled in self.scheduled)


class SampledToken(NamedTuple):
    """The token drawn for one sequence; ``logprobs`` if its request asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Pooled:
    """The vector that a prompt was pooled to, as float32, little-endian."""

    vector: bytes


class NoDraw(Enum):
    """Why nothing was drawn for a sequence that samples."""

    WAITING = auto()
    """What its grammar allows is not known yet. Its last token is to be computed again."""
    REFUSED = auto()
    """Its grammar cannot be followed any further."""


Draw: TypeAlias = tuple[SampledToken, ...] | Pooled | NoDraw
"""A token, and one more for each drafted token that it equals; or what a prompt was pooled to."""

Draws: TypeAlias = Mapping[int, Draw]
"""What a step drew, by request id."""


class OutOfMemory(Exception):
    """A step did not fit the device. Nothing of it counts; a smaller one may fit."""


class EngineFault(Exception):
    """What the device computes cannot be trusted any more: the engine has to end."""


class Flight(Protocol):
    """A step that the device computes."""

    def collect(self) -> Draws:
        """Wait for its end; what it drew. In the order in which steps were launched.

        Raises:
            EngineFault: the numbers of all sequences are not finite.
        """
        ...


class Runner(Protocol):
    """Computes a step: the model, or its echo."""

    def execute(self, plan: StepPlan) -> Draws:
        """Compute the plan's tokens; the draws of each sequence that ``samples``.

        A plan with nothing scheduled gives an empty mapping. A sequence whose numbers are not
        finite gets no draw.

        Raises:
            OutOfMemory: the step did not fit; it may be planned anew.
            EngineFault: the numbers of all sequences are not finite.
        """
        ...


@runtime_checkable
class OverlappingRunner(Protocol):
    """A runner whose device computes while others decide what comes next."""

    @property
    def overlaps(self) -> bool:
        """Whether it gains anything to launch a step before the last one is over."""
        ...

    def launch(self, plan: StepPlan) -> Flight:
        """Have the plan's tokens computed. Two steps may be under way at once.

        Raises:
            OutOfMemory: the step did not fit; it may be planned anew.
        """
        ...
