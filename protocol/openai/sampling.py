"""The fields that every endpoint shares: how many answers, how tokens are drawn, when to stop.

Numbers are checked here and nowhere else: an engine trusts what it is given. Ranges are those of
OpenAI's and vLLM's interfaces, narrowed where a value would make logits overflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from understudy.protocol.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from understudy.protocol.openai.structured_output import (
    Grammar,
    ResponseFormat,
    StructuredOutputs,
    read_structured_output,
    refuse_with_grammar,
)
from understudy.protocol.request import SEED_MASK, PoolingKind, Request, SamplingParams

N = TypeVar("N", int, float)

CHOICES_EACH_MAX: Final = 16
CHOICES_MAX: Final = 128
STOP_STRINGS_MAX: Final = 8
STOP_BYTES_MAX: Final = 256
STOP_TOKEN_IDS_MAX: Final = 64
LOGIT_BIAS_MAX: Final = 1024
LOGPROBS_MAX: Final = 20
CACHE_SALT_BYTES_MAX: Final = 256
DEADLINE_MS_MAX: Final = 86_400_000

_SMALLEST: Final = 1e-5
"""Temperatures below it are greedy; as top_p it keeps the likeliest token alone."""
_GOLDEN: Final = 0x9E3779B97F4A7C15


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream reports beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(msgspec.Struct, kw_only=True, frozen=True):
    """The JSON fields that all endpoints share. ``None`` is absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None
    deadline_ms: int | None = None


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What the served model means for a request: its name, its limits, its recommendations."""

    name: str
    vocab_size: int
    """The width of the logits."""
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    tool_parser: str = ""
    """The format in which the model calls tools; empty: it is not known."""
    reasoning_parser: str = ""
    """The format in which it thinks before it answers; empty: it does not, or nobody minds."""
    mark_ids: tuple[tuple[str, int], ...] = ()
    """Those marks of these formats that are special tokens, which text cannot spell."""
    pooling: PoolingKind = PoolingKind.LAST
    """How it turns a prompt into a vector."""
    hidden_size: int = 0
    """The numbers of an embedding."""
    generates: bool = True
    """Whether it makes tokens at all."""

    def check_generates(self) -> None:
        """Check that the model can answer.

        Raises:
            InvalidRequest: it makes vectors only.
        """
        if not self.generates:
            uses = "/v1/embeddings, /v1/score and /v1/rerank"
            if self.pooling is PoolingKind.SCORE:
                uses = "/v1/score and /v1/rerank"
            text = f"the model {self.name!r} is an encoder and generates no text; it serves {uses}"
            raise InvalidRequest(text, param="model")

    def check_pooled_length(self, num_tokens: int, *, param: str) -> None:
        """Check that a prompt fits that is followed by nothing.

        Raises:
            ContextLengthExceeded: it does not.
        """
        if num_tokens > self.max_model_len:
            text = f"the model's context is {self.max_model_len} tokens; {param} has {num_tokens}"
            raise ContextLengthExceeded(text, param=param)


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request asks for besides its prompt, checked.

    In ``sampling`` everything is settled but ``seed`` and ``max_tokens``, which depend on the
    prompt: see ``make_requests``. Its ``grammar`` is empty until ``grammar`` is checked.
    """

    sampling: SamplingParams
    n: int
    seed: int | None
    """As the client gave it, modulo 2**64."""
    max_tokens: int | None
    stop: tuple[str, ...]
    include_stop: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    priority: int
    cache_salt: str
    grammar: Grammar | None = None
    """What an answer must look like. Whether it can be compiled is not known yet."""
    deadline_s: float | None = None


def check_generation(
    fields: GenerationFields,
    model: ModelTraits,
    *,
    logprobs: int | None,
    least_max_tokens: int = 1,
    response_format: ResponseFormat | None = None,
) -> Generation:
    """Check the shared fields of a body, and ``response_format`` where an endpoint has it.

    Raises:
        ModelNotFound: another model is asked for than the one served.
        InvalidRequest: a field is out of its range.
    """
    check_model(fields.model, model)
    n = within("n", fields.n, 1, least=1, most=CHOICES_EACH_MAX)
    if fields.best_of is not None and fields.best_of != n:
        raise InvalidRequest("best_of must equal n: answers are not ranked", param="best_of")
    stream = fields.stream or False
    options = fields.stream_options
    if options is not None and not stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    options = options or StreamOptions()
    most = model.max_model_len
    max_tokens = fields.max_tokens
    if max_tokens is not None:
        # More than the context is a matter of the prompt's length, told with it.
        within("max_tokens", max_tokens, 0, least=least_max_tokens, most=SEED_MASK)
    seed = fields.seed
    if seed is not None:
        seed = within("seed", seed, 0, least=-(1 << 63), most=SEED_MASK) & SEED_MASK
    return Generation(
        sampling=_sampling(fields, model, logprobs, most),
        n=n,
        seed=seed,
        max_tokens=max_tokens,
        stop=_stop_strings(fields.stop),
        include_stop=fields.include_stop_str_in_output or False,
        stream=stream,
        include_usage=options.include_usage or False,
        continuous_usage=options.continuous_usage_stats or False,
        priority=within("priority", fields.priority, 0, least=-(1 << 31), most=(1 << 31) - 1),
        cache_salt=check_cache_salt(fields.cache_salt),
        grammar=_grammar(fields, model, response_format),
        deadline_s=check_deadline_s(fields.deadline_ms),
    )


