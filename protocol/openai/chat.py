"""Chat completions: a body to messages and options, text back to OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.answer import Answer, ChunkEncoder, Heading, usage
from understudy.protocol.openai.body import parse_body
from understudy.protocol.openai.deltas import call_id, put_together
from understudy.protocol.openai.logprobs import chat_logprobs
from understudy.protocol.openai.sampling import (
    LOGPROBS_MAX,
    Generation,
    GenerationFields,
    ModelTraits,
    check_generation,
)
from understudy.protocol.openai.stream_ids import EventIds
from understudy.protocol.openai.structured_output import ResponseFormat
from understudy.protocol.openai.tools import Tool, ToolChoice, ToolUse, check_tools
from understudy.protocol.request import SEED_MASK

CHUNK_KIND: Final = "chat.completion.chunk"

TEMPLATE_KWARGS_MAX: Final = 64
TEMPLATE_KWARGS_RESERVED: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "documents",
        "messages",
        "tools",
    }
)
"""What ``chat_template_kwargs`` may not set: it has a field of its own, or is refused."""


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content. Only text is served."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """The function of a tool call in an earlier answer."""

    name: str
    arguments: str | None = None


class ToolCall(msgspec.Struct, frozen=True):
    """A tool call in an earlier answer, for the template to show."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatFields(GenerationFields, kw_only=True, frozen=True):
    """The JSON fields of ``POST /v1/chat/completions``."""

    messages: list[Message] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking_token_budget: int | None = None


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """A checked request for a chat completion."""

    messages: tuple[Mapping[str, Any], ...]
    """As a chat template reads them."""
    template_kwargs: Mapping[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    generation: Generation
    ignored: tuple[str, ...]
    tool_use: ToolUse | None = None
    thinking_budget: int | None = None
    """Tokens that the model may think before it has to answer; ``None``: as many as it likes."""


def parse_chat(raw: bytes, model: ModelTraits) -> ChatCompletion:
    """Read and check the body of ``POST /v1/chat/completions``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, ignored = parse_body(raw, ChatFields)
    return check_chat(fields, model, ignored=ignored)


def check_chat(
    fields: ChatFields, model: ModelTraits, *, ignored: tuple[str, ...]
) -> ChatCompletion:
    """Check a conversation, from whichever endpoint.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    messages = fields.messages
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    if fields.max_completion_tokens is not None:
        fields = msgspec.structs.replace(fields, max_tokens=fields.max_completion_tokens)
    generation = check_generation(
        fields, model, logprobs=_logprobs(fields), response_format=fields.response_format
    )
    if len(messages) > model.max_model_len:
        # A message takes a token at least; rendering a million of them would hold up others.
        raise InvalidRequest("there are more messages than the context holds", param="messages")
    tool_use = check_tools(
        fields.tools, fields.tool_choice, parallel=fields.parallel_tool_calls, model=model
    )
    continue_final = fields.continue_final_message or False
    if continue_final and fields.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message excludes add_generation_prompt",
            param="continue_final_message",
        )
    return ChatCompletion(
        messages=tuple(_template_message(i, m) for i, m in enumerate(messages)),
        template_kwargs=_template_kwargs(fields),
        add_generation_prompt=fields.add_generation_prompt is not False and not continue_final,
        continue_final_message=continue_final,
        generation=generation,
        ignored=ignored,
        tool_use=tool_use,
        thinking_budget=_thinking_budget(fields.thinking_token_budget, model),
    )


def _thinking_budget(budget: int | None, model: ModelTraits) -> int | None:
    param = "thinking_token_budget"
    if budget is None:
        return None
    if not 0 <= budget <= SEED_MASK:
        raise InvalidRequest(f"{param} must be at least 0", param=param)
    if not model.reasoning_parser:
        text = f"{param}: this server was not told how the model thinks (--reasoning-parser)"
        raise InvalidRequest(text, param=param)
    # More than the context holds is no limit, and need not travel as a larger number.
    return min(budget, model.max_model_len)


