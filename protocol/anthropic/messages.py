"""The body of ``POST /v1/messages`` to a conversation, and errors in Anthropic's form."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from understudy.protocol.errors import InvalidRequest, RequestError
from understudy.protocol.openai.body import parse_body
from understudy.protocol.openai.chat import (
    CalledFunction,
    ChatCompletion,
    ChatFields,
    ContentPart,
    Message,
    ToolCall,
    check_chat,
)
from understudy.protocol.openai.renaming import params_named
from understudy.protocol.openai.sampling import ModelTraits
from understudy.protocol.openai.tools import FunctionName, FunctionTool, NamedTool, Tool

_BUDGET: Final = "thinking.budget_tokens"
_NAMES: Final = {"stop": "stop_sequences", "thinking_token_budget": _BUDGET}
_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ResultBlock(msgspec.Struct, frozen=True):
    """One block of what a tool has given back. Only text is served."""

    type: str
    text: str | None = None


class Block(msgspec.Struct, frozen=True):
    """One block of a message; which fields it has depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[ResultBlock] | None = None


class Turn(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class SystemBlock(msgspec.Struct, frozen=True):
    """One block of the system's text."""

    text: str
    type: Literal["text"] = "text"


class AnthropicTool(msgspec.Struct, frozen=True):
    """A tool that the client runs."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None


class AnthropicToolChoice(msgspec.Struct, frozen=True):
    """Whether and what to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True):
    """Whether to think before the answer, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class MessagesFields(msgspec.Struct, kw_only=True, frozen=True):
    """The JSON fields of ``POST /v1/messages``."""

    model: str | None = None
    messages: list[Turn] | None = None
    max_tokens: int | None = None
    system: str | list[SystemBlock] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    deadline_ms: int | None = None


def parse_messages(
    raw: bytes, model: ModelTraits, *, needs_max_tokens: bool = True
) -> ChatCompletion:
    """Read and check the body of ``POST /v1/messages``, or of its ``count_tokens``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, ignored = parse_body(raw, MessagesFields)
    if fields.max_tokens is None and needs_max_tokens:
        raise InvalidRequest("max_tokens is missing", param="max_tokens")
    kwargs: dict[str, Any] = {}
    budget = None
    if fields.thinking is not None:
        budget = fields.thinking.budget_tokens
        kwargs["enable_thinking"] = kwargs["thinking"] = fields.thinking.type != "disabled"
    if budget is not None and not model.reasoning_parser:
        # Clients ask for thoughts whatever the model; one that has none cannot exceed its budget.
        budget, ignored = None, (*ignored, _BUDGET)
    choice = fields.tool_choice
    chat_fields = ChatFields(
        model=fields.model,
        messages=_conversation(fields),
        max_tokens=fields.max_tokens if needs_max_tokens else None,
        stop=fields.stop_sequences,
        stream=fields.stream,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=fields.top_k,
        tools=_tools(fields.tools),
        tool_choice=_choice(choice),
        parallel_tool_calls=not choice.disable_parallel_tool_use if choice is not None else None,
        chat_template_kwargs=kwargs,
        deadline_ms=fields.deadline_ms,
        thinking_token_budget=budget,
    )
    with params_named(_NAMES):
        return check_chat(chat_fields, model, ignored=ignored)


def error_body(error: RequestError, *, request_id: str = "") -> dict[str, Any]:
    """An error in Anthropic's form."""
    kind = _ERROR_TYPES.get(error.status, "api_error")
    if error.status in {405, 422}:
        kind = "invalid_request_error"
    shown = {"type": kind, "message": error.message, "param": error.param, "code": error.code}
    return {"type": "error", "error": shown, "request_id": request_id or None}


def _conversation(fields: MessagesFields) -> list[Message]:
    messages: list[Message] = []
    if isinstance(fields.system, str):
        messages.append(Message("system", fields.system))
    elif fields.system:
        messages.append(Message("system", "\n".join(block.text for block in fields.system)))
    if not fields.messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    for index, turn in enumerate(fields.messages):
        param = f"messages[{index}].content"
        if isinstance(turn.content, str):
            messages.append(Message(turn.role, turn.content))
        elif turn.role == "assistant":
            messages.append(_said(turn.content, param))
        else:
            messages += _asked(turn.content, param)
    return messages


def _said(blocks: list[Block], param: str) -> Message:
    """What the model said in one turn."""
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        match block:
            case Block("text", text=str(text)):
                texts.append(text)
            case Block("thinking", thinking=str(thinking)):
                thoughts.append(thinking)
            case Block("redacted_thinking"):
                pass
            case Block("tool_use", id=str(name), name=str(function), input=dict(given)):
                arguments = msgspec.json.encode(given).decode()
                calls.append(ToolCall(CalledFunction(function, arguments), name))
            case _:
                raise _unserved(block, f"{param}[{index}]")
    return Message(
        "assistant",
        "".join(texts),
        tool_calls=calls or None,
        reasoning_content="".join(thoughts) or None,
    )


def _asked(blocks: list[Block], param: str) -> list[Message]:
    """What the user said in one turn: the results of tools are messages of their own."""
    messages: list[Message] = []
    parts: list[ContentPart] = []
    for index, block in enumerate(blocks):
        match block:
            case Block("text", text=str(text)):
                parts.append(ContentPart("text", text))
            case Block("tool_result", tool_use_id=str(name)):
                if parts:
                    messages.append(Message("user", parts))
                    parts = []
                result = _result(block, f"{param}[{index}].content")
                messages.append(Message("tool", result, tool_call_id=name))
            case _:
                raise _unserved(block, f"{param}[{index}]")
    if parts or not messages:
        messages.append(Message("user", parts))
    return messages


def _result(block: Block, param: str) -> str:
    if not isinstance(block.content, list):
        return block.content or ""
    texts = []
    for index, part in enumerate(block.content):
        if part.type != "text" or part.text is None:
            raise InvalidRequest(f"{param}[{index}]: only text is supported", param=param)
        texts.append(part.text)
    return "".join(texts)


def _unserved(block: Block, param: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: a block {block.type[:64]!r} cannot be here", param=param)


def _tools(tools: list[AnthropicTool] | None) -> list[Tool] | None:
    if tools is None:
        return None
    return [Tool(FunctionTool(tool.name, tool.description, tool.input_schema)) for tool in tools]


def _choice(
    choice: AnthropicToolChoice | None,
) -> Literal["none", "auto", "required"] | NamedTool | None:
    match choice:
        case None:
            return None
        case AnthropicToolChoice("tool", name=str(name)):
            return NamedTool(FunctionName(name))
        case AnthropicToolChoice("any"):
            return "required"
        case AnthropicToolChoice("none"):
            return "none"
        case AnthropicToolChoice("auto"):
            return "auto"
        case _:
            raise InvalidRequest("tool_choice.name is missing", param="tool_choice.name")
