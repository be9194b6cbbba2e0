"""Every path that is served, in one table: the router and the OpenAPI document are made from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler

from understudy.actors.http_access import OPEN_TARGETS
from understudy.actors.http_answers import json_response
from understudy.actors.http_generation import GenerationEndpoints
from understudy.actors.http_messages import MessageEndpoints
from understudy.actors.http_native import NativeEndpoints
from understudy.actors.http_pooling import PoolingEndpoints
from understudy.actors.http_rejoin import StreamEndpoints
from understudy.actors.http_responses import ResponseEndpoints
from understudy.actors.http_status import StatusEndpoints
from understudy.actors.http_tokenization import TokenizationEndpoints
from understudy.actors.http_usage import UsageEndpoint
from understudy.protocol.anthropic.messages import MessagesFields
from understudy.protocol.openai.chat import ChatFields
from understudy.protocol.openai.completions import CompletionFields
from understudy.protocol.openai.generate import BatchFields, GenerateFields
from understudy.protocol.openai.openapi import Operation, openapi_document
from understudy.protocol.openai.pooling import EmbeddingFields, RerankFields, ScoreFields
from understudy.protocol.openai.responses import ResponseFields
from understudy.protocol.openai.tokenization import DetokenizeFields, TokenizeFields

OPENAPI_PATH = "/openapi.json"


class Endpoints(NamedTuple):
    """Who answers."""

    generation: GenerationEndpoints
    responses: ResponseEndpoints
    messages: MessageEndpoints
    tokenization: TokenizationEndpoints
    native: NativeEndpoints
    pooling: PoolingEndpoints
    streams: StreamEndpoints
    status: StatusEndpoints
    usage: UsageEndpoint


class Route(NamedTuple):
    """An operation, and who answers it."""

    operation: Operation
    handler: Handler


def routes(endpoints: Endpoints, *, version: str, has_keys: bool) -> list[Route]:
    """All routes; the last one serves the document about them."""
    table = [
        *_generating(endpoints),
        *_pooling(endpoints.pooling),
        *_keeping(endpoints),
        *_telling(endpoints),
    ]
    own = Operation("GET", OPENAPI_PATH, "this document", asks=False)
    document = openapi_document(
        [*(route.operation for route in table), own],
        version=version,
        has_keys=has_keys,
        open_paths=OPEN_TARGETS,
    )

    async def openapi(_: web.Request) -> web.Response:
        return json_response(document)

    return [*table, Route(own, openapi)]


def add_routes(router: web.UrlDispatcher, table: Iterable[Route]) -> None:
    """Have a router serve them. ``HEAD`` is answered where nothing can be streamed."""
    for operation, handler in table:
        if operation.method == "GET":
            router.add_get(operation.path, handler, allow_head=not operation.streams)
        else:
            router.add_route(operation.method, operation.path, handler)


def _generating(endpoints: Endpoints) -> list[Route]:
    generation, native = endpoints.generation, endpoints.native
    return [
        Route(
            Operation(
                "POST",
                "/v1/chat/completions",
                "answer a conversation",
                ChatFields,
                ("messages",),
                streams=True,
            ),
            generation.chat_completions,
        ),
        Route(
            Operation(
                "POST",
                "/v1/completions",
                "go on with a text",
                CompletionFields,
                ("prompt",),
                streams=True,
            ),
            generation.completions,
        ),
        Route(
            Operation(
                "POST",
                "/v1/messages",
                "answer a conversation, in Anthropic's form",
                MessagesFields,
                ("messages", "max_tokens"),
                streams=True,
            ),
            endpoints.messages.create,
        ),
        Route(
            Operation(
                "POST",
                "/v1/messages/count_tokens",
                "count a conversation's tokens",
                MessagesFields,
                ("messages",),
                asks=False,
            ),
            endpoints.messages.count_tokens,
        ),
        Route(
            Operation(
                "POST", "/v1/generate", "generate, with measures", GenerateFields, streams=True
            ),
            native.generate,
        ),
        Route(
            Operation("POST", "/v1/batch", "generate many at once", BatchFields, ("requests",)),
            native.batch,
        ),
    ]


def _pooling(pooling: PoolingEndpoints) -> list[Route]:
    return [
        Route(
            Operation(
                "POST", "/v1/embeddings", "turn texts into vectors", EmbeddingFields, ("input",)
            ),
            pooling.embeddings,
        ),
        Route(
            Operation("POST", "/v1/score", "how well texts fit each other", ScoreFields),
            pooling.score,
        ),
        Route(
            Operation(
                "POST",
                "/v1/rerank",
                "order documents by how well they fit a query",
                RerankFields,
                ("query", "documents"),
            ),
            pooling.rerank,
        ),
    ]


def _keeping(endpoints: Endpoints) -> list[Route]:
    responses = endpoints.responses
    kept = "/v1/responses/{id}"
    return [
        Route(
            Operation(
                "POST",
                "/v1/responses",
                "make a response, and keep it",
                ResponseFields,
                ("input",),
                streams=True,
            ),
            responses.create,
        ),
        Route(
            Operation(
                "GET",
                kept,
                "a response as it is now, or its events",
                query=("stream", "starting_after"),
                streams=True,
            ),
            responses.retrieve,
        ),
        Route(Operation("DELETE", kept, "forget a response"), responses.delete),
        Route(Operation("POST", f"{kept}/cancel", "end a response"), responses.cancel),
        Route(
            Operation(
                "GET",
                "/v1/streams/{id}",
                "go on with a stream",
                query=("starting_after",),
                streams=True,
            ),
            endpoints.streams.stream,
        ),
    ]


def _telling(endpoints: Endpoints) -> list[Route]:
    native, status, tokenization = endpoints.native, endpoints.status, endpoints.tokenization
    return [
        Route(
            Operation("POST", "/tokenize", "text to tokens", TokenizeFields, asks=False),
            tokenization.tokenize,
        ),
        Route(
            Operation(
                "POST",
                "/detokenize",
                "tokens to text",
                DetokenizeFields,
                ("tokens",),
                asks=False,
            ),
            tokenization.detokenize,
        ),
        Route(Operation("GET", "/tokenizer_info", "the tokenizer", asks=False), tokenization.info),
        Route(Operation("GET", "/v1/health", "whether requests are served"), native.health),
        Route(Operation("GET", "/v1/metrics", "how the latest requests fared"), native.metrics),
        Route(
            Operation("GET", "/v1/usage", "what the caller has used", query=("days",)),
            endpoints.usage.usage,
        ),
        Route(Operation("GET", "/v1/requests/{id}", "what became of a call"), native.request),
        Route(Operation("GET", "/v1/models", "the models", asks=False), status.models),
        Route(Operation("GET", "/v1/models/{model:.+}", "a model", asks=False), status.model),
        Route(Operation("GET", "/health", "whether requests are served"), status.ready),
        Route(Operation("GET", "/ready", "whether requests are served"), status.ready),
        Route(Operation("GET", "/live", "whether this process runs", asks=False), status.live),
        Route(Operation("GET", "/version", "the server's version", asks=False), status.version),
    ]
