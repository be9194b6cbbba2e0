"""A grammar for answers that have to be calls, in the format that the model's parser reads.

In llguidance's dialect of Lark, where ``%json`` stands for the JSON that a schema describes and
``<[id]>`` for a special token. Thoughts may come first, where the model has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from understudy.protocol.openai.tools import FunctionTool, ToolUse, schema_of

_SPACED: Final = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON as these models have learned it: on one line, with spaces."""


_CALL_MARKS: Final = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "qwen3_coder": "<tool_call>",
}
"""What stands before a call, in formats where something does."""
_VALUE_END: Final = "\n</parameter>\n"


class Thoughts(NamedTuple):
    """How a model thinks before it answers."""

    opening: str
    closing: str
    is_open: bool
    """Whether the prompt has opened the thoughts."""


def tool_grammar(
    use: ToolUse, parser: str, *, mark_ids: Mapping[str, int], thoughts: Thoughts | None = None
) -> str:
    """The grammar, as Lark.

    Args:
        use: The tools; only those that may be called are in the grammar.
        parser: The name of the format.
        mark_ids: Marks that are special tokens.
        thoughts: What may stand before the calls.
    """
    spell = _Speller(mark_ids)
    rules, first, between, last = _FORMATS[parser](use.callable_tools, spell)
    call = " | ".join(f"call_{index}" for index in range(len(rules)))
    more = "" if use.calls_max else f" ({between} call)*".replace("  ", " ")
    lines = [f"start: {_thoughts_rule(thoughts, spell)}{first} call{more} {last}".rstrip()]
    lines.append(f"call: {call}")
    lines += [f"call_{index}: {rule}" for index, rule in enumerate(rules)]
    return "\n".join([*lines, *_shared_rules(parser, thoughts, spell)]) + "\n"


def strict_grammar(
    use: ToolUse, parser: str, *, mark_ids: Mapping[str, int], thoughts: Thoughts | None = None
) -> str:
    """The grammar of answers that may be calls: any text, but calls of strict tools fit them.

    There is none, and so an empty one, where no tool is strict, or where nothing marks a call:
    then no one can tell where to begin to be strict.

    Args:
        use: The tools.
        parser: The name of the format.
        mark_ids: Marks that are special tokens.
        thoughts: What stands before the answer, if the prompt has opened it.
    """
    mark = _CALL_MARKS.get(parser)
    if mark is None or not any(tool.strict for tool in use.tools):
        return ""
    spell = _Speller(mark_ids)
    tools = [
        tool if tool.strict else msgspec.structs.replace(tool, parameters=None)
        for tool in use.tools
    ]
    # The mark is what the text before a call ends with: the rules go on behind it.
    rules, first, between, last = _FORMATS[parser](tools, _Speller(mark_ids, dropped=mark))
    call = " | ".join(f"call_{index}" for index in range(len(rules)))
    more = f" ({between} call)*" if first and not use.calls_max else ""
    times = "?" if use.calls_max else "*"
    opened = thoughts if thoughts is not None and thoughts.is_open else None
    lines = [f"start: {_thoughts_rule(opened, spell)}(head {first}call{more} {last}){times} tail"]
    is_special = mark in mark_ids
    lines.append(f"head{'' if is_special else '[lazy]'}: TEXT {spell(mark)}")
    lines += ["tail: TEXT", "TEXT: /(?s:.*)/", f"call: {call}"]
    lines += [f"call_{index}: {rule}" for index, rule in enumerate(rules)]
    return "\n".join([*lines, *_shared_rules(parser, opened, spell)]) + "\n"


def _shared_rules(parser: str, thoughts: Thoughts | None, spell: _Speller) -> list[str]:
    """What several rules refer to."""
    lines = []
    if thoughts is not None:
        lines.append(f"thoughts[suffix={spell(thoughts.closing)}]: /(?s:.*)/")
    if parser == "qwen3_coder":
        lines.append(f"value[suffix={spell(_VALUE_END)}]: /(?s:.*)/")
    return lines


class _Format(NamedTuple):
    """How calls are written: a rule for each tool, and what stands around them."""

    rules: list[str]
    first: str = ""
    between: str = ""
    last: str = ""


class _Speller:
    """Writes literals of a grammar; ``dropped`` is left out where a text begins with it."""

    def __init__(self, mark_ids: Mapping[str, int], *, dropped: str | None = None) -> None:
        self.marks = mark_ids
        self._dropped = dropped

    def __call__(self, text: str) -> str:
        """A text; marks in it that are special tokens become those."""
        if self._dropped is not None:
            text = text.removeprefix(self._dropped)
        for mark, token_id in self.marks.items():
            before, found, after = text.partition(mark)
            if found:
                parts = (self(before), f"<[{token_id}]>", self(after))
                return " ".join(part for part in parts if part)
        return _literal(text) if text else ""


