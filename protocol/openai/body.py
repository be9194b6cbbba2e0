"""The body of a request: strict JSON to typed fields, or an error that names the field.

Knows JSON and types; what a field means is the business of each endpoint's own module. A body is
refused where two readers of it could disagree: duplicate keys, lone surrogates, NaN, numbers out
of range, ``true`` for an integer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from understudy.protocol.errors import InvalidRequest

T = TypeVar("T", bound=msgspec.Struct)

STRINGS_MAX: Final = 1 << 16
CONTAINERS_MAX: Final = 1 << 14
"""Objects and arrays in one body. With the limit on strings it bounds what decoding allocates."""

FIELDS_MAX: Final = 256
"""Fields of the body itself."""

NAMED_MAX: Final = 16
"""Ignored fields that are named to the client."""

_CONTAINER_TYPES: Final = frozenset({dict, list})
_PATH: Final = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")

INERT_VALUES: Final[Mapping[str, tuple[object, ...]]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": (),
    "json_schema": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Fields that would change the output and are not served, with the values that change nothing."""

SILENT_FIELDS: Final = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields that are about the account, not the answer: accepted without a word."""


class ParsedBody(NamedTuple, Generic[T]):
    """The fields that are served, and the names of those that were ignored."""

    fields: T
    ignored: tuple[str, ...]
    """Fit for a header: unusual names are left out, and there are at most ``NAMED_MAX``."""


def parse_body(raw: bytes, kind: type[T]) -> ParsedBody[T]:
    """Read a body into ``kind``, a ``msgspec.Struct`` whose fields may all be ``None``.

    ``null`` is the same as absent. ``tools`` and ``functions`` are accepted where the request
    forbids their use.

    Raises:
        InvalidRequest: it is no JSON object, a field has the wrong type, or it asks for something
            that would change the output and is not served.
    """
    values = {name: value for name, value in decode_object(raw).items() if value is not None}
    if len(values) > FIELDS_MAX:
        raise InvalidRequest(f"the body has more than {FIELDS_MAX} fields")
    if values.get("tool_choice") == "none":
        values.pop("tools", None)
    if values.get("function_call") == "none":
        values.pop("functions", None)
    ignored = []
    for name in values.keys() - _known_names(kind):
        _refuse_if_it_matters(name, values[name])
        if name not in SILENT_FIELDS and name not in INERT_VALUES and _FIELD_NAME.fullmatch(name):
            ignored.append(name)
    try:
        fields = msgspec.convert(values, kind, strict=True)
    except msgspec.ValidationError as error:
        raise _named_error(error) from None
    return ParsedBody(fields, tuple(sorted(ignored)[:NAMED_MAX]))


@cache
def _known_names(kind: type) -> frozenset[str]:
    """What a body of this kind calls its fields. To ask msgspec costs more than the rest."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(kind))


def decode_object(raw: bytes) -> dict[str, Any]:
    """Read a JSON object, more strictly than JSON has to be read.

    Raises:
        InvalidRequest: it is none, or has duplicate keys, or too many parts.
    """
    colons = _count_colons(raw)
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if type(value) is not dict:
        raise InvalidRequest("the body must be a JSON object")
    if _count_keys(value) != colons:
        raise InvalidRequest("the body has an object with a duplicate key")
    return value


def _count_colons(raw: bytes) -> int:
    """The number of colons outside strings: one for each key, duplicates included.

    Done by cutting at quotation marks, which is a hundred times faster than reading the JSON once
    more in Python. What it makes of malformed JSON does not matter: that is refused afterwards.
    """
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * STRINGS_MAX:
        raise InvalidRequest(f"the body has more than {STRINGS_MAX} strings")
    structure = b"".join(unescaped.split(b'"')[::2])
    if structure.count(b"{") + structure.count(b"[") > CONTAINERS_MAX:
        raise InvalidRequest(f"the body has more than {CONTAINERS_MAX} objects and arrays")
    return structure.count(b":")


def _count_keys(value: dict[str, Any]) -> int:
    """The number of keys in a decoded object, where each key is there once."""
    count = 0
    stack: list[Any] = [value]
    while stack:
        container = stack.pop()
        if type(container) is dict:
            count += len(container)
            container = container.values()
        # Long arrays are arrays of numbers: one pass over their types is all they get.
        if not _CONTAINER_TYPES.isdisjoint(map(type, container)):
            stack += [child for child in container if type(child) in _CONTAINER_TYPES]
    return count


def _refuse_if_it_matters(name: str, value: object) -> None:
    inert = () if name.startswith("guided_") else INERT_VALUES.get(name)
    if inert is not None and value not in inert:
        raise InvalidRequest(f"{name} is not supported by this server", param=name)


def _named_error(error: msgspec.ValidationError) -> InvalidRequest:
    """Msgspec's error, which ends with a path, as ours, which has it in ``param``."""
    message = str(error)
    path = _PATH.search(message)
    if path is None:
        return InvalidRequest(message)
    param = path.group(1).removesuffix("[...]") or None
    text = message[: path.start()]
    return InvalidRequest(f"{param}: {text}" if param else text, param=param)
