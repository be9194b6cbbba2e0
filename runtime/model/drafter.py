"""The draft model: a small model with the same tokenizer guesses what the large one will say.

It keeps a mirror of each sequence, with keys and values of its own, and draws with the request's
own parameters and noise: where both models think alike, even a draw at a high temperature comes
out the same. What it says is checked by the large model, so it may be as fast and loose as it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from understudy.protocol.request import Request
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.sampler import SamplingRow
from understudy.runtime.scheduling.decision import (
    EngineFault,
    OutOfMemory,
    ScheduledSequence,
    StepPlan,
)
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence

_CATCH_UP_TOKENS_MAX: Final = 512
"""Of one sequence in one step: a long prompt is read in pieces."""


class ModelDrafter:
    """Guesses with a model; see ``SlowDrafter``."""

    def __init__(self, runner: ModelRunner, *, num_blocks: int, block_size: int) -> None:
        self._runner = runner
        self._manager = KVCacheManager(
            num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=False
        )
        self._mirrors: dict[int, EngineSequence] = {}

    def num_unread(self, sequence: EngineSequence) -> int:
        """See ``SlowDrafter``."""
        mirror = self._mirrors.get(sequence.request_id)
        num_read = 0 if mirror is None else mirror.num_computed_tokens
        return max(sequence.num_tokens - 1 - num_read, 0)

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        """Guess, token by token, for all sequences at once."""
        kept = {sequence.request_id for sequence, _ in wanted}
        for request_id in self._mirrors.keys() - kept:
            self._forget(request_id)
        depths = {sequence.request_id: depth for sequence, depth in wanted}
        active = [self._reflect(sequence) for sequence, depth in wanted if depth > 0]
        try:
            for mirror in active:
                self._catch_up(mirror)
            drawn = active
            if self._runner.guesses:
                # Penalties and the like need what tokens came before: those are drawn one by one.
                drawn = [mirror for mirror in active if _row(mirror).is_adjusted]
                self._guess([each for each in active if not _row(each).is_adjusted], depths)
            for depth in range(max((depths[each.request_id] for each in drawn), default=0)):
                drawn = self._step([each for each in drawn if depths[each.request_id] > depth])
        except (OutOfMemory, EngineFault):
            return {}  # no guess is worth an engine
        known = {sequence.request_id: sequence.num_tokens for sequence, _ in wanted}
        return {
            mirror.request_id: mirror.token_ids[known[mirror.request_id] :]
            for mirror in active
            if mirror.num_tokens > known[mirror.request_id]
        }

    def _reflect(self, sequence: EngineSequence) -> EngineSequence:
        """The sequence's mirror, with its tokens and what is still right of the mirror's cache."""
        mirror = self._mirrors.get(sequence.request_id)
        if mirror is None:
            prompt = tuple(sequence.token_ids[: sequence.num_prompt_tokens])
            request = Request(sequence.request_id, 0, prompt, sequence.params)
            mirror = self._mirrors[sequence.request_id] = EngineSequence(request, attempt=0)
        # The last token is computed in any case: what follows it is what is wanted.
        num_right = min(mirror.num_computed_tokens, sequence.num_tokens - 1)
        while mirror.token_ids[:num_right] != sequence.token_ids[:num_right]:
            num_right -= 1
        mirror.token_ids = list(sequence.token_ids)
        mirror.num_computed_tokens = num_right
        return mirror

    def _catch_up(self, mirror: EngineSequence) -> None:
        """Compute what the mirror lacks, but for a few last tokens."""
        while mirror.num_tokens - mirror.num_computed_tokens > _CATCH_UP_TOKENS_MAX:
            if not self._read(mirror, _CATCH_UP_TOKENS_MAX):
                break

    def _guess(self, mirrors: list[EngineSequence], depths: dict[int, int]) -> None:
        """Guess for all of these at once, without a word of Python between the tokens."""
        depth = max((depths[mirror.request_id] for mirror in mirrors), default=0)
        able = []
        for mirror in mirrors:
            num_lacking = mirror.num_tokens - mirror.num_computed_tokens
            if self._manager.allocate(mirror, num_lacking + depth - 1):
                able.append(ScheduledSequence(mirror, num_lacking))
        if not able:
            return
        for (mirror, _, _), tokens in zip(
            able, self._runner.guess(tuple(able), depth), strict=True
        ):
            num_known = mirror.num_tokens
            mirror.token_ids += tokens[: depths[mirror.request_id]]
            # Keys and values of all but the last guess are there.
            mirror.num_computed_tokens = min(num_known + depth - 1, mirror.num_tokens)

    def _read(self, mirror: EngineSequence, num_tokens: int) -> bool:
        if not self._manager.allocate(mirror, num_tokens):
            return False
        self._runner.execute(StepPlan(0, (ScheduledSequence(mirror, num_tokens),)))
        mirror.num_computed_tokens += num_tokens
        return True

    def _step(self, mirrors: list[EngineSequence]) -> list[EngineSequence]:
        """Draw the next token of each mirror; gives those for which there was room."""
        able = [
            ScheduledSequence(mirror, mirror.num_tokens - mirror.num_computed_tokens)
            for mirror in mirrors
            if mirror.num_tokens > mirror.num_computed_tokens  # its last step drew nothing
            and self._manager.allocate(mirror, mirror.num_tokens - mirror.num_computed_tokens)
        ]
        if not able:
            return []
        draws = self._runner.execute(StepPlan(0, tuple(able)))
        for mirror, num_tokens, _ in able:
            mirror.num_computed_tokens += num_tokens
            drawn = draws.get(mirror.request_id)
            if isinstance(drawn, tuple):
                mirror.token_ids.append(drawn[0].token_id)
        return [share.sequence for share in able]

    def _forget(self, request_id: int) -> None:
        self._manager.free(self._mirrors.pop(request_id))


def _row(sequence: EngineSequence) -> SamplingRow:
    return SamplingRow(sequence.params, sequence.token_ids, sequence.num_prompt_tokens)