def _literal(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + msgspec.json.encode({**schema, "x-guidance": _SPACED}).decode()


def _thoughts_rule(thoughts: Thoughts | None, spell: _Speller) -> str:
    if thoughts is None:
        return ""
    closed = "thoughts /\\s*/"
    return f"{closed} " if thoughts.is_open else f"({spell(thoughts.opening)} {closed})? "


def _json_call(tool: FunctionTool, arguments: str, spell: _Speller, *, around: str = "%") -> str:
    """``{"name": "f", "arguments": …}``, with what ``around`` has on both sides of its ``%``."""
    before, _, after = around.partition("%")
    head = f'{before}{{"name": {_literal(tool.name)}, "{arguments}": '
    return f"{spell(head)} {_json(schema_of(tool))} {spell('}' + after)}"


def _hermes(tools: Sequence[FunctionTool], spell: _Speller) -> _Format:
    around = "<tool_call>\n%\n</tool_call>"
    return _Format(
        [_json_call(tool, "arguments", spell, around=around) for tool in tools], between='"\\n"'
    )


def _llama3_json(tools: Sequence[FunctionTool], spell: _Speller) -> _Format:
    return _Format([_json_call(tool, "parameters", spell) for tool in tools], between='"; "')


def _mistral(tools: Sequence[FunctionTool], spell: _Speller) -> _Format:
    """The list of older models, or with a second mark the form of newer ones."""
    if "[ARGS]" in spell.marks:
        rules = [
            f"{spell(f'[TOOL_CALLS]{tool.name}[ARGS]')} {_json(schema_of(tool))}" for tool in tools
        ]
        return _Format(rules)
    return _Format(
        [_json_call(tool, "arguments", spell) for tool in tools],
        first=spell("[TOOL_CALLS][") + " ",
        between='", "',
        last='"]"',
    )


def _qwen3_coder(tools: Sequence[FunctionTool], spell: _Speller) -> _Format:
    rules = []
    for tool in tools:
        parts = [spell(f"<tool_call>\n<function={tool.name}>\n")]
        for parameter in _parameters(tool):
            value = "value"
            if not parameter.is_text:
                value = f"{_json(parameter.schema)} {spell(_VALUE_END)}"
            name = spell(f"<parameter={parameter.name}>\n")
            text = f"{name} {value}"
            parts.append(text if parameter.is_required else f"({text})?")
        rules.append(" ".join([*parts, spell("</function>\n</tool_call>")]))
    return _Format(rules, between='"\\n"')


def _pythonic(tools: Sequence[FunctionTool], spell: _Speller) -> _Format:
    rules = []
    for tool in tools:
        parts = [spell(f"{tool.name}(")]
        parameters = _parameters(tool)
        required = [one for one in parameters if one.is_required]
        optional = [one for one in parameters if not one.is_required]
        named = [f"{spell(one.name + '=')} {_json(one.schema)}" for one in required]
        parts.append(' ", " '.join(named))
        if required:
            parts += [f'(", " {spell(one.name + "=")} {_json(one.schema)})?' for one in optional]
        elif optional:
            parts.append(_in_order(optional, spell))
        rules.append(" ".join([*(part for part in parts if part), '")"']))
    return _Format(rules, first='"["', between='", "', last='"]"')


class _Parameter(NamedTuple):
    """One parameter of a tool."""

    name: str
    schema: Mapping[str, Any]
    is_required: bool

    @property
    def is_text(self) -> bool:
        """Whether any text will do."""
        return self.schema.get("type") == "string" and not {"enum", "const", "pattern"} & {
            *self.schema
        }


def _parameters(tool: FunctionTool) -> list[_Parameter]:
    schema = schema_of(tool)
    properties = schema.get("properties")
    required = schema.get("required")
    if not isinstance(properties, dict):
        return []
    # What a part of a schema refers to stands beside the whole.
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    return [
        _Parameter(
            name,
            {**shared, **one} if isinstance(one, dict) else {},
            isinstance(required, list) and name in required,
        )
        for name, one in properties.items()
    ]


def _in_order(parameters: Sequence[_Parameter], spell: _Speller) -> str:
    """Any of these in their order, with commas between; the first that is there has none."""
    named = [f"{spell(one.name + '=')} {_json(one.schema)}" for one in parameters]
    starts = [
        " ".join([first, *(f'(", " {later})?' for later in named[index + 1 :])])
        for index, first in enumerate(named)
    ]
    return "(" + " | ".join(starts) + ")?"


_FORMATS: Final[Mapping[str, Callable[[Sequence[FunctionTool], _Speller], _Format]]] = {
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
    "pythonic": _pythonic,
    "qwen3_coder": _qwen3_coder,
}
