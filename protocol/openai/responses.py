"""Responses: a body to a conversation, and what is kept of it for later requests."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Literal, NamedTuple

import msgspec

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.body import parse_body
from understudy.protocol.openai.chat import (
    ChatCompletion,
    ChatFields,
    Message,
    ReasoningEffort,
    check_chat,
)
from understudy.protocol.openai.renaming import params_named
from understudy.protocol.openai.response_items import InputItem, messages_of
from understudy.protocol.openai.sampling import GenerationFields, ModelTraits
from understudy.protocol.openai.structured_output import JsonSchemaFormat, ResponseFormat
from understudy.protocol.openai.tools import (
    FunctionName,
    FunctionTool,
    NamedTool,
    Tool,
    ToolChoice,
)

_NAMES: Final = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}


class ResponseTool(msgspec.Struct, frozen=True):
    """A tool, in this API's flat form."""

    name: str
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(msgspec.Struct, frozen=True):
    """This function is to be called."""

    name: str
    type: Literal["function"] = "function"


class TextFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the text must be, in this API's flat form."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None

    def response_format(self) -> ResponseFormat:
        """The same in the form of chats."""
        schema = None
        if self.type == "json_schema":
            schema = JsonSchemaFormat(self.schema, self.name, self.description, self.strict)
        return ResponseFormat(self.type, schema)


class TextOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = None


_PLAIN: Final = TextOptions(TextFormat("text"))


class Reasoning(msgspec.Struct, frozen=True):
    """How much to think. Thoughts are not summarised."""

    effort: ReasoningEffort | None = None
    summary: str | None = None


class ResponseFields(GenerationFields, kw_only=True, frozen=True):
    """The JSON fields of ``POST /v1/responses``."""

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    store: bool | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: int | None = None
    conversation: Any = None
    prompt: Any = None


class KeptResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What stays with a response: to be said again in its object, and to go on from."""

    is_stored: bool
    is_background: bool
    conversation: list[Message]
    """All of it but the instructions and the answer; empty if the response is not stored."""
    fields: dict[str, Any]
    """Of the response object, those that repeat the request."""


class ParsedResponse(NamedTuple):
    """A checked request for a response."""

    chat: ChatCompletion
    kept: KeptResponse


def parse_response(raw: bytes) -> tuple[ResponseFields, tuple[str, ...]]:
    """Read the body of ``POST /v1/responses``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, ignored = parse_body(raw, ResponseFields)
    for name in ("conversation", "prompt"):
        if getattr(fields, name) is not None:
            raise InvalidRequest(f"{name} is not supported by this server", param=name)
    if fields.n not in {None, 1}:
        raise InvalidRequest("a response is one answer", param="n")
    if fields.truncation == "auto":
        raise InvalidRequest("conversations are not truncated", param="truncation")
    is_stored = fields.store is not False
    if fields.background and not is_stored:
        raise InvalidRequest("background needs store: true", param="background")
    return fields, ignored


def check_response(
    fields: ResponseFields,
    model: ModelTraits,
    *,
    ignored: tuple[str, ...],
    earlier: list[Message],
) -> ParsedResponse:
    """Check a request for a response that goes on from an ``earlier`` conversation.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    if fields.input is None:
        raise InvalidRequest("input is missing", param="input")
    conversation = [*earlier, *messages_of(fields.input)]
    if not conversation:
        raise InvalidRequest("input must hold at least one item", param="input")
    messages = list(conversation)
    if fields.instructions is not None:
        messages.insert(0, Message("system", fields.instructions))
    shared = {
        name: getattr(fields, name)
        for name in GenerationFields.__struct_fields__
        if name not in {"max_tokens", "stream_options"}
    }
    form = None if fields.text is None else fields.text.format
    chat_fields = ChatFields(
        **shared,
        response_format=None if form is None else form.response_format(),
        messages=messages,
        max_tokens=fields.max_output_tokens,
        tools=_tools(fields.tools),
        tool_choice=_choice(fields.tool_choice),
        parallel_tool_calls=fields.parallel_tool_calls,
        reasoning_effort=None if fields.reasoning is None else fields.reasoning.effort,
        chat_template_kwargs=fields.chat_template_kwargs,
        thinking_token_budget=fields.thinking_token_budget,
    )
    is_stored = fields.store is not False
    with params_named(_NAMES):
        chat = check_chat(chat_fields, model, ignored=ignored)
    grammar = chat.generation.grammar
    if grammar is not None:
        named = dataclasses.replace(
            chat.generation, grammar=grammar._replace(param=_NAMES["response_format"])
        )
        chat = dataclasses.replace(chat, generation=named)
    return ParsedResponse(
        chat,
        KeptResponse(
            is_stored=is_stored,
            is_background=fields.background or False,
            conversation=conversation if is_stored else [],
            fields=_repeated(fields),
        ),
    )


def _repeated(fields: ResponseFields) -> dict[str, Any]:
    reasoning = fields.reasoning or Reasoning()
    return {
        "background": fields.background or False,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": fields.previous_response_id,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "store": fields.store is not False,
        "temperature": fields.temperature,
        "text": msgspec.to_builtins(fields.text or _PLAIN),
        "tool_choice": fields.tool_choice or "auto",
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict or False,
            }
            for tool in fields.tools or []
        ],
        "top_p": fields.top_p,
        "truncation": "disabled",
    }


def _tools(tools: list[ResponseTool] | None) -> list[Tool] | None:
    if tools is None:
        return None
    return [
        Tool(FunctionTool(tool.name, tool.description, tool.parameters, tool.strict))
        for tool in tools
    ]


def _choice(
    choice: Literal["none", "auto", "required"] | ResponseToolChoice | None,
) -> ToolChoice | None:
    if isinstance(choice, ResponseToolChoice):
        return NamedTool(FunctionName(choice.name))
    return choice


def keep(kept: KeptResponse) -> bytes:
    """What stays with a response, packed."""
    return msgspec.json.encode(kept)


def kept_response(packed: bytes) -> KeptResponse:
    """The inverse of ``keep``.

    Raises:
        InvalidRequest: it is damaged; it came from the journal.
    """
    try:
        return msgspec.json.decode(packed, type=KeptResponse)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InvalidRequest(f"the response cannot be read: {error}") from None
