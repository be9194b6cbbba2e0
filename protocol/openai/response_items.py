"""The items of the Responses API to messages of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.chat import CalledFunction, ContentPart, Message, ToolCall

_TEXTS: Final = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text"})

Role = Literal["system", "developer", "user", "assistant"]


class ItemPart(msgspec.Struct, frozen=True):
    """One part of an item's content. Only text is served."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, frozen=True):
    """One item of the input; which fields it has depends on its type."""

    type: str = "message"
    role: Role | None = None
    content: str | list[ItemPart] | None = None
    summary: list[ItemPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ItemPart] | None = None


def messages_of(given: str | list[InputItem]) -> list[Message]:
    """The messages that an input is; what the model said in one turn becomes one message.

    Raises:
        InvalidRequest: an item is none that is served.
    """
    if isinstance(given, str):
        return [Message("user", given)]
    messages: list[Message] = []
    for index, item in enumerate(given):
        message = _message(item, f"input[{index}]")
        last = messages[-1] if messages else None
        is_same_turn = last is not None and last.role == message.role == "assistant"
        if last is not None and is_same_turn and not (last.content and message.content):
            messages[-1] = _together(last, message)
        else:
            messages.append(message)
    return messages


def _message(item: InputItem, param: str) -> Message:
    match item.type:
        case "message":
            if item.role is None or item.content is None:
                raise InvalidRequest(f"{param}: a message has a role and content", param=param)
            if isinstance(item.content, str):
                return Message(item.role, item.content)
            texts = _texts(item.content, f"{param}.content")
            if item.role == "assistant":
                return Message("assistant", "".join(texts))
            return Message(item.role, [ContentPart("text", text) for text in texts])
        case "reasoning":
            content = item.content if isinstance(item.content, list) else []
            texts = _texts([*content, *(item.summary or [])], param)
            return Message("assistant", reasoning_content="\n".join(texts) or None)
        case "function_call":
            if item.call_id is None or item.name is None:
                raise InvalidRequest(f"{param}: a call has a call_id and a name", param=param)
            function = CalledFunction(item.name, item.arguments)
            return Message("assistant", tool_calls=[ToolCall(function, item.call_id)])
        case "function_call_output":
            if item.call_id is None or item.output is None:
                raise InvalidRequest(f"{param}: has a call_id and an output", param=param)
            output = item.output
            if not isinstance(output, str):
                output = "".join(_texts(output, f"{param}.output"))
            return Message("tool", output, tool_call_id=item.call_id)
        case _:
            raise InvalidRequest(
                f"{param}: items of this type are not supported", param=f"{param}.type"
            )


def _texts(parts: Sequence[ItemPart], param: str) -> list[str]:
    texts = []
    for index, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if text is None or part.type not in _TEXTS | {"refusal"}:
            raise InvalidRequest(
                f"{param}[{index}]: only text is supported", param=f"{param}[{index}]"
            )
        texts.append(text)
    return texts


def _together(first: Message, more: Message) -> Message:
    """Two parts of one turn of the model."""
    return Message(
        "assistant",
        first.content or more.content,
        tool_calls=[*(first.tool_calls or []), *(more.tool_calls or [])] or None,
        reasoning_content=first.reasoning_content or more.reasoning_content,
    )


def message_of_output(output: Sequence[dict[str, Any]]) -> Message:
    """What the model said, as the message that a further request goes on from."""
    given = msgspec.convert(list(output), list[InputItem])
    messages = messages_of(given) or [Message("assistant", "")]
    message = messages[0]
    for more in messages[1:]:
        message = msgspec.structs.replace(
            message,
            content=_joined(message.content, more.content),
            tool_calls=[*(message.tool_calls or []), *(more.tool_calls or [])] or None,
        )
    return message


def _joined(first: Any, more: Any) -> str:
    return f"{first or ''}{more or ''}"
