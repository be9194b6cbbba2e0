"""The OpenAPI document of what is served, made from the very types that bodies are read into."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple

import msgspec

VERSION: Final = "3.1.0"
_PARAMETER: Final = re.compile(r"\{(\w+)(?::[^}]*)?\}")
_REF: Final = "#/components/schemas/{name}"
_SECURITY_SCHEMES: Final[dict[str, Any]] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_FIELDS_OF_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    },
}
_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": _FIELDS_OF_ERROR},
}
_ANTHROPIC_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": _FIELDS_OF_ERROR,
        "request_id": {"type": ["string", "null"]},
    },
}
_BAD_INPUT: Final = {400: "the input is wrong"}
_BAD_BODY: Final = {413: "the body is too large"}
_NO_KEY: Final = {401: "no key, or none that is valid here"}
_NO_SUCH: Final = {404: "there is no such thing, or it is another's"}
_FAILED: Final = {500: "it could not go on"}
_AWAY: Final = {503: "not now: come back after the time in Retry-After"}
_REFUSALS: Final = {
    422: "the same Idempotency-Key came with another body",
    429: "the caller's own limit: come back after the time in Retry-After",
    500: "engines died of this request; the same will fare no better",
    **_AWAY,
    504: "not ready by the deadline",
}


class Operation(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    """As the router has it; what a parameter must look like is left out of the document."""
    summary: str
    body: type | None = None
    """What the JSON of the request is read into."""
    required: tuple[str, ...] = ()
    """Fields of the body that must be there."""
    query: tuple[str, ...] = ()
    streams: bool = False
    """Whether the answer may be a stream of events."""
    asks: bool = True
    """Whether anybody has to be asked for the answer, who may be away."""


def openapi_document(
    operations: Sequence[Operation],
    *,
    version: str,
    has_keys: bool = False,
    open_paths: Collection[str] = (),
) -> dict[str, Any]:
    """The document.

    Args:
        operations: All that is served.
        version: Of the server.
        has_keys: Whether calls need a key.
        open_paths: Those that need none all the same.
    """
    bodies = [operation.body for operation in operations if operation.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template=_REF)
    schema_of = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = _PARAMETER.sub(r"{\1}", operation.path)
        schema = None if operation.body is None else schema_of[operation.body]
        is_guarded = has_keys and path not in open_paths
        described = _describe(operation, schema, is_guarded=is_guarded)
        if has_keys and not is_guarded:
            described["security"] = []
        paths.setdefault(path, {})[operation.method.lower()] = described
    errors = {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    document: dict[str, Any] = {
        "openapi": VERSION,
        "info": {"title": "Understudy", "version": version},
        "paths": paths,
        "components": {"schemas": {**components, **errors}},
    }
    if has_keys:
        document["components"]["securitySchemes"] = _SECURITY_SCHEMES
        document["security"] = [{name: []} for name in _SECURITY_SCHEMES]
    return document


def _describe(
    operation: Operation, schema: dict[str, Any] | None, *, is_guarded: bool
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    form = "AnthropicError" if operation.path.startswith("/v1/messages") else "Error"
    error = {"application/json": {"schema": {"$ref": _REF.format(name=form)}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "the answer", "content": content},
            **{
                str(status): {"description": description, "content": error}
                for status, description in sorted(_errors(operation, is_guarded).items())
            },
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(operation.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}
        for name in operation.query
    ]
    if parameters:
        described["parameters"] = parameters
    if schema is not None:
        if operation.required:
            schema = {"allOf": [schema, {"required": list(operation.required)}]}
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return described


def _errors(operation: Operation, is_guarded: bool) -> dict[int, str]:
    """What may be answered instead, by status."""
    has_path_parameter = bool(_PARAMETER.search(operation.path))
    return {
        **(_NO_KEY if is_guarded else {}),
        **(_BAD_INPUT if operation.method == "POST" or operation.query else {}),
        **(_BAD_BODY if operation.body is not None else {}),
        **(_NO_SUCH if operation.body is not None or has_path_parameter else {}),
        **(_FAILED if operation.streams else {}),
        **(_REFUSALS if operation.body is not None and operation.asks else {}),
        **(_AWAY if operation.asks else {}),
    }
