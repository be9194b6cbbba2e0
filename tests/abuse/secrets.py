"""Calls that hold secrets wherever a call can hold anything, each secret its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple
from uuid import uuid4

MODEL: Final = "understudy-demo"
Secret = Callable[[str], str]


class Secrets:
    """Secrets by the places in which they were put."""

    def __init__(self) -> None:
        self.by_place: dict[str, str] = {}

    def __call__(self, place: str) -> str:
        """A new secret for a place: short, and nowhere else in the world."""
        assert place not in self.by_place
        secret = self.by_place[place] = f"zq{uuid4().hex[:14]}"
        return secret

    def found_in(self, text: str | bytes) -> list[str]:
        """The places whose secrets are in a text."""
        data = text.encode("utf-8", "replace") if isinstance(text, str) else text
        data = data.lower()
        return [place for place, secret in self.by_place.items() if secret.encode() in data]


class SecretCall(NamedTuple):
    """A call, and what it is answered with."""

    path: str
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    status: int = 200
    has_key: bool = True
    method: str = "POST"


def calls(secret: Secret) -> Iterator[SecretCall]:
    """Calls of every route."""
    yield from _conversations(secret)
    yield from _answers_kept(secret)
    yield from _texts(secret)
    yield from _forms(secret)
    yield from _mistakes(secret)
    yield from _heads(secret)


def _post(path: str, status: int = 200, **fields: Any) -> SecretCall:
    return SecretCall(path, json.dumps({"model": MODEL, **fields}).encode(), status=status)


def _tool(secret: Secret, where: str) -> dict[str, Any]:
    properties = {
        secret(f"{where} tool property"): {"enum": [secret(f"{where} tool enum")]},
        "b": {"type": "string", "description": secret(f"{where} tool property description")},
    }
    return {
        "name": secret(f"{where} tool name"),
        "description": secret(f"{where} tool description"),
        "parameters": {"type": "object", "properties": properties},
    }


def _conversations(secret: Secret) -> Iterator[SecretCall]:
    call = {"name": secret("chat called name"), "arguments": json.dumps({"a": secret("chat args")})}
    call_id = secret("chat call id")
    for stream in (False, True):
        where = f"chat {stream}"
        strange: dict[str, Any] = {
            secret(f"{where} strange field"): secret(f"{where} strange value")
        }
        yield _post(
            "/v1/chat/completions",
            stream=stream,
            max_tokens=3,
            messages=[
                {"role": "system", "content": secret(f"{where} system")},
                {
                    "role": "user",
                    "content": secret(f"{where} user"),
                    "name": secret(f"{where} name"),
                },
                {
                    "role": "assistant",
                    "content": secret(f"{where} assistant"),
                    "tool_calls": [{"id": call_id, "type": "function", "function": call}],
                },
                {"role": "tool", "tool_call_id": call_id, "content": secret(f"{where} result")},
                {"role": "user", "content": [{"type": "text", "text": secret(f"{where} part")}]},
            ],
            tools=[{"type": "function", "function": _tool(secret, where)}],
            user=secret(f"{where} user field"),
            metadata={secret(f"{where} metadata key"): secret(f"{where} metadata")},
            safety_identifier=secret(f"{where} safety identifier"),
            prompt_cache_key=secret(f"{where} prompt cache key"),
            cache_salt=secret(f"{where} cache salt"),
            stop=[secret(f"{where} stop")],
            chat_template_kwargs={secret(f"{where} kwarg"): secret(f"{where} kwarg value")},
            **strange,
        )


def _answers_kept(secret: Secret) -> Iterator[SecretCall]:
    yield _post(
        "/v1/messages",
        max_tokens=3,
        system=secret("messages system"),
        messages=[
            {"role": "user", "content": secret("messages user")},
            {"role": "assistant", "content": [{"type": "text", "text": secret("messages said")}]},
            {"role": "user", "content": [{"type": "text", "text": secret("messages part")}]},
        ],
        stop_sequences=[secret("messages stop")],
        metadata={"user_id": secret("messages user id")},
    )
    counted = [{"role": "user", "content": secret("counted")}]
    yield _post("/v1/messages/count_tokens", messages=counted)
    for background in (False, True):
        where = f"responses {background}"
        tool = _tool(secret, where)
        yield _post(
            "/v1/responses",
            background=background,
            max_output_tokens=3,
            instructions=secret(f"{where} instructions"),
            input=[
                {"role": "user", "content": secret(f"{where} input")},
                {
                    "type": "function_call",
                    "call_id": "c",
                    "name": "f",
                    "arguments": json.dumps({"a": secret(f"{where} arguments")}),
                },
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": secret(f"{where} output"),
                },
            ],
            tools=[{"type": "function", **tool}],
            metadata={secret(f"{where} metadata key"): secret(f"{where} metadata")},
        )


def _texts(secret: Secret) -> Iterator[SecretCall]:
    yield _post("/v1/completions", prompt=secret("completions prompt"), max_tokens=3, logprobs=2)
    yield _post("/v1/completions", prompt=secret("echoed prompt"), max_tokens=2, echo=True)
    yield _post("/v1/generate", prompt=secret("generate prompt"), max_tokens=3)
    yield _post("/v1/generate", prompt=secret("generate streamed"), max_tokens=3, stream=True)
    requests = [{"prompt": secret("batch prompt"), "max_tokens": 2, "stop": secret("batch stop")}]
    yield _post("/v1/batch", requests=requests)
    yield _post("/tokenize", prompt=secret("tokenize prompt"), return_token_strs=True)
    messages = [{"role": "user", "content": secret("tokenize message")}]
    yield _post("/tokenize", messages=messages)


def _forms(secret: Secret) -> Iterator[SecretCall]:
    schema = {
        "type": "object",
        "title": secret("schema title"),
        "properties": {secret("schema key"): {"enum": [secret("schema enum")]}},
    }
    wanted: tuple[dict[str, Any], ...] = (
        {"choice": [secret("output of a choice")]},
        {"regex": secret("output of a regex")},
        {"grammar": f'start: "{secret("output of a grammar")}"'},
        {"json": {"const": secret("output of a schema")}},
    )
    for one in wanted:
        yield _post("/v1/completions", prompt="x", max_tokens=40, structured_outputs=one)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    hello = [{"role": "user", "content": "hello"}]
    yield _post("/v1/chat/completions", messages=hello, max_tokens=5, response_format=form)
    wrong: tuple[dict[str, Any], ...] = (
        {"regex": f"({secret('bad regex')}"},
        {"regex": f"(?={secret('lookahead')})"},
        {"grammar": f"start: {secret('bad grammar')}"},
        {"grammar": f'start: "{secret("open grammar")}'},
        {"json": {"type": secret("bad schema type")}},
        {"json": {"$ref": f"http://127.0.0.1/{secret('remote reference')}"}},
        {"json": {"type": "string", "pattern": f"[{secret('bad pattern')}"}},
        {"json": "{" + secret("schema that is no JSON")},
    )
    for one in wrong:
        yield _post("/v1/completions", 400, prompt="x", max_tokens=5, structured_outputs=one)


def _mistakes(secret: Secret) -> Iterator[SecretCall]:
    chat, text = "/v1/chat/completions", "/v1/completions"
    hello = [{"role": "user", "content": "hello"}]
    yield _post(chat, 400, messages=[{"role": secret("bad role"), "content": "x"}])
    yield _post(chat, 400, messages=[{"role": "user", "content": [{"type": secret("bad part")}]}])
    yield _post(chat, 400, messages=hello, temperature=secret("bad number"))
    yield _post(chat, 400, messages=hello, tool_choice=secret("bad choice"))
    yield _post(chat, 400, messages=hello, chat_template=secret("template"))
    yield _post(chat, 400, messages=hello, guided_json=secret("guided"))
    yield _post(text, 400, prompt="x", suffix=secret("suffix"))
    yield _post(text, 400, prompt="x", logit_bias={secret("bias"): 1})
    yield _post(text, 400, prompt="x", stop=[secret("long stop") * 40])
    yield _post(text, 400, prompt=secret("long prompt") * 20_000)
    yield _post(text, 404, prompt="x", model=secret("model"))
    yield _post("/v1/responses", 404, input="x", previous_response_id=secret("earlier"))
    yield _post("/v1/responses", 400, input="x", truncation=secret("truncation"))
    yield _post("/v1/messages", 400, messages=hello, max_tokens=secret("max_tokens"))
    yield _post("/detokenize", 400, tokens=[secret("token")])
    for path in (chat, text, "/v1/responses", "/v1/messages", "/v1/generate", "/tokenize"):
        yield SecretCall(path, f'{{"a": "{secret(f"broken {path}")}'.encode(), status=400)
    file = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n--x--\r\n'
        % (secret("file name").encode(), secret("file").encode())
    )
    form = (("Content-Type", "multipart/form-data; boundary=x"),)
    yield SecretCall(text, file, form, status=400)


def _heads(secret: Secret) -> Iterator[SecretCall]:
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1}).encode()
    path = "/v1/completions"
    names = ("X-Request-Id", "Cookie", "User-Agent", "Referer", "traceparent", "X-Forwarded-For")
    for name in (*names, "Idempotency-Key", "Last-Event-ID", "Origin", "X-Strange"):
        yield SecretCall(path, body, ((name, secret(name)),))
    yield SecretCall(path, body, ((secret("name of a header"), "x"),))
    yield SecretCall(path, body, (("Content-Type", f"text/{secret('type')}"),), status=400)
    yield SecretCall(path, body, (("Content-Encoding", secret("encoding")),), status=400)
    yield SecretCall(path, body, (("X-Request-Deadline-Ms", secret("deadline")),), status=400)
    yield SecretCall(path, body, (("Expect", secret("expectation")),), status=417)
    for head in ("Authorization", "x-api-key"):
        value = f"Bearer {secret(head)}" if head == "Authorization" else secret(head)
        yield SecretCall(path, body, ((head, value),), status=401, has_key=False)
    get = SecretCall("", None, status=404, method="GET")
    for start in ("/", "/v1/models/", "/v1/streams/", "/v1/requests/", "/v1/responses/"):
        yield get._replace(path=start + secret(f"path {start}"))
    yield get._replace(path=f"/v1/usage?days={secret('days')}", status=400)
    yield get._replace(path=f"/v1/models?api_key={secret('key in a query')}", status=200)
    yield get._replace(path="/v1/models", method=secret("method").upper(), status=400)
    yield get._replace(path="/v1/models", headers=(("A B", secret("no header")),), status=400)
