"""Structured output: what a body says of its answer's form, as one grammar for llguidance.

Four forms come in - a JSON schema, a regular expression, a list of choices, a grammar - and one
goes out: a text that llguidance reads, Lark or its own JSON. Nothing is compiled here, so what is
wrong inside a schema or a grammar is found later, by ``runtime/grammar_checker.py``. What can be
seen without compiling is refused here: sizes, depths, and fields that contradict each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import msgspec

from understudy.protocol.errors import InvalidRequest

GRAMMAR_BYTES_MAX: Final = 64 << 10
SCHEMA_DEPTH_MAX: Final = 32
"""Schemas within schemas. What they hold besides, a default or an enum, may be as deep again."""
_VALUE_DEPTH_MAX: Final = 3 * SCHEMA_DEPTH_MAX
"""Containers within containers: a schema in ``properties`` or in ``anyOf`` is two further in."""
CHOICES_MAX: Final = 4096
CHOICE_BYTES_MAX: Final = 4096

_WHITESPACE: Final = r" |\n {0,64}"
"""Between the parts of JSON: a space, or a line's end and the next one's indentation.

JSON allows any amount. A model that is in doubt would go on with it for ever, and its answer would
end by its length instead of by its last brace.
"""
_OPTIONS: Final = "x-guidance"
"""The key under which llguidance looks for its options; a client's own are not heard."""
_LARK_LINES: Final = ("%llguidance", "start:", "start :")

_REGEX_PART: Final = re.compile(r"\\.|[/\n\r]", re.DOTALL)
"""What a slash or a line's end is in a regular expression, and what is one only by its looks."""


class JsonSchemaFormat(msgspec.Struct, frozen=True):
    """What ``response_format`` of type ``json_schema`` holds."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's ``structured_outputs``: exactly one of its fields."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Grammar(NamedTuple):
    """What an answer must look like."""

    text: str
    """For llguidance, unless ``is_gbnf``."""
    param: str
    """The field that it came from, for errors."""
    is_gbnf: bool = False
    """It is llama.cpp's GBNF, and has to be translated by whoever checks it."""


