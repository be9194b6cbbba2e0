"""A sequence: one attempt at a request, inside one engine.

Knows its tokens, how far they are computed, where its KV blocks are, and when it is over. Knows
nothing of text, of other sequences, or of who gets to run: that is the scheduler's.
"""

from __future__ import annotations

from enum import Enum, auto

from understudy.protocol.request import (
    FinishReason,
    PoolingKind,
    Request,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.kvcache.prefix_cache import root_key
from understudy.runtime.scheduling.thinking import Phase, Progress, ThoughtReader


class SequenceStatus(Enum):
    """Where a sequence stands. Only a running one owns blocks."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """The tokens of one attempt, and how far the model has got with them.

    Attributes:
        request_id: The request that this sequence is an attempt at.
        attempt: Which attempt; the ledger drops what earlier ones still report.
        params: How tokens are drawn, and when to stop.
        looks_back: Whether more than the model and a position decides on a draw: what was drawn
            before has to be known first. Or there is more to report of it than the token.
        pooling: How the prompt becomes a vector, if that is what is wanted.
        priority: Lower is earlier.
        token_ids: Prompt, then output.
        num_offered_blocks: How many of its first blocks were offered to others.
        num_prompt_tokens: How many of ``token_ids`` are the prompt.
        cache_root: Who may share its keys and values: see ``prefix_cache``.
        block_keys: The keys of its first full blocks, as far as they were asked for.
        num_cached_tokens: How many tokens of the prompt were found in the cache at its first start.
        num_computed_tokens: How many of ``token_ids`` have their keys and values in the cache.
        num_tokens_max: The sequence is over when it has this many tokens. The scheduler lowers it
            to what the model and the cache can hold.
        block_table: The blocks that hold the keys and values, in order of position.
        prefix_hash: ``extend_prefix_hash`` over the whole output.
        arrival: Its number in the order of arrival, given by the scheduler.
        status: Set by the scheduler.
    """

    __slots__ = (
        "__weakref__",
        "_thoughts",
        "arrival",
        "attempt",
        "block_keys",
        "block_table",
        "cache_root",
        "looks_back",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_offered_blocks",
        "num_prompt_tokens",
        "num_tokens_max",
        "params",
        "pooling",
        "prefix_hash",
        "priority",
        "request_id",
        "status",
        "token_ids",
    )

    def __init__(self, request: Request, *, attempt: int, output: tuple[int, ...] = ()) -> None:
        """``output`` is what earlier attempts made already; this one goes on behind it.

        It stays output: penalties, ``min_tokens``, ``max_tokens`` and positions count it.
        """
        self.request_id = request.request_id
        self.attempt = attempt
        self.params = request.params
        self.looks_back = _looks_back(request)
        self.pooling = request.pooling
        self.priority = request.priority
        self.token_ids: list[int] = [*request.prompt, *output]
        self.num_prompt_tokens = len(request.prompt)
        self.num_computed_tokens = 0
        self.num_tokens_max = self.num_prompt_tokens + request.params.max_tokens
        self.block_table: list[int] = []
        self.cache_root = root_key(request.tenant, request.cache_salt)
        self.block_keys: list[bytes] = []
        self.num_cached_tokens: int | None = None
        self.num_offered_blocks = 0
        self.prefix_hash = extend_prefix_hash(0, output)
        self.arrival = 0
        self.status = SequenceStatus.WAITING
        thinking = request.params.thinking
        self._thoughts = None if thinking is None else ThoughtReader(thinking)

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.request_id}.{self.attempt} {self.status.name.lower()} "
            f"{self.num_computed_tokens}/{self.num_prompt_tokens}+{self.num_output_tokens}>"
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """All output, that of earlier attempts included; the position of the next token."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def needs_every_state(self) -> bool:
        """Whether every token has to be computed, though the cache may have what comes of it."""
        return self.pooling is not None and self.pooling.kind is not PoolingKind.LAST

    @property
    def thoughts(self) -> Progress | None:
        """Where the output stands with its thoughts; ``None`` if the request does not care."""
        if self._thoughts is None:
            return None
        return self._thoughts.read(self.token_ids, self.num_prompt_tokens)

    def forced_ahead(self, tokens_max: int) -> tuple[int, ...]:
        """The next tokens, as far as they are not the model's to choose, and at most so many."""
        made, params = self.num_output_tokens, self.params
        if made < len(params.echoed):
            return params.echoed[made : made + tokens_max]
        thoughts = self.thoughts
        if thoughts is None or thoughts.phase is not Phase.CLOSING or params.thinking is None:
            return ()
        return params.thinking.forced[thoughts.num_in_phase :][:tokens_max]

    def append(self, token_id: int) -> FinishReason | None:
        """Add the next output token, and say whether it was the last."""
        self.token_ids.append(token_id)
        self.prefix_hash = extend_prefix_hash(self.prefix_hash, (token_id,))
        return self.finish_reason()

    def row(
        self,
        finish: FinishReason | None,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[bytes, ...] = (),
    ) -> TokenRow:
        """What there is to report of it, with ``tokens`` at the end of its output."""
        return TokenRow(
            self.request_id,
            self.attempt,
            self.num_output_tokens - len(tokens),
            tokens,
            self.prefix_hash,
            finish or 0,
            logprobs,
        )

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is over as it stands, or ``None`` while it goes on."""
        num_tokens = len(self.token_ids)
        # The sampler forbids stop tokens while fewer than min_tokens tokens were made, so the
        # first that may be one is number min_tokens + 1.
        if (
            num_tokens - self.num_prompt_tokens - len(self.params.echoed) > self.params.min_tokens
            and self.token_ids[-1] in self.params.stop_token_ids
        ):
            return FinishReason.STOP
        if num_tokens >= self.num_tokens_max:
            return FinishReason.LENGTH
        return None


def _looks_back(request: Request) -> bool:
    params = request.params
    return (
        request.pooling is not None
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.logprobs is not None
        or bool(params.grammar)
        or params.thinking is not None
        or bool(params.echoed)
    )
