"""The OpenAPI document says what is served: no path less, none more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http_harness import HELLO, Harness, serving
from tests.tiny_models import write_model
from understudy.protocol.openai.generate import GenerateFields
from understudy.protocol.openai.openapi import Operation, openapi_document
from understudy.runtime.keys import KeyRing, make_key


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path)


async def document(harness: Harness) -> Any:
    async with harness.session.get("/openapi.json") as response:
        assert response.status == 200
        return await response.json()


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for child in value.values():
            yield from references(child)
    elif isinstance(value, list):
        for child in value:
            yield from references(child)


async def test_the_document_and_the_router_know_the_same(directory: Path) -> None:
    async with serving(directory) as harness:
        told = await document(harness)
        app = harness.runner.app
        assert app is not None
        served = set()
        for route in app.router.routes():
            assert route.resource is not None
            path = route.resource.canonical
            if route.method != "HEAD":
                served.add((path, route.method.lower()))
    described = {(path, method) for path, one in told["paths"].items() for method in one}
    assert described == served
    assert len(served) > 20


async def test_whatever_is_referred_to_is_there(directory: Path) -> None:
    async with serving(directory) as harness:
        told = await document(harness)
    known = {f"#/components/schemas/{name}" for name in told["components"]["schemas"]}
    found = set(references(told))
    assert len(found) > 10
    assert found <= known


async def test_what_a_body_must_have_is_refused_if_it_is_missing(directory: Path) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": HELLO},
        "/v1/completions": {"prompt": "x"},
        "/v1/messages": {"messages": HELLO, "max_tokens": 5},
        "/v1/messages/count_tokens": {"messages": HELLO},
        "/v1/batch": {"requests": [{"prompt": "x"}]},
        "/v1/embeddings": {"input": "x"},
        "/v1/rerank": {"query": "x", "documents": ["x"]},
        "/v1/responses": {"input": "x"},
        "/detokenize": {"tokens": [1]},
    }
    async with serving(directory) as harness:
        told = await document(harness)
        required = {
            path: one["post"]["requestBody"]["content"]["application/json"]["schema"]["allOf"][1]
            for path, one in told["paths"].items()
            if "allOf" in json.dumps(one.get("post", {}))
        }
        assert {path: {*one["required"]} for path, one in required.items()} == {
            path: {*body} for path, body in bodies.items()
        }
        for path, body in bodies.items():
            for name in body:
                rest = {key: value for key, value in body.items() if key != name}
                answer = await harness.answer(path, rest, status=400)
                assert answer["error"]["param"] == name


def test_a_parameters_pattern_is_left_out() -> None:
    operation = Operation("GET", "/v1/things/{name:.+}", "a thing", query=("q",))
    [described] = openapi_document([operation], version="1")["paths"].items()
    path, methods = described
    assert path == "/v1/things/{name}"
    assert [one["name"] for one in methods["get"]["parameters"]] == ["name", "q"]


def test_a_body_is_described_by_its_type() -> None:
    operation = Operation("POST", "/x", "x", GenerateFields, ("prompt",), streams=True)
    told = openapi_document([operation], version="1")
    fields = told["components"]["schemas"]["GenerateFields"]["properties"]
    assert {"prompt", "token_ids", "temperature", "seed"} <= fields.keys()
    answer = told["paths"]["/x"]["post"]["responses"]["200"]
    assert {*answer["content"]} == {"application/json", "text/event-stream"}


async def test_the_document_says_which_calls_need_a_key(directory: Path) -> None:
    new = make_key("acme", created=0)
    ring = KeyRing([new.record])
    async with serving(directory, find_key=ring.find) as harness:
        async with harness.session.get("/openapi.json", headers={"x-api-key": new.key}) as response:
            told = await response.json()
        schemes = told["components"]["securitySchemes"]
        assert {*schemes} == {name for one in told["security"] for name in one}
        for path, methods in told["paths"].items():
            for method, one in methods.items():
                is_open = one.get("security", told["security"]) == []
                assert ("401" in one["responses"]) != is_open
                async with harness.session.request(method, path) as response:
                    assert (response.status == 401) != is_open, (method, path)
    async with serving(directory) as harness:
        told = await document(harness)
        assert "security" not in told
        assert "securitySchemes" not in told["components"]
        assert "401" not in told["paths"]["/v1/models"]["get"]["responses"]


async def test_every_refusal_is_described(directory: Path) -> None:
    async with serving(directory) as harness:
        told = await document(harness)
        for path, methods in told["paths"].items():
            for method, one in methods.items():
                async with harness.session.request(method, path, data=b"x") as response:
                    assert str(response.status) in one["responses"], (method, path)
                    content = one["responses"][str(response.status)]["content"]
                    assert response.content_type in content
