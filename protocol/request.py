"""A request as it travels between actors: token ids and how to sample from them.

Holds no text: the gateway is the only place that knows what the tokens spell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import chain
from typing import Final, NamedTuple

SEED_MASK: Final = (1 << 64) - 1
"""Seeds are 64-bit; a client's negative seed is taken modulo 2**64."""

VECTOR_BYTES_MAX: Final = 4 << 20
"""Of all vectors in one message, unless a single one has more."""

_HASH_START: Final = 0x811C9DC5
_HASH_PRIME: Final = 0x01000193


class FinishReason(IntEnum):
    """Why a request ended. Every request ends exactly once, with one of these."""

    STOP = 1
    """The model ended its turn, or a stop token or stop string was met."""
    LENGTH = 2
    """``max_tokens`` or the model's context was reached."""
    CANCELLED = 3
    """The client went away, or asked for the end."""
    ERROR = 4
    """The system could not go on."""
    DEADLINE = 5
    """The client's deadline has passed; what was made until then counts."""
    REFUSED = 6
    """The grammar that the client gave cannot be followed any further within the limits."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """How thoughts are told from the answer behind them, in tokens, and how long they may be.

    The output begins inside the thoughts if ``is_open``, or may open them with its first tokens.
    They end with the first of ``closings``. When ``budget`` tokens were thought and none has come,
    ``forced`` are the next tokens, whatever the model would say, and the answer begins behind them.
    """

    openings: tuple[tuple[int, ...], ...]
    """The tokens that the opening mark may be written in. With a grammar, one token each."""
    closings: tuple[tuple[int, ...], ...]
    is_open: bool
    budget: int | None = None
    """``None``: as long as the model likes."""
    forced: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; validated by the gateway, trusted from there on.

    ``stop_token_ids`` already holds the model's end-of-sequence ids, unless the request ignores
    them: an engine never has to know which ids those are. They are forbidden while fewer than
    ``min_tokens`` tokens were made. ``temperature`` 0 means greedy. ``top_k`` 0 means off.
    ``logprobs`` is the number of alternatives to report for each token; ``None`` reports nothing,
    0 only the chosen token's.
    """

    seed: int
    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    grammar: str = ""
    """What the output must follow, for llguidance: Lark, or its own JSON. Empty is nothing. With a
    grammar, ``stop_token_ids`` holds the end-of-sequence ids and ``min_tokens`` is 0."""
    thinking: Thinking | None = None
    """If it is there, a grammar governs only what follows the thoughts."""
    echoed: tuple[int, ...] = ()
    """What the output begins with, whatever the model would say: all of the client's prompt but its
    first token, where the log probabilities of a prompt are asked for. Beside ``max_tokens``, which
    counts these as well, they count as prompt."""


class PoolingKind(IntEnum):
    """How the states of a prompt's tokens become one vector."""

    LAST = 1
    """The last token's."""
    MEAN = 2
    """The mean of all tokens'."""
    CLS = 3
    """The first token's, for models whose tokens see what comes after them."""
    SCORE = 4
    """What a classification head makes of the first token's."""


class Pooling(NamedTuple):
    """A request for a vector in the place of an answer: it ends without a token."""

    kind: PoolingKind
    dimensions: int = 0
    """How many of the vector's first numbers are wanted; 0: all."""
    second_at: int = 0
    """Where the second of two texts begins in the prompt; 0: there is one."""


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. ``n > 1`` at the API is n requests with one ``group_id``.

    ``request_id`` and ``group_id`` are random 63-bit numbers drawn by the gateway.
    """

    request_id: int
    group_id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    traceparent: str = ""
    """The W3C trace context of the client's call; it stays with the request wherever it goes."""
    tenant: str = ""
    """Whose key the call came with; empty where no keys are asked for. Only the holder of a key of
    the tenant may join the stream again, and only its requests share cached prefixes."""
    presentation: bytes = b""
    """How a gateway turns the output into an answer; opaque to everyone else. It stays with the
    request, so that another gateway can go on with the stream."""
    idempotency_key: bytes = b""
    """A digest of the client's idempotency key and tenant, or empty."""
    body_digest: bytes = b""
    """A digest of the call's body, if there is an idempotency key."""
    cache_salt: str = ""
    """Only requests of one tenant and salt share cached prefixes."""
    deadline_s: float | None = None
    """The answer has to be complete so many seconds after the request is handed in."""
    first_token_s: float | None = None
    """Its first token has to be there so many seconds after the request is handed in."""
    pooling: Pooling | None = None
    """How the prompt becomes a vector, if that is what is wanted. ``max_tokens`` is 1 then."""

    @property
    def num_prompt_tokens(self) -> int:
        """What the client gave, also where the engine has to say it again."""
        return len(self.prompt) + len(self.params.echoed)

    @property
    def max_answer_tokens(self) -> int:
        """The most tokens behind that."""
        return self.params.max_tokens - len(self.params.echoed)


