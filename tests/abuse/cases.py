"""Calls that nobody should make: each drawn from a seed and its number, over all that is served.

The routes and their fields come from the document at ``/openapi.json``, so that a new route is
abused without a word here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from tests.abuse.forms import TEXTS, Forms, Schema, places

_PARAMETER: Final = "{"
_PATIENT: Final = 0.2
"""Clients who wait for the end of what they got going."""
_PATIENCE_S: Final = 0.4
_CUT_PATIENCE_S: Final = 0.05
_NAMES: Final = (
    *("resp_0000000000000001", "resp_ffffffffffffffff", "cmpl-00000000000000aa", "x", "-1", "0"),
    *("resp_", "%00", "..%2f..%2fetc%2fpasswd", "%ff", "a" * 3000, "resp_0000000000000001%0a", "*"),
    *("understudy-demo", "chatcmpl-ffffffffffffffff", "..", "%2e%2e", ";a=b", "\u00fc", "{id}"),
)
_METHODS: Final = (
    "GET",
    "PUT",
    "DELETE",
    "PATCH",
    "OPTIONS",
    "TRACE",
    "HEAD",
    "POST",
    "FOO",
    "get",
)
_JSON: Final = ("Content-Type", "application/json")
_HEADERS: Final = (
    *(("Content-Type", "text/plain"), ("Content-Type", "multipart/form-data; boundary=x")),
    *(("Content-Type", ""), ("Content-Type", "application/json; charset=utf-16"), ("Expect", "x")),
    *(("Content-Encoding", "gzip"), ("Content-Encoding", "br"), ("Accept", "text/event-stream")),
    *(("Idempotency-Key", "x" * 300), ("Idempotency-Key", ""), ("Idempotency-Key", "one")),
    *(("X-Request-Deadline-Ms", "-1"), ("X-Request-Deadline-Ms", "1"), ("Last-Event-ID", "x.1-2")),
    *(("x-llm-d-slo-ttft-ms", "nan"), ("Last-Event-ID", "-1"), ("traceparent", "00-" + "f" * 52)),
    *(("X-Request-Id", "a" * 5000), ("X-Request-Id", "\u00e9"), ("Cookie", "a=b; " * 500)),
    *(("Host", ""), ("Host", "169.254.169.254"), ("Range", "bytes=0-"), ("Upgrade", "websocket")),
    *(("Connection", "Upgrade, HTTP2-Settings"), ("Expect", "100-continue"), ("X", "y" * 9000)),
)
_QUERIES: Final = (
    *("days=0", "days=x", "days=9", "starting_after=-1", "starting_after=9" * 9, "stream=true"),
    *("stream=true&starting_after=0", "a=%00", "%", "&&&", "=", "x" * 4000, "days=1&days=2"),
)


class Case(NamedTuple):
    """What is sent, to the byte."""

    number: int
    kind: str
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    has_key: bool = True
    raw: bytes | None = None
    """Instead of all that: no HTTP, or hardly any."""
    is_whole: bool = True
    """Whether an answer is owed; what is cut short may be waited for."""
    patience_s: float = 60.0
    """The client goes away then."""

    def sent(self, key: str) -> bytes:
        """The bytes."""
        if self.raw is not None:
            return self.raw.replace(b"KEY", key.encode())
        lines = [f"{self.method} {self.target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.has_key:
            lines.append(f"Authorization: Bearer {key}")
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + self.body


class _Operation(NamedTuple):
    method: str
    path: str
    body: Schema | None
    is_open: bool


class Cases:
    """All cases of a seed.

    Args:
        document: What is served, as OpenAPI has it.
        seed: Another one gives other cases.
        only: What the paths must contain.
    """

    def __init__(self, document: Mapping[str, Any], seed: int, only: str = "") -> None:
        self._seed = seed
        self._definitions = document["components"]["schemas"]
        self._operations = [
            _Operation(method.upper(), path, _body_of(one), one.get("security") == [])
            for path, methods in document["paths"].items()
            for method, one in methods.items()
            if only in path
        ]
        self._with_body = [one for one in self._operations if one.body is not None]

    def case(self, number: int) -> Case:
        """The case of this number."""
        chance = random.Random(f"{self._seed} {number}")
        kinds: dict[str, tuple[int, Callable[[], Case]]] = {
            "plausible": (7, lambda: self._body_case(number, chance, "plausible", _leave)),
            "wrong value": (40, lambda: self._body_case(number, chance, "wrong value", _spoil)),
            "hostile text": (9, lambda: self._body_case(number, chance, "hostile text", _poison)),
            "deep": (3, lambda: self._body_case(number, chance, "deep", _deepen)),
            "long": (2, lambda: self._body_case(number, chance, "long", _lengthen)),
            "strange field": (5, lambda: self._body_case(number, chance, "strange field", _add)),
            "bytes": (12, lambda: self._corrupted(number, chance)),
            "header": (6, lambda: self._with_header(number, chance)),
            "path": (6, lambda: self._pathed(number, chance)),
            "method": (3, lambda: self._with_method(number, chance)),
            "key": (3, lambda: self._without_key(number, chance)),
            "transport": (4, lambda: self._transported(number, chance)),
        }
        weights = [weight for weight, _ in kinds.values()]
        make = chance.choices([make for _, make in kinds.values()], weights)[0]
        case = make()
        if not case.is_whole:
            return case._replace(patience_s=_CUT_PATIENCE_S)
        return case if chance.random() < _PATIENT else case._replace(patience_s=_PATIENCE_S)

    def _forms(self, chance: random.Random) -> Forms:
        return Forms(self._definitions, chance)

    def _plain(self, chance: random.Random) -> tuple[_Operation, dict[str, Any]]:
        operation = chance.choice(self._with_body or self._operations)
        if operation.body is None:
            return operation, {}
        body = self._forms(chance).plausible(operation.body)
        assert isinstance(body, dict)
        if "max_tokens" in body:
            body["max_tokens"] = chance.randint(1, 5)
        return operation, body

    def _body_case(
        self,
        number: int,
        chance: random.Random,
        kind: str,
        change: Callable[[dict[str, Any], Forms, random.Random], None],
    ) -> Case:
        operation, body = self._plain(chance)
        change(body, self._forms(chance), chance)
        encoded = json.dumps(body, ensure_ascii=chance.random() < 0.5)
        return _case(number, kind, operation, chance, encoded.encode("utf-8", "surrogatepass"))

    def _corrupted(self, number: int, chance: random.Random) -> Case:
        operation, body = self._plain(chance)
        data = bytearray(json.dumps(body).encode())
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(6):
                case 0:
                    del data[at:]
                case 1:
                    del data[at : at + chance.randint(1, 5)]
                case 2:
                    data[at:at] = chance.randbytes(chance.randint(1, 8))
                case 3 if at < len(data):
                    data[at] ^= 1 << chance.randrange(8)
                case 4:
                    data[at:at] = data[at // 2 : at]
                case _:
                    data[at:at] = chance.choice(
                        (b'"', b"\\", b"[", b"{", b"}", b"\0", b"\xed\xa0\x80")
                    )
        return _case(number, "bytes", operation, chance, bytes(data))

    def _with_header(self, number: int, chance: random.Random) -> Case:
        operation, body = self._plain(chance)
        case = _case(number, "header", operation, chance, json.dumps(body).encode())
        extra = tuple(chance.sample(_HEADERS, chance.choice((1, 1, 2, 3))))
        names = {name for name, _ in extra}
        kept = tuple(one for one in case.headers if one[0] not in names or chance.random() < 0.2)
        if chance.random() < 0.05:
            extra += (("X-Many", "x"),) * 150
        return case._replace(headers=kept + extra)

    def _pathed(self, number: int, chance: random.Random) -> Case:
        operation = chance.choice(self._operations)
        case = _case(number, "path", operation, chance, b"{}" if operation.body else b"")
        target = case.target
        match chance.randrange(6):
            case 0:
                target += "?" + chance.choice(_QUERIES)
            case 1:
                at = chance.randrange(len(target) + 1)
                target = target[:at] + chance.choice(("/", "//", "%2e", "%00", ";", "../", "\\"))
            case 2:
                target = "".join(f"%{ord(sign):02x}" for sign in target if ord(sign) < 128)
            case 3:
                target = "http://127.0.0.1" + target
            case 4:
                target = target.swapcase()
            case _:
                target = "/" + chance.choice(_NAMES) + target
        return case._replace(target=target.replace(" ", ""))

    def _with_method(self, number: int, chance: random.Random) -> Case:
        operation = chance.choice(self._operations)
        body = b"{}" if chance.random() < 0.5 else b""
        case = _case(number, "method", operation, chance, body)
        return case._replace(method=chance.choice(_METHODS))

    def _without_key(self, number: int, chance: random.Random) -> Case:
        operation = chance.choice([one for one in self._operations if not one.is_open])
        case = _case(number, "key", operation, chance, b"{}" if operation.body else b"")
        wrong = chance.choice(
            (
                (),
                (("Authorization", "Bearer wrong"),),
                (("x-api-key", "wrong"),),
                (("Authorization", "Basic eDp5"),),
                (("Authorization", "Bearer " + "x" * 3000),),
                (("Authorization", "Bearer a"), ("Authorization", "Bearer b")),
            )
        )
        return case._replace(headers=case.headers + wrong, has_key=False)

    def _transported(self, number: int, chance: random.Random) -> Case:
        operation, body = self._plain(chance)
        case = _case(number, "transport", operation, chance, json.dumps(body).encode())
        head = (
            f"{operation.method} {case.target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\n"
        )
        head += "Content-Type: application/json\r\n"
        chunked = head + "Transfer-Encoding: chunked\r\n"
        piece = b"%x\r\n%s\r\n" % (len(case.body), case.body)
        length = f"Content-Length: {len(case.body)}\r\n"
        whole: tuple[bytes, ...] = (
            f"{chunked}\r\n".encode() + piece + b"0\r\n\r\n",
            f"{chunked}\r\n".encode() + b"1\r\n{\r\n" + b"zz\r\n",
            f"{chunked}\r\n".encode() + b"ffffffffffffffffff\r\nx",
            f"{chunked}{length}\r\n".encode() + piece + b"0\r\n\r\n",
            f"{head}{length}{length.replace(': ', ': 1')}\r\n".encode() + case.body,
            f"{head}Content-Length: -1\r\n\r\n".encode() + case.body,
            f"{head}Content-Length: 99999999999999999999\r\n\r\n".encode() + case.body,
            f"{head}Transfer-Encoding: gzip\r\n\r\n".encode() + case.body,
            b"GET / HTTP/1.0\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET  /v1/models  HTTP/1.1\r\n\r\n",
            b"GET /v1/models HTTP/9.9\r\nHost: x\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(200),
            head.encode().replace(b"Host", b"Ho st") + b"\r\n",
            head.encode().replace(b"Host: x", b"Host: \x00x") + b"\r\n",
        )
        cut: tuple[bytes, ...] = (
            f"{head}Content-Length: {len(case.body) + 50}\r\n\r\n".encode() + case.body,
            f"{chunked}\r\n".encode() + piece,
            head.encode(),
            chance.randbytes(chance.randint(1, 300)),
            b"GET",
        )
        is_whole = chance.random() < 0.75
        raw = chance.choice(whole if is_whole else cut)
        # What is no HTTP may be waited for; it ends at the limit on headers.
        return case._replace(raw=raw, is_whole=is_whole and not raw.startswith(b"\x16"))


def _body_of(operation: Mapping[str, Any]) -> Schema | None:
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema")
    assert schema is None or isinstance(schema, Mapping)
    return schema


def _case(
    number: int, kind: str, operation: _Operation, chance: random.Random, body: bytes
) -> Case:
    target = operation.path
    while _PARAMETER in target:
        before, _, rest = target.partition(_PARAMETER)
        target = before + chance.choice(_NAMES[:-2]) + rest.partition("}")[2]
    headers: tuple[tuple[str, str], ...] = (("Host", "localhost"),)
    if body:
        headers = (*headers, _JSON, ("Content-Length", str(len(body))))
    return Case(number, kind, operation.method, target, headers, body)


def _leave(body: dict[str, Any], forms: Forms, chance: random.Random) -> None:
    """Change nothing."""


def _put(body: dict[str, Any], chance: random.Random, draw: Callable[[], Any]) -> None:
    """Put something else into one place of a body, most often a whole field."""
    found = list(places(body)) if chance.random() < 0.5 else [(body, key) for key in body]
    if found:
        container, key = chance.choice(found)
        container[key] = draw()


def _spoil(body: dict[str, Any], forms: Forms, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        _put(body, chance, forms.hostile)


def _poison(body: dict[str, Any], forms: Forms, chance: random.Random) -> None:
    for container, key in list(places(body)):
        if isinstance(container[key], str) and key not in {"type", "role", "model"}:
            container[key] = chance.choice(TEXTS)


def _deepen(body: dict[str, Any], forms: Forms, chance: random.Random) -> None:
    _put(body, chance, forms.deep)


def _lengthen(body: dict[str, Any], forms: Forms, chance: random.Random) -> None:
    _put(body, chance, forms.long)


def _add(body: dict[str, Any], forms: Forms, chance: random.Random) -> None:
    names = (
        *("guided_json", "guided_regex", "chat_template", "logits_processors", "functions"),
        *("stream", "stream_options", "n", "tools", "__proto__", "a" * 300, "\u0000", "background"),
        *("previous_response_id", "logit_bias", "stop", "response_format", "structured_outputs"),
    )
    for _ in range(chance.choice((1, 2))):
        body[chance.choice(names)] = forms.hostile()