def read_structured_output(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> Grammar | None:
    """The grammar that a body asks for, or ``None`` if any text will do.

    Raises:
        InvalidRequest: more than one form is asked for, or one beyond its limits.
    """
    grammar = None if response_format is None else _of_response_format(response_format)
    if structured_outputs is None:
        return grammar
    if grammar is not None:
        raise InvalidRequest(
            "structured_outputs excludes a response_format other than text",
            param="structured_outputs",
        )
    return _of_structured_outputs(structured_outputs)


def refuse_with_grammar(*, min_tokens: int, ignores_eos: bool) -> None:
    """Refuse options that contradict a grammar: it alone says when an answer is complete.

    Raises:
        InvalidRequest: one of them is set.
    """
    told = "cannot be combined with structured output: the grammar says where the answer ends"
    if min_tokens:
        raise InvalidRequest(f"min_tokens {told}", param="min_tokens")
    if ignores_eos:
        raise InvalidRequest(f"ignore_eos {told}", param="ignore_eos")


def json_grammar(schema: Mapping[str, Any], *, param: str, is_lenient: bool = False) -> Grammar:
    """A grammar of the JSON texts that a schema describes.

    Args:
        schema: A JSON schema, as decoded JSON.
        param: The field that it came from.
        is_lenient: Keywords that cannot be enforced are passed over instead of refused.

    Raises:
        InvalidRequest: the schema is too large or too deep.
    """
    _check_depth(schema, param)
    options = {
        "whitespace_flexible": True,
        "whitespace_pattern": _WHITESPACE,
        "lenient": is_lenient,
    }
    grammar = {"grammars": [{"json_schema": {**schema, _OPTIONS: options}}]}
    try:
        size = len(msgspec.json.encode(schema))
        text = msgspec.json.encode(grammar).decode()
    except (RecursionError, ValueError, TypeError) as error:
        raise InvalidRequest(f"{param}: no JSON schema: {error}", param=param) from None
    _check_size(size, param)
    return Grammar(text, param)


def regex_grammar(regex: str, *, param: str) -> Grammar:
    """A grammar of the texts that a regular expression matches as a whole (Rust's syntax).

    Raises:
        InvalidRequest: it is empty or too large.
    """
    if not regex:
        raise InvalidRequest(f"{param} is empty", param=param)
    _check_size(len(regex.encode()), param)
    grammar = {"grammars": [{"lark_grammar": "start: REGEX\nREGEX: " + _lark_regex(regex)}]}
    return Grammar(msgspec.json.encode(grammar).decode(), param)


def choice_grammar(choices: Sequence[str], *, param: str) -> Grammar:
    """A grammar of some texts, of which one is said.

    Raises:
        InvalidRequest: there are none or too many, or one is empty or too long.
    """
    if not 0 < len(choices) <= CHOICES_MAX:
        raise InvalidRequest(f"{param} has 1 to {CHOICES_MAX} texts", param=param)
    for choice in choices:
        if not 0 < len(choice.encode()) <= CHOICE_BYTES_MAX:
            raise InvalidRequest(f"{param}: each has 1 to {CHOICE_BYTES_MAX} bytes", param=param)
    _check_size(sum(len(choice.encode()) + 1 for choice in choices), param)
    escaped = "|".join(_escape(choice) for choice in dict.fromkeys(choices))
    return Grammar("start: CHOICE\nCHOICE: " + _lark_regex(escaped), param)


def lark_or_gbnf_grammar(grammar: str, *, param: str) -> Grammar:
    """A client's own grammar: llguidance's Lark, or GBNF.

    Raises:
        InvalidRequest: it is empty or too large.
    """
    if not grammar.strip():
        raise InvalidRequest(f"{param} is empty", param=param)
    _check_size(len(grammar.encode()), param)
    if grammar.lstrip().startswith("{"):
        # It would be taken for llguidance's own JSON, which is not what the field promises.
        raise InvalidRequest(f"{param} is neither Lark nor GBNF", param=param)
    lines = [line.strip() for line in grammar.splitlines()]
    is_lark = any(line.startswith(_LARK_LINES) for line in lines)
    return Grammar(grammar, param, is_gbnf=not is_lark and "::=" in grammar)


def _of_response_format(response_format: ResponseFormat) -> Grammar | None:
    param = "response_format"
    given = response_format.json_schema
    match response_format.type:
        case "text":
            return None
        case "json_object":
            return json_grammar({"type": "object"}, param=param)
        case "json_schema":
            if given is None or given.schema is None:
                raise InvalidRequest("response_format.json_schema.schema is missing", param=param)
            # Only an explicit false asks for less than the schema says.
            return json_grammar(given.schema, param=param, is_lenient=given.strict is False)


def _of_structured_outputs(fields: StructuredOutputs) -> Grammar:
    param = "structured_outputs"
    given = [name for name in fields.__struct_fields__ if getattr(fields, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            "structured_outputs takes exactly one of json, regex, choice and grammar",
            param=param,
        )
    name = given[0]
    return _BUILDERS[name](getattr(fields, name), param=f"{param}.{name}")


def _json_or_text(schema: Mapping[str, Any] | str, *, param: str) -> Grammar:
    if isinstance(schema, str):
        _check_size(len(schema.encode()), param)
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            raise InvalidRequest(f"{param} is no JSON object", param=param) from None
    return json_grammar(schema, param=param)


_BUILDERS: Final[Mapping[str, Callable[..., Grammar]]] = MappingProxyType(
    {
        "json": _json_or_text,
        "regex": regex_grammar,
        "choice": choice_grammar,
        "grammar": lark_or_gbnf_grammar,
    }
)


def _check_size(num_bytes: int, param: str) -> None:
    if num_bytes > GRAMMAR_BYTES_MAX:
        raise InvalidRequest(f"{param} is larger than {GRAMMAR_BYTES_MAX} bytes", param=param)


def _check_depth(schema: Mapping[str, Any], param: str) -> None:
    """Refuse a schema that nests too deeply, without recursion of our own."""
    level: list[Any] = [schema]
    for _ in range(_VALUE_DEPTH_MAX):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, Mapping) else container)
            if isinstance(child, Mapping | list)
        ]
        if not level:
            return
    raise InvalidRequest(f"{param} is nested more than {SCHEMA_DEPTH_MAX} deep", param=param)


def _lark_regex(regex: str) -> str:
    """A regular expression between slashes, on one line: its end would end the rule."""
    return "/" + _REGEX_PART.sub(_lark_part, regex) + "/"


def _lark_part(match: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n", "\r": r"\r", "\\\r": r"\r"}.get(
        match[0], match[0]
    )


def _escape(text: str) -> str:
    """A text as a regular expression that matches nothing else."""
    return "".join(
        character if character.isalnum() or character in " _" else f"\\x{{{ord(character):x}}}"
        for character in text
    )