def fingerprint(request: Request) -> bytes:
    """A digest of what a request asks, and of who asks: equal for a retry, whatever its seed."""
    asked: tuple[object, ...]
    asked = (request.tenant, request.prompt, replace(request.params, seed=0))
    if request.pooling is not None:
        asked = (*asked, tuple(request.pooling))
    return hashlib.sha256(repr(asked).encode()).digest()


def hastened(request: Request, passed_s: float) -> Request:
    """The request after some time has passed: what is left until its deadlines is less."""
    deadline_s, first_token_s = request.deadline_s, request.first_token_s
    if deadline_s is None and first_token_s is None:
        return request
    return replace(
        request,
        deadline_s=None if deadline_s is None else max(0.0, deadline_s - passed_s),
        first_token_s=None if first_token_s is None else max(0.0, first_token_s - passed_s),
    )


class TokenLogprobs(NamedTuple):
    """Log probabilities at one position, of the distribution before temperature and penalties."""

    chosen: float
    top: tuple[tuple[int, float], ...]
    """The likeliest (token id, log probability), best first."""


class TokenRow(NamedTuple):
    """What an engine step, or several, added to one request.

    ``position`` is the index, in the output, of the first of ``tokens``; ``prefix_hash`` covers
    the whole output up to and including them. ``tokens`` is empty only if the request ends
    without a new token.
    """

    request_id: int
    attempt: int
    position: int
    tokens: tuple[int, ...]
    prefix_hash: int
    finish: int
    """A ``FinishReason``, or 0 while the request goes on."""
    logprobs: tuple[bytes, ...] = ()
    """Packed ``TokenLogprobs`` for each of ``tokens``, or empty if the request did not ask."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that the request's first engine found in its cache. Told with the first
    token, and to whoever joins late; 0 in all other rows."""
    num_draft_tokens: int = 0
    """How many tokens were guessed; of one step, all of ``tokens`` but the last came true."""
    vector: bytes = b""
    """What the prompt was pooled to, as float32, little-endian; then this row ends the request."""


def portions(rows: Sequence[TokenRow], *, rows_max: int) -> Iterator[tuple[TokenRow, ...]]:
    """Rows in order, in as many as fit a message: their vectors may be large."""
    some: list[TokenRow] = []
    num_bytes = 0
    for row in rows:
        num_bytes += len(row.vector)
        if some and (len(some) >= rows_max or num_bytes > VECTOR_BYTES_MAX):
            yield tuple(some)
            some, num_bytes = [], len(row.vector)
        some.append(row)
    if some:
        yield tuple(some)


def joined(rows: Iterable[TokenRow]) -> list[TokenRow]:
    """What several steps brought, as if one had: a row for each request and attempt.

    Rows that do not continue each other stay apart, and those of one request in their order.
    """
    stretches: list[list[TokenRow]] = []
    latest: dict[int, list[TokenRow]] = {}
    for row in rows:
        stretch = latest.get(row.request_id)
        if stretch is not None and _continues(stretch[-1], row):
            stretch.append(row)
        else:
            latest[row.request_id] = stretch = [row]
            stretches.append(stretch)
    return [stretch[0] if len(stretch) == 1 else _join(stretch) for stretch in stretches]


def _continues(row: TokenRow, following: TokenRow) -> bool:
    end = row.position + len(row.tokens)
    return following.position == end and following.attempt == row.attempt and not row.finish


def _join(stretch: list[TokenRow]) -> TokenRow:
    last = stretch[-1]
    return TokenRow(
        last.request_id,
        last.attempt,
        stretch[0].position,
        tuple(chain.from_iterable([row.tokens for row in stretch])),
        last.prefix_hash,
        last.finish,
        tuple(chain.from_iterable([row.logprobs for row in stretch])),
        max(row.num_cached_tokens for row in stretch),
        sum(row.num_draft_tokens for row in stretch),
        last.vector,
    )


def extend_prefix_hash(prefix_hash: int, tokens: tuple[int, ...] | list[int]) -> int:
    """Extend the hash of an output by further tokens (32-bit FNV-1a over token ids).

    Start from ``prefix_hash=0`` for an empty output: the algorithm's start value is folded in, so
    that the hash of an output is the same however it was cut into steps. It guards against
    mistakes and stale engines, not against an adversary.
    """
    value = prefix_hash ^ _HASH_START
    for token in tokens:
        value = ((value ^ token) * _HASH_PRIME) & 0xFFFFFFFF
    return value ^ _HASH_START