def check_model(name: str | None, model: ModelTraits) -> None:
    """Check that a body names no model but the one that is served.

    Raises:
        ModelNotFound: it does.
    """
    if name is not None and name != model.name:
        raise ModelNotFound(f"the model {name[:64]!r} is not served here", param="model")


def _grammar(
    fields: GenerationFields, model: ModelTraits, response_format: ResponseFormat | None
) -> Grammar | None:
    grammar = read_structured_output(response_format, fields.structured_outputs)
    if grammar is None:
        return None
    refuse_with_grammar(min_tokens=fields.min_tokens or 0, ignores_eos=fields.ignore_eos or False)
    if not model.eos_token_ids:
        text = "this model has no token that ends an answer, which structured output needs"
        raise InvalidRequest(text, param=grammar.param)
    return grammar


def check_deadline_s(deadline_ms: int | None) -> float | None:
    """A deadline in seconds."""
    if deadline_ms is None:
        return None
    return within("deadline_ms", deadline_ms, 0, least=1, most=DEADLINE_MS_MAX) / 1e3


def check_cache_salt(salt: str | None) -> str:
    """A cache salt, or none."""
    if salt is not None and not 0 < len(salt.encode()) <= CACHE_SALT_BYTES_MAX:
        text = f"cache_salt must have 1 to {CACHE_SALT_BYTES_MAX} bytes"
        raise InvalidRequest(text, param="cache_salt")
    return salt or ""


def _sampling(
    fields: GenerationFields, model: ModelTraits, logprobs: int | None, most: int
) -> SamplingParams:
    temperature = within("temperature", fields.temperature, model.temperature, least=0.0, most=2.0)
    top_p = within("top_p", fields.top_p, model.top_p, least=0.0, most=1.0)
    if fields.top_p is not None and top_p == 0.0:
        raise InvalidRequest("top_p must be above 0", param="top_p")
    top_k = within("top_k", fields.top_k, model.top_k, least=-1, most=SEED_MASK)
    stop_token_ids = _token_ids("stop_token_ids", fields.stop_token_ids, model.vocab_size)
    if not fields.ignore_eos:
        stop_token_ids += model.eos_token_ids
    repetition_penalty = within(
        "repetition_penalty",
        fields.repetition_penalty,
        model.repetition_penalty,
        least=0.01,
        most=10.0,
    )
    return SamplingParams(
        seed=0,
        max_tokens=0,
        min_tokens=within("min_tokens", fields.min_tokens, 0, least=0, most=most),
        temperature=temperature if temperature >= _SMALLEST else 0.0,
        top_k=top_k if 0 < top_k < model.vocab_size else 0,
        top_p=max(top_p, _SMALLEST),
        min_p=within("min_p", fields.min_p, model.min_p, least=0.0, most=1.0),
        repetition_penalty=repetition_penalty,
        presence_penalty=_penalty("presence_penalty", fields.presence_penalty),
        frequency_penalty=_penalty("frequency_penalty", fields.frequency_penalty),
        logit_bias=_logit_bias(fields.logit_bias, model.vocab_size),
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
        logprobs=logprobs,
    )


