"""What must bounce: each case is a 4xx with an error object, and reaches no engine.

One server takes all of it, while a stream goes on beside it to its golden end.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import pytest_asyncio

from tests.http_harness import CHAT, COMPLETIONS, HELLO, Harness, error_of, serving, text_of
from tests.tiny_models import write_model
from understudy.actors.http_answers import HttpLimits

BODY_BYTES_MAX: Final = 1 << 20
VALID: Final[dict[str, dict[str, Any]]] = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
}


class Case(NamedTuple):
    """A call that must bounce."""

    name: str
    path: str
    body: bytes
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)


NOT_JSON: Final = {
    "empty": b"",
    "blank": b"  \n",
    "null": b"null",
    "array": b"[]",
    "number": b"1",
    "string": b'"x"',
    "true": b"true",
    "open": b"{",
    "closed": b"}",
    "empty object": b"{}",
    "bare key": b'{prompt: "a"}',
    "single quotes": b"{'prompt': 'a'}",
    "trailing comma": b'{"prompt": "a",}',
    "two objects": b'{"prompt": "a"}{"prompt": "b"}',
    "comment": b'{"prompt": "a" /* b */}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "NUL behind": b'{"prompt": "a"}\0',
    "NUL in a string": b'{"prompt": "a\0"}',
    "raw newline in a string": b'{"prompt": "a\nb"}',
    "deep arrays": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "deep and closed": b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "surrogate as UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "lone high surrogate": b'{"prompt": "\\ud800"}',
    "lone low surrogate": b'{"prompt": "\\udc00 x"}',
    "surrogates the wrong way round": b'{"prompt": "\\udc00\\ud800"}',
    "bad escape": b'{"prompt": "\\x41"}',
    "cut escape": b'{"prompt": "\\u12"}',
    "5,000 digits": b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    "5,000 digits behind the point": b'{"prompt": "a", "max_tokens": 1.' + b"9" * 5000 + b"}",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "minus Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "1e400": b'{"prompt": "a", "temperature": 1e400}',
    "leading zero": b'{"prompt": "a", "max_tokens": 01}',
    "plus sign": b'{"prompt": "a", "max_tokens": +1}',
    "hexadecimal": b'{"prompt": "a", "max_tokens": 0x10}',
    "duplicate key": b'{"prompt": "a", "prompt": "b"}',
    "duplicate key, escaped": b'{"prompt": "a", "pr\\u006fmpt": "b"}',
    "duplicate key, nested": b'{"prompt": "a", "logit_bias": {"1": 0, "1": 1}}',
    "many fields": json.dumps({f"f{number}": 1 for number in range(400)}).encode(),
    "many strings": json.dumps({"prompt": "a", "stop": ["x"] * 70_000}).encode(),
    "many containers": json.dumps({"prompt": "a", "x": [[]] * 20_000}).encode(),
    "too large": b'{"prompt": "' + b"a" * (BODY_BYTES_MAX + 1) + b'"}',
}

FLOATS: Final = {
    "temperature": (-0.01, 2.01, 1e308, -1e308),
    "top_p": (-0.01, 0, 1.01, 1e308),
    "min_p": (-0.01, 1.01, 1e308),
    "repetition_penalty": (0, -1, 10.1, 1e308),
    "presence_penalty": (-2.01, 2.01, 1e308),
    "frequency_penalty": (-2.01, 2.01, -1e308),
}
INTEGERS: Final = {
    "n": (0, -1, 17, 10**9, 2**63, 2**64),
    "best_of": (0, -1, 2, 10**9),
    "max_tokens": (-1, 2**63, 2**64, 10**6),
    "min_tokens": (-1, 10**9, 2**64),
    "top_k": (-2, 2**64, 2**70),
    "seed": (2**64, -(2**63) - 1, 2**70),
    "priority": (2**31, -(2**31) - 1, 2**64),
    "deadline_ms": (0, -1, 86_400_001, 2**64),
}
NO_NUMBERS: Final[tuple[Any, ...]] = ("1", "", True, False, [], [1], {}, {"a": 1})
FIELDS: Final[dict[str, tuple[Any, ...]]] = {
    "model": ("other", "../etc", "", 1, [], "x" * 10_000),
    "stream": ("true", 1, 0, [], {}),
    "stream_options": ({}, {"include_usage": True}, [], "x", True),
    "stop": ([""], "", ["a"] * 9, "x" * 257, "x" * (1 << 19), [1], {"a": 1}, [["a"]], [None]),
    "stop_token_ids": ([-1], [10**6], [2**40], [1.5], ["1"], [True], [0] * 65, "1", {}),
    "logit_bias": (
        *({"-1": 0}, {"999999": 0}, {"x": 0}, {"1.5": 0}, {" 1": 0}, {"\u0661": 0}, {"": 0}),
        *({"1": 101}, {"1": -101}, {"1": "0"}, {"1": True}, {"1": None}, {"01": 0, "1": 0}),
        *({str(number): 0 for number in range(1025)}, [], [1], "x", {"1": [0]}),
    ),
    "cache_salt": ("", "x" * 257, 1, []),
    "ignore_eos": ("true", 1, []),
    "include_stop_str_in_output": ("x", 1),
    "use_beam_search": (True,),
    "suffix": ("tail",),
    "chat_template": ("{{ 1 }}",),
    "logits_processors": (["x"],),
    "prompt_embeds": ("AAAA",),
}
PROMPTS: Final[tuple[Any, ...]] = (
    *(1, 1.5, True, {}, [], [[]], [1, "a"], ["a", 1], [[1], "a"], [["a"]], [[[1]]], [None]),
    *([-1], [10**6], [2**40], [2**64], [1.5], [True], [[-1]], [[1], [10**6]], [1] * 100_000),
    *("a" * 500_000, ["a"] * 200, [[1]] * 200, "e\u0301" * 100_000, "\0" * 50_000),
)
MESSAGES: Final[tuple[Any, ...]] = (
    *("x", 1, {}, [], [1], ["x"], [[]], [None], [{}], [{"role": "user"}], [{"content": "x"}]),
    *([{"role": 1, "content": "x"}], [{"role": "", "content": "x"}]),
    *([{"role": "root", "content": "x"}], [{"role": "USER", "content": "x"}]),
    *([{"role": "user", "content": 1}], [{"role": "user", "content": {}}]),
    *([{"role": "user", "content": True}], [{"role": "user", "content": [1]}]),
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
    *([{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{}]}]),
    *([{"role": "user", "content": "a" * 500_000}], [{"role": "user", "content": "x"}] * 10_000),
)
HEADERS: Final = (
    *(("Content-Type", "text/plain"), ("Content-Type", "application/x-www-form-urlencoded")),
    *(("Content-Type", "multipart/form-data; boundary=x"), ("Content-Type", "application/xml")),
    *(("Content-Encoding", "gzip"), ("Content-Encoding", "br"), ("Content-Encoding", "deflate")),
    *(("Idempotency-Key", ""), ("Idempotency-Key", "x" * 257), ("Idempotency-Key", "a\tb")),
    *(("X-Request-Deadline-Ms", "0"), ("X-Request-Deadline-Ms", "x")),
    *(("x-llm-d-slo-ttft-ms", "-1"), ("x-llm-d-slo-ttft-ms", "9" * 50)),
)
PATHS: Final = (
    *("/", "/v1", "/v1/", "/v2/completions", "/v1/completions/", "/V1/models"),
    *("/v1/models/other", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/admin"),
    *("/.git/config", "/reset_prefix_cache", "/v1/../admin", "/etc/passwd", "/%2e%2e/etc/passwd"),
    *(
        "/v1/streams/",
        "/v1/streams/x",
        "/v1/streams/cmpl-",
        "/v1/streams/cmpl-0",
        "/v1/usage?days=x",
    ),
    *("/v1/streams/cmpl-ffffffffffffffff", "/v1/streams/" + "9" * 3000, "/v1/streams/%00"),
    *("/v1/streams/cmpl-0000000000000001?starting_after=-1", "/v1/streams/-1"),
    *("/v1/streams/cmpl-0000000000000001?starting_after=999999999999999999999",),
)
METHODS: Final = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND")


def cases() -> Iterator[Case]:
    for name, body in NOT_JSON.items():
        for path in VALID:
            yield Case(f"JSON: {name}", path, body)
    for path, valid in VALID.items():
        wrong = {name: (*values, *NO_NUMBERS) for name, values in (FLOATS | INTEGERS).items()}
        for name, values in {**wrong, **FIELDS}.items():
            if name == "max_tokens" and path == CHAT:
                continue  # the newer name of the field has the same rules there
            for value in values:
                given = {**valid, name: value}
                if name == "stream_options" and value not in ([], "x", True):
                    given["stream"] = False
                if value is None or given == valid:
                    continue
                yield Case(f"{name}={value!r:.40}", path, json.dumps(given).encode())
        for header in HEADERS:
            headers = (("Content-Type", "application/json"), header)
            yield Case(
                f"{header!r:.50}",
                path,
                json.dumps(valid).encode(),
                headers=headers[header[0] == "Content-Type" :],
            )
        for method in METHODS:
            yield Case(f"{method} {path}", path, b"", method)
    for prompt in PROMPTS:
        body = json.dumps({"prompt": prompt, "max_tokens": 1}).encode()
        yield Case(f"prompt={prompt!r:.40}", COMPLETIONS, body)
    for messages in MESSAGES:
        yield Case(f"messages={messages!r:.60}", CHAT, json.dumps({"messages": messages}).encode())
    for logprobs in (-1, 21, 10**6, 2**64, 1.5, "1", "all"):
        body = json.dumps({"prompt": "a", "logprobs": logprobs}).encode()
        yield Case(f"logprobs={logprobs!r}", COMPLETIONS, body)
    for top in (-1, 21, 10**6, 1.5, "1", True):
        body = json.dumps({"messages": HELLO, "logprobs": True, "top_logprobs": top}).encode()
        yield Case(f"top_logprobs={top!r}", CHAT, body)
    for path in PATHS:
        yield Case(f"GET {path!r:.60}", path, b"", "GET", ())


CASES: Final = list(cases())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def harness(directory: Path) -> AsyncIterator[Harness]:
    """A server that is in the middle of a stream."""
    limits = HttpLimits(body_bytes_max=BODY_BYTES_MAX, shutdown_timeout_s=0.1)
    async with serving(directory, limits=limits) as harness:
        body = {"prompt": "a", "max_tokens": 9, "stream": True}
        beside = asyncio.ensure_future(_stream_beside(harness, body))
        asked = await harness.submitted()
        harness.gateway.deliver(asked, 70)
        yield harness
        assert harness.gateway.submitted == [asked], "something has got through"
        harness.gateway.deliver(asked, 71, 72)
        harness.gateway.deliver(asked, 73, finish=2)
        assert await beside == harness.served.tokenizer.decode([70, 71, 72, 73])


async def _stream_beside(harness: Harness, body: dict[str, Any]) -> str:
    return text_of(await harness.stream(COMPLETIONS, body))


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 400


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path[:30]}: {case.name}")
async def test_it_bounces(harness: Harness, case: Case) -> None:
    async with harness.session.request(
        case.method, case.path, data=io.BytesIO(case.body), headers=case.headers
    ) as response:
        text = await response.text()
        assert 400 <= response.status < 500, (response.status, text)
        assert len(text) < 2000, "an error is no echo"
        if case.method != "HEAD":
            error_of(json.loads(text))
    assert len(harness.gateway.submitted) == 1
