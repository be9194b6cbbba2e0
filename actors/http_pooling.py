"""``/v1/embeddings``, ``/v1/score`` and ``/v1/rerank``: prompts become vectors, not text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aiohttp import web

from understudy.actors.http_access import with_rights
from understudy.actors.http_answers import ignored_header, json_response
from understudy.actors.http_generation import GenerationEndpoints
from understudy.actors.http_pooled import PooledCalls
from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.pooling import (
    Scores,
    Terms,
    TextOrIds,
    check_total,
    cosine,
    embeddings_response,
    numbers,
    parse_embeddings,
    parse_rerank,
    parse_scores,
    pooling_requests,
    rerank_response,
    scores_response,
)
from understudy.protocol.openai.sampling import ModelTraits
from understudy.protocol.request import Pooling, PoolingKind, Request
from understudy.runtime.model.encoder_config import EncoderConfig
from understudy.runtime.served_model import ServedModel


class _Prompt(NamedTuple):
    """What one request computes."""

    tokens: tuple[int, ...]
    pooling: Pooling


class _Pooled(NamedTuple):
    """What came of a call."""

    vectors: list[bytes]
    group_id: int
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        """How much there is to shape."""
        return sum(map(len, self.vectors))


class _Scored(NamedTuple):
    """What came of a call for scores."""

    scores: list[float]
    pooled: _Pooled


class PoolingEndpoints:
    """The endpoints whose answers are vectors, or are made of them.

    Args:
        served: The model.
        generation: Reads bodies, and has threads for long ones.
        pooled: Where calls are answered.
        wall_clock: Seconds since 1970, for ``created``.
        draw: Gives a random number of so many bits, for ids.
    """

    def __init__(
        self,
        served: ServedModel,
        generation: GenerationEndpoints,
        pooled: PooledCalls,
        wall_clock: Callable[[], float],
        draw: Callable[[int], int],
    ) -> None:
        self._served = served
        self._generation = generation
        self._pooled = pooled
        self._wall_clock = wall_clock
        self._draw = draw

    async def embeddings(self, http_request: web.Request) -> web.Response:
        """Answer ``POST /v1/embeddings``."""
        raw = await self._generation.read(http_request)
        model = self._generation.model()
        body = parse_embeddings(raw, model)
        prompts = await self._prompts(
            body.inputs, body.pooling, model, param="input", size=len(raw)
        )
        pooled = await self._pool(http_request, prompts, body.terms)

        def respond() -> dict[str, Any]:
            return embeddings_response(
                pooled.vectors,
                model=model.name,
                answer_id=f"embd-{pooled.group_id:016x}",
                num_tokens=pooled.num_tokens,
                is_base64=body.is_base64,
            )

        answer = await self._generation.run(respond, size=pooled.num_bytes)
        return json_response(answer, headers=ignored_header(body.ignored))

    async def score(self, http_request: web.Request) -> web.Response:
        """Answer ``POST /v1/score``."""
        raw = await self._generation.read(http_request)
        model = self._generation.model()
        body = parse_scores(raw, model)
        scored = await self._score(http_request, body, model, size=len(raw))
        answer = scores_response(
            scored.scores,
            model=model.name,
            answer_id=f"score-{scored.pooled.group_id:016x}",
            created=int(self._wall_clock()),
            num_tokens=scored.pooled.num_tokens,
        )
        return json_response(answer, headers=ignored_header(body.ignored))

    async def rerank(self, http_request: web.Request) -> web.Response:
        """Answer ``POST /v1/rerank``."""
        raw = await self._generation.read(http_request)
        model = self._generation.model()
        ranking = parse_rerank(raw, model)
        scored = await self._score(http_request, ranking.scores, model, size=len(raw))
        answer = rerank_response(
            ranking,
            scored.scores,
            model=model.name,
            answer_id=f"rerank-{scored.pooled.group_id:016x}",
            num_tokens=scored.pooled.num_tokens,
        )
        return json_response(answer, headers=ignored_header(ranking.scores.ignored))

    async def _score(
        self, http_request: web.Request, body: Scores, model: ModelTraits, *, size: int
    ) -> _Scored:
        """How well each pair fits: what the model's head says, or the angle of embeddings."""
        if model.pooling is PoolingKind.SCORE:
            prompts = await self._pairs(body, model, size=size)
            pooled = await self._pool(http_request, prompts, body.terms)
            return _Scored([self._head_score(vector) for vector in pooled.vectors], pooled)
        # A text that is in many pairs is embedded once.
        texts = list(dict.fromkeys((*body.firsts, *body.seconds)))
        prompts = await self._prompts(
            texts, Pooling(model.pooling), model, param=body.params[1], size=size
        )
        pooled = await self._pool(http_request, prompts, body.terms)
        vectors = dict(zip(texts, pooled.vectors, strict=True))

        def compare() -> list[float]:
            return [cosine(vectors[first], vectors[second]) for first, second in body.pairs]

        return _Scored(await self._generation.run(compare, size=pooled.num_bytes), pooled)

    def _head_score(self, vector: bytes) -> float:
        [score] = numbers(vector)
        config = self._served.config
        assert isinstance(config, EncoderConfig)
        return _sigmoid(score) if config.squashes_scores else score

    async def _prompts(
        self,
        given: Sequence[TextOrIds],
        pooling: Pooling,
        model: ModelTraits,
        *,
        param: str,
        size: int,
    ) -> list[_Prompt]:
        """The prompts of texts that came in a body of this size.

        Raises:
            InvalidRequest: and its kinds; ``param`` names the field.
        """
        tokenizer = self._served.tokenizer

        def encode() -> list[_Prompt]:
            prompts = []
            num_tokens = 0
            for one in given:
                tokens: Sequence[int] = one if isinstance(one, tuple) else ()
                if isinstance(one, str):
                    model.check_pooled_length(tokenizer.fewest_tokens(one), param=param)
                    tokens = tokenizer.encode(one, add_special_tokens=True)
                prompts.append(_Prompt(_checked(tokens, model, param=param), pooling))
                num_tokens += len(tokens)
                check_total(num_tokens, param=param)
            return prompts

        return await self._generation.run(encode, size=size)

    async def _pairs(self, body: Scores, model: ModelTraits, *, size: int) -> list[_Prompt]:
        """The same of pairs of texts."""
        tokenizer, param = self._served.tokenizer, body.params[1]

        def encode() -> list[_Prompt]:
            prompts = []
            num_tokens = 0
            for first, second in body.pairs:
                pair = tokenizer.encode_pair(first, second)
                tokens = _checked(pair.ids, model, param=param)
                pooling = Pooling(PoolingKind.SCORE, second_at=pair.second_at)
                prompts.append(_Prompt(tokens, pooling))
                num_tokens += len(tokens)
                check_total(num_tokens, param=param)
            return prompts

        return await self._generation.run(encode, size=size)

    async def _pool(
        self, http_request: web.Request, prompts: Sequence[_Prompt], terms: Terms
    ) -> _Pooled:
        """Have prompts pooled, on the caller's terms."""
        requests: Sequence[Request] = pooling_requests(prompts, terms, draw=self._draw)
        requests = with_rights(http_request, requests)
        vectors = await self._pooled.collect(requests)
        num_tokens = sum(len(prompt.tokens) for prompt in prompts)
        return _Pooled(vectors, requests[0].group_id, num_tokens)


def _checked(tokens: Sequence[int], model: ModelTraits, *, param: str) -> tuple[int, ...]:
    """A prompt, if it is one, fits, and the model has an embedding for each token."""
    if not tokens:
        raise InvalidRequest(f"{param}: a text has no tokens", param=param)
    model.check_pooled_length(len(tokens), param=param)
    if max(tokens) >= model.vocab_size:
        raise InvalidRequest(f"{param}: there is a token that the model lacks", param=param)
    return tuple(tokens)


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    grown = math.exp(value)
    return grown / (1 + grown)