def make_requests(
    generation: Generation,
    prompt: tuple[int, ...],
    model: ModelTraits,
    *,
    draw: Callable[[int], int],
    default_max_tokens: int | None,
    group_id: int | None = None,
) -> list[Request]:
    """The requests for one prompt: ``n`` of one group, each with a seed of its own.

    ``draw(bits)`` gives a random number of so many bits. The first answer uses the client's seed
    itself, so that it does not depend on ``n``; each prompt of a list is answered as if it had
    come alone. The group is named after its first request, unless the call has one already: all
    requests of a call are of one group.

    Raises:
        ContextLengthExceeded: prompt and answer do not fit the model's context.
        InvalidRequest: ``min_tokens`` is above ``max_tokens``.
    """
    max_tokens = settle_max_tokens(
        generation.max_tokens, len(prompt), model, default=default_max_tokens
    )
    if generation.sampling.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens must be at most {max_tokens}", param="min_tokens")
    seed = draw(64) if generation.seed is None else generation.seed
    request_ids = [draw(63) for _ in range(generation.n)]
    return [
        Request(
            request_id=request_id,
            group_id=request_ids[0] if group_id is None else group_id,
            prompt=prompt,
            params=dataclasses.replace(
                generation.sampling, seed=sample_seed(seed, index), max_tokens=max_tokens
            ),
            priority=generation.priority,
            cache_salt=generation.cache_salt,
            deadline_s=generation.deadline_s,
        )
        for index, request_id in enumerate(request_ids)
    ]


def telling_prompt(request: Request) -> Request:
    """The request with its prompt said again by the engine, token by token but for the first.

    So each of them gets its log probabilities, as tokens of the output do, and as they do they
    survive whatever happens on the way.
    """
    first, rest = request.prompt[:1], request.prompt[1:]
    params = dataclasses.replace(
        request.params, echoed=rest, max_tokens=request.params.max_tokens + len(rest)
    )
    return dataclasses.replace(request, prompt=first, params=params)


def settle_max_tokens(
    asked: int | None, num_prompt_tokens: int, model: ModelTraits, *, default: int | None
) -> int:
    """How many tokens an answer may have. ``default`` ``None`` is whatever the context leaves.

    Raises:
        ContextLengthExceeded: prompt and answer do not fit.
    """
    room = model.max_model_len - num_prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        wanted = "" if asked is None else f" and max_tokens is {asked}"
        raise ContextLengthExceeded(
            f"the model's context is {model.max_model_len} tokens; "
            f"the prompt has {num_prompt_tokens}{wanted}",
            param="max_tokens" if room >= 1 else "prompt",
        )
    if asked is not None:
        return asked
    return room if default is None else min(default, room)


def sample_seed(seed: int, index: int) -> int:
    """The seed of answer ``index``: the request's own for 0, else mixed from both.

    The mixing is splitmix64's (Steele, Lea and Flood, 2014), a bijection for each index.
    """
    if index == 0:
        return seed
    value = (seed + index * _GOLDEN) & SEED_MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & SEED_MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & SEED_MASK
    return value ^ (value >> 31)


def check_token_ids(param: str, token_ids: list[int], vocab_size: int) -> tuple[int, ...]:
    """A client's token ids, each within the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise InvalidRequest(f"{param}: token ids go from 0 to {vocab_size - 1}", param=param)
    return tuple(token_ids)


def _token_ids(param: str, token_ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    if len(token_ids) > STOP_TOKEN_IDS_MAX:
        raise InvalidRequest(f"{param}: at most {STOP_TOKEN_IDS_MAX} ids", param=param)
    return check_token_ids(param, token_ids, vocab_size)


def within(param: str, value: N | None, default: N, *, least: N, most: N) -> N:
    """``value`` or its default, inside its range; a minus before a zero is dropped."""
    if value is None:
        return default
    if not least <= value <= most:
        raise InvalidRequest(f"{param} must be from {least} to {most}", param=param)
    return value + 0


def _penalty(param: str, value: float | None) -> float:
    return within(param, value, 0.0, least=-2.0, most=2.0)


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not bias:
        return ()
    param = "logit_bias"
    if len(bias) > LOGIT_BIAS_MAX:
        raise InvalidRequest(f"{param}: at most {LOGIT_BIAS_MAX} tokens", param=param)
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else -1
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{param}: keys are token ids from 0 to {vocab_size - 1}", param=param
            )
        if token_id in pairs:
            raise InvalidRequest(f"{param}: token {token_id} is there twice", param=param)
        pairs[token_id] = within(param, value, 0.0, least=-100.0, most=100.0)
    return tuple(sorted(pairs.items()))


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if len(strings) > STOP_STRINGS_MAX:
        raise InvalidRequest(f"stop: at most {STOP_STRINGS_MAX} strings", param="stop")
    for text in strings:
        if not 0 < len(text.encode()) <= STOP_BYTES_MAX:
            raise InvalidRequest(f"stop: each has 1 to {STOP_BYTES_MAX} bytes", param="stop")
    return tuple(dict.fromkeys(strings))
