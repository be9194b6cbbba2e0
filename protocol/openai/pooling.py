"""Vectors over HTTP: embeddings in OpenAI's form, scores in vLLM's, rankings in Jina's.

A body becomes texts or token ids that are pooled side by side; vectors become JSON. How a text
becomes tokens is not known here.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Callable, Sequence
from operator import mul
from typing import Any, Final, NamedTuple, TypeAlias, cast

import msgspec

from understudy.protocol.errors import InvalidRequest, PayloadTooLarge
from understudy.protocol.openai.body import parse_body
from understudy.protocol.openai.sampling import (
    ModelTraits,
    check_cache_salt,
    check_deadline_s,
    check_model,
    check_token_ids,
    within,
)
from understudy.protocol.request import Pooling, PoolingKind, Request, SamplingParams

INPUTS_MAX: Final = 2048
"""Inputs of one call, or documents, as in OpenAI's API."""
TOKENS_MAX: Final = 300_000
"""Tokens of all inputs of one call together, as in OpenAI's API."""

TextOrIds: TypeAlias = str | tuple[int, ...]
Texts: TypeAlias = str | list[str]


class PoolingFields(msgspec.Struct, kw_only=True, frozen=True):
    """The JSON fields that all endpoints of vectors share. ``None`` is absent."""

    model: str | None = None
    user: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    deadline_ms: int | None = None


class EmbeddingFields(PoolingFields, kw_only=True, frozen=True):
    """The JSON fields of ``POST /v1/embeddings``."""

    input: str | list[str | int | list[int]] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None


class ScoreFields(PoolingFields, kw_only=True, frozen=True):
    """The JSON fields of ``POST /v1/score``: two texts, or one and many, or as many of both."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None


class Document(msgspec.Struct, frozen=True):
    """A document of a ranking that is given as an object."""

    text: str


class RerankFields(PoolingFields, kw_only=True, frozen=True):
    """The JSON fields of ``POST /v1/rerank``."""

    query: str | None = None
    documents: list[str | Document] | None = None
    top_n: int | None = None
    return_documents: bool | None = None


class Terms(NamedTuple):
    """On what terms the requests of a call are served."""

    priority: int
    cache_salt: str
    deadline_s: float | None


class Embeddings(NamedTuple):
    """A checked call for embeddings."""

    inputs: tuple[TextOrIds, ...]
    pooling: Pooling
    is_base64: bool
    terms: Terms
    ignored: tuple[str, ...]


class Scores(NamedTuple):
    """A checked call for scores, or for a ranking, of pairs of texts."""

    firsts: tuple[str, ...]
    """One for each of ``seconds``, or one for all."""
    seconds: tuple[str, ...]
    params: tuple[str, str]
    """The fields that the texts came in."""
    terms: Terms
    ignored: tuple[str, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs, in order."""
        firsts = self.firsts * (len(self.seconds) if len(self.firsts) == 1 else 1)
        return list(zip(firsts, self.seconds, strict=True))


class Ranking(NamedTuple):
    """A checked call for a ranking."""

    scores: Scores
    top_n: int
    with_documents: bool


def parse_embeddings(raw: bytes, model: ModelTraits) -> Embeddings:
    """Read and check the body of ``POST /v1/embeddings``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, ignored = parse_body(raw, EmbeddingFields)
    terms = _terms(fields, model)
    if model.pooling is PoolingKind.SCORE:
        text = f"the model {model.name!r} makes scores, not embeddings; use /v1/score or /v1/rerank"
        raise InvalidRequest(text, param="model")
    if fields.encoding_format not in {None, "float", "base64"}:
        raise InvalidRequest("encoding_format must be float or base64", param="encoding_format")
    size = model.hidden_size
    dimensions = within("dimensions", fields.dimensions, size, least=1, most=size)
    return Embeddings(
        _inputs(fields.input, model),
        Pooling(model.pooling, dimensions if dimensions < size else 0),
        fields.encoding_format == "base64",
        terms,
        ignored,
    )


def parse_scores(raw: bytes, model: ModelTraits) -> Scores:
    """Read and check the body of ``POST /v1/score``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, ignored = parse_body(raw, ScoreFields)
    terms = _terms(fields, model)
    is_named = fields.queries is not None or fields.documents is not None
    if is_named and (fields.text_1 is not None or fields.text_2 is not None):
        raise InvalidRequest(
            "give either text_1 and text_2 or queries and documents", param="text_1"
        )
    params = ("queries", "documents") if is_named else ("text_1", "text_2")
    firsts, seconds = (_texts(getattr(fields, name), name) for name in params)
    if len(firsts) not in {1, len(seconds)}:
        text = f"{params[0]} must be one text, or as many as {params[1]}: {len(seconds)}"
        raise InvalidRequest(text, param=params[0])
    return Scores(firsts, seconds, params, terms, ignored)


