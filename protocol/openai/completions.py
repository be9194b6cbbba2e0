"""Completions: a body to prompts and options, text back to OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.answer import Answer, ChunkEncoder, Heading, usage
from understudy.protocol.openai.body import parse_body
from understudy.protocol.openai.logprobs import completion_logprobs
from understudy.protocol.openai.sampling import (
    CHOICES_MAX,
    LOGPROBS_MAX,
    Generation,
    GenerationFields,
    ModelTraits,
    check_generation,
    check_token_ids,
    settle_max_tokens,
)
from understudy.protocol.openai.stream_ids import EventIds

CHUNK_KIND: Final = "text_completion"
DEFAULT_MAX_TOKENS: Final = 16

PromptInput: TypeAlias = str | tuple[int, ...]
"""A prompt as the client gave it: text, or token ids."""


class CompletionFields(GenerationFields, kw_only=True, frozen=True):
    """The JSON fields of ``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A checked request for completions, ``generation.n`` of each prompt."""

    prompts: tuple[PromptInput, ...]
    echo: bool
    generation: Generation
    ignored: tuple[str, ...]


def parse_completion(raw: bytes, model: ModelTraits) -> Completion:
    """Read and check the body of ``POST /v1/completions``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, ignored = parse_body(raw, CompletionFields)
    return check_completion(fields, model, ignored=ignored)


def check_completion(
    fields: CompletionFields, model: ModelTraits, *, ignored: tuple[str, ...]
) -> Completion:
    """Check a request for completions, from whichever endpoint.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    echo = fields.echo or False
    logprobs = fields.logprobs
    if logprobs is not None:
        if not 0 <= logprobs <= LOGPROBS_MAX:
            raise InvalidRequest(f"logprobs must be from 0 to {LOGPROBS_MAX}", param="logprobs")
        if echo and fields.stream:
            raise InvalidRequest("echo with logprobs cannot be streamed", param="logprobs")
    generation = check_generation(
        fields, model, logprobs=logprobs, least_max_tokens=0 if echo else 1
    )
    prompts = _prompts(fields.prompt, model)
    if len(prompts) * generation.n > CHOICES_MAX:
        raise InvalidRequest(f"prompts times n is at most {CHOICES_MAX}", param="prompt")
    return Completion(prompts, echo, generation, ignored)


def _prompts(
    prompt: str | list[str | int | list[int]] | None, model: ModelTraits
) -> tuple[PromptInput, ...]:
    """The four forms of a prompt as one: text, several texts, token ids, several lists of ids."""
    if prompt is None:
        raise InvalidRequest("prompt is missing", param="prompt")
    if isinstance(prompt, str):
        return (prompt,)
    kinds = set(map(type, prompt))
    if kinds == {str}:
        return tuple(cast("list[str]", prompt))
    if kinds == {int}:
        return (_token_ids(cast("list[int]", prompt), model),)
    if kinds == {list}:
        return tuple(_token_ids(ids, model) for ids in cast("list[list[int]]", prompt))
    raise InvalidRequest(
        "prompt must be a string, strings, token ids or lists of token ids", param="prompt"
    )


def _token_ids(token_ids: list[int], model: ModelTraits) -> tuple[int, ...]:
    if not token_ids:
        raise InvalidRequest("prompt: a list of token ids is empty", param="prompt")
    if len(token_ids) >= model.max_model_len:
        # Found here, a million of them need not be looked at one by one.
        settle_max_tokens(None, len(token_ids), model, default=None)
    return check_token_ids("prompt", token_ids, model.vocab_size)


def completion_response(
    heading: Heading, answers: Sequence[Answer], *, num_prompt_tokens: int, num_cached_tokens: int
) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    return {
        **heading.fields("text_completion"),
        "choices": [
            {
                "index": answer.index,
                "text": answer.text,
                "logprobs": completion_logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
            }
            for answer in answers
        ],
        "usage": usage(
            num_prompt_tokens,
            sum(answer.num_tokens for answer in answers),
            num_cached_tokens=num_cached_tokens,
        ),
    }


def completion_chunk_encoder(
    heading: Heading, event_ids: EventIds, index: int, *, has_usage: bool
) -> ChunkEncoder:
    """What turns the deltas of choice ``index`` into events."""
    return ChunkEncoder(
        event_ids,
        index,
        heading.opening(CHUNK_KIND) + b'"choices":[{"index":%d,' % index,
        first=b'"text":',
        later=b'"text":',
        end_of_text=b"",
        shape_logprobs=completion_logprobs,
        has_usage=has_usage,
    )
