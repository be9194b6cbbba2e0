"""The OpenAPI document of what is served, made from the very types that bodies are read into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

VERSION: Final = "3.1.0"
_PARAMETER: Final = re.compile(r"\{(\w+)(?::[^}]*)?\}")
_REF: Final = "#/components/schemas/{name}"
_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
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


def openapi_document(operations: Sequence[Operation], *, version: str) -> dict[str, Any]:
    """The document.

    Args:
        operations: All that is served.
        version: Of the server.
    """
    bodies = [operation.body for operation in operations if operation.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template=_REF)
    schema_of = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = _PARAMETER.sub(r"{\1}", operation.path)
        schema = None if operation.body is None else schema_of[operation.body]
        described = _describe(operation, schema)
        paths.setdefault(path, {})[operation.method.lower()] = described
    return {
        "openapi": VERSION,
        "info": {"title": "Understudy", "version": version},
        "paths": paths,
        "components": {"schemas": {**components, "Error": _ERROR}},
    }


def _describe(operation: Operation, schema: dict[str, Any] | None) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "the answer", "content": content},
            "default": {"description": "an error", "content": error},
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