def parse_rerank(raw: bytes, model: ModelTraits) -> Ranking:
    """Read and check the body of ``POST /v1/rerank``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, ignored = parse_body(raw, RerankFields)
    terms = _terms(fields, model)
    given = fields.documents
    texts = None if given is None else [d if isinstance(d, str) else d.text for d in given]
    documents = _texts(texts, "documents")
    top_n = within("top_n", fields.top_n, len(documents), least=1, most=1 << 31)
    scores = Scores(
        _texts(fields.query, "query"), documents, ("query", "documents"), terms, ignored
    )
    wanted = True if fields.return_documents is None else fields.return_documents
    return Ranking(scores, min(top_n, len(documents)), wanted)


def check_total(num_tokens: int, *, param: str) -> None:
    """Check the tokens of all inputs of a call together.

    Raises:
        PayloadTooLarge: they are too many.
    """
    if num_tokens > TOKENS_MAX:
        text = f"{param}: at most {TOKENS_MAX} tokens in one call; these have {num_tokens}"
        raise PayloadTooLarge(text, param=param)


def pooling_requests(
    prompts: Sequence[tuple[tuple[int, ...], Pooling]],
    terms: Terms,
    *,
    draw: Callable[[int], int],
) -> list[Request]:
    """A request for each prompt, all of one group, which is named after the first.

    ``draw(bits)`` gives a random number of so many bits.
    """
    request_ids = [draw(63) for _ in prompts]
    params = SamplingParams(seed=0, max_tokens=1)
    return [
        Request(
            request_id=request_id,
            group_id=request_ids[0],
            prompt=prompt,
            params=params,
            priority=terms.priority,
            cache_salt=terms.cache_salt,
            deadline_s=terms.deadline_s,
            pooling=pooling,
        )
        for request_id, (prompt, pooling) in zip(request_ids, prompts, strict=True)
    ]


def numbers(vector: bytes) -> list[float]:
    """The numbers of a vector as it came from an engine."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def cosine(one: bytes, other: bytes) -> float:
    """The cosine of the angle between two vectors of length 1."""
    return math.fsum(map(mul, numbers(one), numbers(other)))


def embeddings_response(
    vectors: Sequence[bytes], *, model: str, answer_id: str, num_tokens: int, is_base64: bool
) -> dict[str, Any]:
    """The answer to a call for embeddings.

    What is large is JSON already, a vector at a time: so a thread that makes the answer of a large
    call holds up nobody for long, and to put it together takes no time.
    """
    shape = _base64 if is_base64 else numbers
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": msgspec.Raw(msgspec.json.encode(shape(vector))),
        }
        for index, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "id": answer_id,
        "data": data,
        "model": model,
        "usage": _usage(num_tokens),
    }


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def scores_response(
    scores: Sequence[float], *, model: str, answer_id: str, created: int, num_tokens: int
) -> dict[str, Any]:
    """The answer to a call for scores."""
    return {
        "object": "list",
        "id": answer_id,
        "created": created,
        "model": model,
        "data": [
            {"object": "score", "index": index, "score": score}
            for index, score in enumerate(scores)
        ],
        "usage": _usage(num_tokens),
    }


def rerank_response(
    ranking: Ranking, scores: Sequence[float], *, model: str, answer_id: str, num_tokens: int
) -> dict[str, Any]:
    """The answer to a call for a ranking: the best first, and among equals the first given."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    results: list[dict[str, Any]] = []
    for index in order[: ranking.top_n]:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if ranking.with_documents:
            result["document"] = {"text": ranking.scores.seconds[index]}
        results.append(result)
    return {"id": answer_id, "model": model, "results": results, "usage": _usage(num_tokens)}


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _terms(fields: PoolingFields, model: ModelTraits) -> Terms:
    check_model(fields.model, model)
    priority = within("priority", fields.priority, 0, least=-(1 << 31), most=(1 << 31) - 1)
    cache_salt = check_cache_salt(fields.cache_salt)
    return Terms(priority, cache_salt, check_deadline_s(fields.deadline_ms))


def _inputs(
    given: str | list[str | int | list[int]] | None, model: ModelTraits
) -> tuple[TextOrIds, ...]:
    """The four forms of an input as one: text, several texts, token ids, several lists of ids."""
    if given is None:
        raise InvalidRequest("input is missing", param="input")
    if isinstance(given, str):
        return _texts(given, "input")
    kinds = set(map(type, given))
    if kinds == {str} or not kinds:
        return _texts(cast("list[str]", given), "input")
    if kinds == {int}:
        return (_token_ids(cast("list[int]", given), model),)
    if kinds == {list}:
        _check_count(given, "input")
        return tuple(_token_ids(ids, model) for ids in cast("list[list[int]]", given))
    raise InvalidRequest(
        "input must be a string, strings, token ids or lists of token ids", param="input"
    )


def _token_ids(token_ids: list[int], model: ModelTraits) -> tuple[int, ...]:
    if not token_ids:
        raise InvalidRequest("input: a list of token ids is empty", param="input")
    # Found here, a million of them need not be looked at one by one.
    model.check_pooled_length(len(token_ids), param="input")
    return check_token_ids("input", token_ids, model.vocab_size)


def _texts(given: Texts | None, param: str) -> tuple[str, ...]:
    """One text or several; none may be empty, for there is nothing to pool."""
    if given is None:
        raise InvalidRequest(f"{param} is missing", param=param)
    texts = [given] if isinstance(given, str) else given
    _check_count(texts, param)
    if not all(texts):
        raise InvalidRequest(f"{param}: a text is empty", param=param)
    return tuple(texts)


def _check_count(given: Sequence[object], param: str) -> None:
    if not given:
        raise InvalidRequest(f"{param} is empty", param=param)
    if len(given) > INPUTS_MAX:
        raise InvalidRequest(f"{param}: at most {INPUTS_MAX} in one call", param=param)
