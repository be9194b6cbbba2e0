"""The native API: text, token ids or a conversation in; text, token ids and measures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.answer import Answer
from understudy.protocol.openai.body import parse_body
from understudy.protocol.openai.completions import Completion, CompletionFields, check_completion
from understudy.protocol.openai.logprobs import completion_logprobs
from understudy.protocol.openai.sampling import GenerationFields, ModelTraits
from understudy.protocol.request import FinishReason
from understudy.protocol.timeline import ASSIGNED, BEGUN, ENDED, RESUMED, RequestTimeline

BATCH_MAX: Final = 64
"""Requests in one call of ``POST /v1/batch``."""


class GenerateFields(GenerationFields, kw_only=True, frozen=True):
    """The JSON fields of ``POST /v1/generate``."""

    prompt: str | None = None
    token_ids: list[int] | None = None
    logprobs: int | None = None


class BatchFields(msgspec.Struct, kw_only=True, frozen=True):
    """The JSON fields of ``POST /v1/batch``."""

    model: str | None = None
    requests: list[GenerateFields] | None = None


def parse_generate(raw: bytes, model: ModelTraits) -> Completion:
    """Read and check the body of ``POST /v1/generate``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, ignored = parse_body(raw, GenerateFields)
    return _check(fields, model, ignored=ignored)


def parse_batch(raw: bytes, model: ModelTraits) -> list[Completion]:
    """Read and check the body of ``POST /v1/batch``: all of its requests, or none.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the request and its field.
    """
    fields, _ = parse_body(raw, BatchFields)
    if not fields.requests:
        raise InvalidRequest("requests must hold at least one request", param="requests")
    if len(fields.requests) > BATCH_MAX:
        raise InvalidRequest(f"requests: at most {BATCH_MAX}", param="requests")
    checked = []
    for index, one in enumerate(fields.requests):
        try:
            if one.stream:
                raise InvalidRequest("a batch does not stream", param="stream")
            checked.append(_check(one, model, ignored=()))
        except InvalidRequest as error:
            error.param = f"requests[{index}].{error.param}"
            raise
    return checked


def _check(fields: GenerateFields, model: ModelTraits, *, ignored: tuple[str, ...]) -> Completion:
    if (fields.prompt is None) == (fields.token_ids is None):
        raise InvalidRequest("give either prompt or token_ids", param="prompt")
    shared = {name: getattr(fields, name) for name in GenerationFields.__struct_fields__}
    prompt: Any = fields.prompt if fields.token_ids is None else fields.token_ids
    completion = CompletionFields(**shared, prompt=prompt, logprobs=fields.logprobs)
    return check_completion(completion, model, ignored=ignored)


def output_object(answer: Answer) -> dict[str, Any]:
    """One answer, with its tokens."""
    return {
        "index": answer.index,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "logprobs": completion_logprobs(answer.logprobs),
    }


def measures(timeline: RequestTimeline) -> dict[str, Any]:
    """How a request fared: seconds by phase, and rates. What is not known yet is null."""
    at: dict[str, float] = {}
    for event in timeline.events:
        at.setdefault(event.what, event.at_s)
    assigned, begun, ended = at.get(ASSIGNED), at.get(BEGUN), at.get(ENDED)
    decode_s = _between(begun, ended)
    further = timeline.num_output_tokens - 1
    drafted = timeline.num_draft_tokens
    return {
        "latency_s": ended,
        "queue_s": assigned,
        "prefill_s": _between(assigned, begun),
        "decode_s": decode_s,
        "time_to_first_token_s": begun,
        "tokens_per_s": further / decode_s if decode_s and further > 0 else None,
        "prompt_tokens": timeline.num_prompt_tokens,
        "output_tokens": timeline.num_output_tokens,
        "cached_tokens": timeline.num_cached_tokens,
        "acceptance_ratio": timeline.num_accepted_tokens / drafted if drafted else None,
        "resumes": sum(event.what == RESUMED for event in timeline.events),
    }


def request_object(timeline: RequestTimeline) -> dict[str, Any]:
    """What became of one request."""
    return {
        "id": f"{timeline.request_id:016x}",
        "group_id": f"{timeline.group_id:016x}",
        "finish_reason": FinishReason(timeline.finish).name.lower() if timeline.finish else None,
        "error": timeline.code or None,
        "metrics": measures(timeline),
        "events": [
            {"at_s": event.at_s, "event": event.what, "engine": event.engine or None}
            for event in timeline.events
        ],
    }


def summary(timelines: Sequence[RequestTimeline]) -> dict[str, Any]:
    """What the latest requests come to together: means over those that know."""
    each = [measures(timeline) for timeline in timelines]
    names = ("latency_s", "queue_s", "prefill_s", "decode_s", "time_to_first_token_s")
    drafted = sum(timeline.num_draft_tokens for timeline in timelines)
    accepted = sum(timeline.num_accepted_tokens for timeline in timelines)
    return {
        "requests": len(timelines),
        **{f"{name}_mean": _mean([one[name] for one in each]) for name in names},
        "tokens_per_s_mean": _mean([one["tokens_per_s"] for one in each]),
        "prompt_tokens": sum(one["prompt_tokens"] for one in each),
        "output_tokens": sum(one["output_tokens"] for one in each),
        "cached_tokens": sum(one["cached_tokens"] for one in each),
        "acceptance_ratio": accepted / drafted if drafted else None,
    }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