def _template_kwargs(fields: ChatFields) -> dict[str, Any]:
    """Further variables for the template; how much to think is one that some know."""
    kwargs = fields.chat_template_kwargs or {}
    if len(kwargs) > TEMPLATE_KWARGS_MAX:
        raise InvalidRequest(
            f"chat_template_kwargs: at most {TEMPLATE_KWARGS_MAX}", param="chat_template_kwargs"
        )
    for name in kwargs:
        if name in TEMPLATE_KWARGS_RESERVED or not name.isidentifier():
            raise InvalidRequest(
                f"chat_template_kwargs cannot set {name[:64]!r}", param="chat_template_kwargs"
            )
    effort: dict[str, Any] = {}
    if fields.reasoning_effort is not None:
        effort["reasoning_effort"] = fields.reasoning_effort
    if fields.reasoning_effort == "none":
        effort |= {"enable_thinking": False, "thinking": False}
    return {**effort, **kwargs}


def _logprobs(fields: ChatFields) -> int | None:
    """The number of alternatives asked for, in the form of ``SamplingParams``."""
    top = fields.top_logprobs
    if top is not None:
        if not 0 <= top <= LOGPROBS_MAX:
            raise InvalidRequest(
                f"top_logprobs must be from 0 to {LOGPROBS_MAX}", param="top_logprobs"
            )
        if not fields.logprobs and top:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return (top or 0) if fields.logprobs else None


def _template_message(index: int, message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: absent fields left out, arguments as objects."""
    param = f"messages[{index}]"
    shown: dict[str, Any] = {"role": message.role, "content": _content(param, message)}
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:
        shown["reasoning_content"] = reasoning
    if message.tool_calls:
        shown["tool_calls"] = [_tool_call(param, call) for call in message.tool_calls]
    return shown


def _content(param: str, message: Message) -> str | list[dict[str, str]]:
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise InvalidRequest(f"{param}.content is missing", param=f"{param}.content")
        return ""
    if isinstance(content, str):
        return content
    parts = []
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"{param}.content[{index}]: only parts of type text are supported",
                param=f"{param}.content[{index}]",
            )
        parts.append({"type": "text", "text": part.text})
    return parts


def _tool_call(param: str, call: ToolCall) -> dict[str, Any]:
    """A tool call as templates show it: its arguments as the object that their JSON says."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(
            f"{param}.tool_calls: arguments must be a JSON object", param=f"{param}.tool_calls"
        ) from None
    function = {"name": call.function.name, "arguments": arguments}
    shown = {"type": call.type, "function": function}
    return shown if call.id is None else {"id": call.id, **shown}


def chat_response(
    heading: Heading, answers: Sequence[Answer], *, num_prompt_tokens: int, num_cached_tokens: int
) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    return {
        **heading.fields("chat.completion"),
        "choices": [
            {
                "index": answer.index,
                "message": _message(answer, has_short_ids=heading.has_short_ids),
                "logprobs": chat_logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
            }
            for answer in answers
        ],
        "usage": usage(
            num_prompt_tokens,
            sum(answer.num_tokens for answer in answers),
            num_cached_tokens=num_cached_tokens,
            num_reasoning_tokens=sum(answer.num_reasoning_tokens for answer in answers),
        ),
    }


def _message(answer: Answer, *, has_short_ids: bool) -> dict[str, Any]:
    """The model's message. Reasoning goes by both names that clients know."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    parsed = put_together(answer.deltas)
    if parsed.reasoning:
        message |= {"reasoning": parsed.reasoning, "reasoning_content": parsed.reasoning}
    if parsed.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [
            {
                "id": call_id(answer.request_id, index, is_short=has_short_ids),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(parsed.calls)
        ]
    return message


def chat_chunk_encoder(
    heading: Heading, event_ids: EventIds, index: int, *, has_usage: bool
) -> ChunkEncoder:
    """What turns the deltas of choice ``index`` into events."""
    return ChunkEncoder(
        event_ids,
        index,
        heading.opening(CHUNK_KIND) + b'"choices":[{"index":%d,"delta":{' % index,
        first=b'"role":"assistant","content":',
        later=b'"content":',
        end_of_text=b"}",
        shape_logprobs=chat_logprobs,
        has_usage=has_usage,
    )
