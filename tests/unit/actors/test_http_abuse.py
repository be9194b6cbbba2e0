"""Bodies that are meant to do harm, at every path that takes one: refused, and nothing breaks."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.http_harness import HELLO, Harness, saying_text, serving
from tests.tiny_models import write_model
from understudy.actors.http_choices import ChoiceOutput
from understudy.protocol.anthropic.messages import MessagesFields
from understudy.protocol.openai.chat import ChatFields
from understudy.protocol.openai.completions import CompletionFields
from understudy.protocol.openai.generate import BatchFields, GenerateFields
from understudy.protocol.openai.responses import ResponseFields
from understudy.protocol.openai.tokenization import DetokenizeFields, TokenizeFields
from understudy.protocol.request import TokenRow

FUNCTION: Final = {"type": "function", "function": {"name": "f"}}
PATHS: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "/v1/chat/completions": (ChatFields, {"messages": HELLO, "tools": [FUNCTION]}),
    "/v1/completions": (CompletionFields, {"prompt": "x"}),
    "/v1/messages": (MessagesFields, {"messages": HELLO, "max_tokens": 5}),
    "/v1/messages/count_tokens": (MessagesFields, {"messages": HELLO}),
    "/v1/responses": (ResponseFields, {"input": "x"}),
    "/v1/generate": (GenerateFields, {"prompt": "x"}),
    "/v1/batch": (BatchFields, {"requests": [{"prompt": "x"}]}),
    "/tokenize": (TokenizeFields, {"prompt": "x"}),
    "/detokenize": (DetokenizeFields, {"tokens": [5]}),
}
MALFORMED: Final[dict[str, bytes]] = {
    "empty": b"",
    "null": b"null",
    "array": b"[]",
    "deep": b"[" * 100_000,
    "deep object": b'{"input":' * 5000 + b"1" + b"}" * 5000,
    "invalid UTF-8": b'{"input": "\xff\xfe"}',
    "lone surrogate": b'{"input": "\\ud800"}',
    "NaN": b'{"temperature": NaN}',
    "1e400": b'{"temperature": 1e400}',
    "duplicate key": b'{"input": "x", "model": "a", "model": "a"}',
    "trailing": b'{"input": "x"} {}',
    "wrong model type": b'{"input": "x", "prompt": "x", "model": 3}',
}
ROUNDS: Final = 100
HOSTILE: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**64, -(2**63), 0.0, -0.0, 1e308, 1e-320),
    *("", "x", "\x00", "none", "auto", "required", "🦊" * 50, "{{ 1 }}", "../..", "0" * 300),
    *([], [[]], [None], [1], ["x"], [{}], {}, {"type": 1}, {"type": "function"}),
    {"type": "object", "properties": 5, "required": "x"},
    {"$ref": "http://example.com/schema"},
    [{"role": "user", "content": "x"}],
    [{"role": "assistant", "content": None}],
    [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}],
    [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    [{"name": "f", "input_schema": {"properties": {"a": {"type": ["string", 5]}}}}],
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path, max_position_embeddings=4096)


@pytest.fixture
async def harness(directory: Path) -> AsyncIterator[Harness]:
    script = saying_text(directory, "one two <tool_call>")
    async with serving(
        directory, script, tool_parser="hermes", reasoning_parser="qwen3"
    ) as harness:
        yield harness


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_malformed_is_refused_everywhere(harness: Harness, name: str) -> None:
    for path in PATHS:
        async with harness.post(path, raw=MALFORMED[name]) as response:
            answer = await response.json()
            assert response.status == 400, (path, answer)
            assert len(answer["error"]["message"]) < 300
    assert harness.gateway.submitted == []


def mutated(chance: random.Random, fields: list[str], plain: dict[str, Any]) -> dict[str, Any]:
    """A body with a few fields that nobody would send."""
    body = dict(plain)
    for name in chance.sample(fields, min(chance.randint(1, 3), len(fields))):
        body[name] = chance.choice(HOSTILE)
    if chance.random() < 0.3:
        body[chance.choice(fields)] = [dict(plain) if chance.random() < 0.5 else plain]
    return body


@pytest.mark.parametrize("path", PATHS)
async def test_no_field_brings_the_server_down(harness: Harness, path: str) -> None:
    kind, plain = PATHS[path]
    # Without an end that the script can say, or with nobody who waits, nothing would end here.
    endless = {"background", "ignore_eos"}
    fields = [name for name in kind.__struct_fields__ if name not in endless]
    chance = random.Random(path)
    refused = 0
    for _ in range(ROUNDS):
        body = mutated(chance, fields, plain)
        async with harness.post(path, body) as response:
            text = await response.text()
            assert response.status < 500, (body, text)
            if response.status != 200:
                refused += 1
                assert response.status in {400, 404}, (body, text)
                assert json.loads(text)["error"]["message"]
    assert refused > ROUNDS // 8
    assert harness.gateway.num_open == 0


DEEP: Final[dict[str, Callable[[int], Any]]] = {
    "array": lambda depth: nested(depth, lambda inner: [inner]),
    "object": lambda depth: nested(depth, lambda inner: {"a": inner}),
}


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize("shape", DEEP)
async def test_deep_schemas_and_arguments_are_refused_or_shown(
    harness: Harness, shape: str
) -> None:
    deep = DEEP[shape](200)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"a": deep}}}
    path = "/v1/chat/completions"
    error = await harness.error(path, {"messages": HELLO, "tools": [tool]})
    assert error["param"] == "tools[0].function.parameters"
    call = {"id": "c", "function": {"name": "f", "arguments": "[" * 100_000}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    error = await harness.error(path, {"messages": [*HELLO, turn]})
    assert error["param"] == "messages[1].tool_calls"


async def test_an_error_is_no_echo(harness: Harness) -> None:
    long = "🦊" * 20_000
    for path, body in (
        ("/v1/responses", {"input": "x", "truncation": long}),
        ("/v1/chat/completions", {"messages": [{"role": long, "content": "x"}]}),
        ("/v1/chat/completions", {"messages": HELLO, "tool_choice": long}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 1, "model": long}),
        ("/v1/completions", {"prompt": "x", "logit_bias": {long: 1}}),
    ):
        async with harness.post(path, body) as response:
            assert response.status in {400, 404}
            assert len(await response.read()) < 2000, path


async def test_what_is_no_http_is_refused_in_our_form_and_without_an_echo(
    harness: Harness,
) -> None:
    secret = "sk-" + "x" * 60
    for head in (
        f"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer {secret}\r\nA B: {secret}\r\n",
        f"get /v1/models HTTP/1.1\r\nAuthorization: {secret}\r\n",
        f"GET {secret} HTTP/1.1\r\nHost: x\r\n",
        f"GET /v1/models HTTP/1.1\r\nAuthorization: {secret}\x00\r\n",
        f"{secret * 200}\r\n",
    ):
        reader, writer = await asyncio.open_connection(harness.host, harness.port)
        writer.write(f"{head}\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert answer.split(b" ", 2)[1] == b"400", answer
        assert secret.encode() not in answer
        headers, _, body = answer.partition(b"\r\n\r\n")
        assert b"application/json" in headers
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_in_one_answer_is_the_end_of_no_other(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    advance = ChoiceOutput.advance

    def fail_sometimes(output: ChoiceOutput, row: TokenRow) -> str:
        if output.request.params.seed == 13 and row.position:
            raise ValueError("a text that the parser cannot bear")
        return advance(output, row)

    monkeypatch.setattr(ChoiceOutput, "advance", fail_sometimes)
    path = "/v1/chat/completions"
    body = {"messages": HELLO, "stream": stream}
    async with (
        harness.post(path, {**body, "seed": 13}) as failing,
        harness.post(path, {**body, "seed": 14}) as other,
    ):
        text = await failing.text()
        assert failing.status == (200 if stream else 500)
        assert '"code":"internal_error"' in text
        assert "cannot bear" not in text
        assert other.status == 200
        assert "internal_error" not in await other.text()
    await harness.cancelled()
    assert harness.gateway.num_open == 0
