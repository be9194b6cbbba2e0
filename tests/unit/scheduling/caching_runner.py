"""A runner beside the model's that notices if a sequence does not find its own keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field

from understudy.protocol.request import FinishReason, Request, TokenLogprobs
from understudy.runtime.scheduling.decision import Draws, SampledToken, StepPlan
from understudy.runtime.scheduling.sequence import Sequence

VOCABULARY = 16
NEVER_A_STOP = VOCABULARY
UNLIMITED = 1 << 30


def next_token(request: Request, position: int) -> int:
    """The token at a position of the output: a function of the request, and of nothing else."""
    token = (request.request_id * 7919 + position * 104729 + (position >> 1) * 31) % VOCABULARY
    params = request.params
    if position < params.min_tokens and token in params.stop_token_ids:
        return NEVER_A_STOP
    return token


@dataclass
class CachingRunner:
    """A runner whose results depend on nothing but the request, if its cache is in order."""

    block_size: int
    requests: dict[int, Request] = field(default_factory=dict)
    slots: dict[tuple[int, int], tuple[str, list[int]]] = field(default_factory=dict)

    def execute(self, plan: StepPlan) -> Draws:
        self.slots |= {
            (target, slot): self.slots[source, slot]
            for source, target in plan.copies
            for slot in range(self.block_size)
            if (source, slot) in self.slots
        }
        for sequence, num_tokens, draft in plan.scheduled:
            start = sequence.num_computed_tokens
            for position in range(start, start + num_tokens):
                self.slots[self.slot(sequence, position)] = self.entry(sequence, position, draft)
        return {
            scheduled.sequence.request_id: self.sample(scheduled.sequence, scheduled.draft)
            for scheduled in plan.scheduled
            if scheduled.samples
        }

    def execute_ahead(self, plan: StepPlan, drawn: Draws) -> Draws:
        """What comes behind draws that nobody else has seen."""
        draws: dict[int, tuple[SampledToken, ...]] = {}
        for sequence, _, _ in plan.scheduled:
            before = drawn[sequence.request_id]
            assert isinstance(before, tuple)
            undecided = (before[-1].token_id,)
            position = sequence.num_tokens
            slot = self.slot(sequence, position)
            self.slots[slot] = self.entry(sequence, position, undecided)
            draws[sequence.request_id] = self.sample(sequence, undecided)[1:]
        return draws

    def sample(self, sequence: Sequence, draft: tuple[int, ...]) -> tuple[SampledToken, ...]:
        for position in range(sequence.num_tokens + len(draft)):
            found = self.slots[self.slot(sequence, position)]
            assert found == self.entry(sequence, position, draft), f"{sequence} lost its cache"
        request = self.requests[sequence.request_id]
        position = sequence.num_output_tokens
        drawn = [next_token(request, position)]
        for guess in draft:
            if guess != drawn[-1]:
                break
            drawn.append(next_token(request, position + len(drawn)))
        if request.params.logprobs is None:
            return tuple(map(SampledToken, drawn))
        return tuple(SampledToken(token, TokenLogprobs(-float(token), ())) for token in drawn)

    def slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block_index, slot = divmod(position, self.block_size)
        return sequence.block_table[block_index], slot

    def entry(
        self, sequence: Sequence, position: int, draft: tuple[int, ...]
    ) -> tuple[str, list[int]]:
        """Keys and values say all that was read so far, and may be shared within a tenant."""
        tenant = self.requests[sequence.request_id].tenant
        return tenant, [*sequence.token_ids, *draft][: position + 1]


def oracle(
    request: Request, output: list[int], *, max_model_len: int, num_slots: int
) -> tuple[list[int], FinishReason]:
    """The whole output of a request that runs alone, token by token, and how it ends."""
    output = list(output)
    params = request.params
    if not output and (not request.prompt or len(request.prompt) > min(max_model_len, num_slots)):
        return output, FinishReason.ERROR
    while True:
        num_tokens = len(request.prompt) + len(output)
        if len(output) > params.min_tokens and output[-1] in params.stop_token_ids:
            return output, FinishReason.STOP
        if len(output) >= params.max_tokens or num_tokens >= max_model_len:
            return output, FinishReason.LENGTH
        if num_tokens > num_slots:
            return output, FinishReason.LENGTH
        output.append(next_token(request, len(output)))
