"""What tools and thoughts make of a chat's answer: its grammar, and how it is taken apart."""

from __future__ import annotations

import dataclasses
from typing import Any

from understudy.protocol.openai import chat
from understudy.protocol.openai.sampling import Generation, ModelTraits
from understudy.protocol.openai.structured_output import Grammar, refuse_with_grammar
from understudy.protocol.openai.tool_grammar import Thoughts, strict_grammar, tool_grammar
from understudy.protocol.openai.tools import schema_of
from understudy.runtime.parsers.qwen3_coder import parameter_types
from understudy.runtime.parsers.reasoning import FORMATS


def meaning_of(
    body: chat.ChatCompletion, model: ModelTraits, *, begins_in_reasoning: bool
) -> dict[str, Any]:
    """How the text of an answer is to be taken apart."""
    meaning: dict[str, Any] = {}
    if model.reasoning_parser:
        meaning["reasoning_parser"] = model.reasoning_parser
        meaning["begins_in_reasoning"] = begins_in_reasoning
    if body.tool_use is not None:
        meaning["tool_parser"] = model.tool_parser
        meaning["calls_max"] = body.tool_use.calls_max
        meaning["tools"] = _known_tools(body, model.tool_parser)
    return meaning


def _known_tools(body: chat.ChatCompletion, tool_parser: str) -> dict[str, dict[str, str]]:
    """What a parser has to know of the tools: their names, or also their types, or nothing."""
    assert body.tool_use is not None
    tools = body.tool_use.callable_tools
    match tool_parser:
        case "qwen3_coder":
            return {tool.name: parameter_types(schema_of(tool)) for tool in tools}
        case "llama3_json" | "pythonic":
            return {tool.name: {} for tool in tools}
        case _:
            return {}


def with_calls(
    body: chat.ChatCompletion, model: ModelTraits, *, begins_in_reasoning: bool
) -> Generation:
    """What a body asks for, with the grammar of the calls that it wants or allows.

    A call that must be made comes before a form that the answer should have; that form comes before
    the grammar of calls that may be made.
    """
    use, generation = body.tool_use, body.generation
    thoughts = None
    if body.thinking_budget is None:  # with a budget, the grammar begins behind the thoughts
        thoughts = _thoughts(model, begins_inside=begins_in_reasoning)
    if use is None or (generation.grammar is not None and not use.is_forced):
        return generation
    text = (tool_grammar if use.is_forced else strict_grammar)(
        use,
        model.tool_parser,
        mark_ids=dict(model.mark_ids),
        thoughts=thoughts,
    )
    if not text:
        return generation
    sampling = generation.sampling
    refuse_with_grammar(
        min_tokens=sampling.min_tokens,
        ignores_eos=not set(model.eos_token_ids) <= set(sampling.stop_token_ids),
    )
    return dataclasses.replace(generation, grammar=Grammar(text, "tools"))


def _thoughts(model: ModelTraits, *, begins_inside: bool) -> Thoughts | None:
    """What may stand before a call that is forced."""
    if not model.reasoning_parser:
        return None
    form = FORMATS[model.reasoning_parser]
    return Thoughts(form.opening, form.closing, is_open=begins_inside)
