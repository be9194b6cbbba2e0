"""OpenAI's client for Python."""

from __future__ import annotations

import base64
import json
import os
import struct
from typing import Any, Final, Literal

import openai
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel, Field

MODEL: Final = os.environ["MODEL"]
CLIENT: Final = OpenAI(
    base_url=f"{os.environ['SERVER_URL']}/v1", api_key="none", max_retries=0, timeout=60
)
HELLO: Final[list[ChatCompletionMessageParam]] = [{"role": "user", "content": "Add numbers."}]
WEATHER: Final[ChatCompletionToolParam] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Function(BaseModel):
    """What the client makes a schema of by itself."""

    kind: Literal["method", "function"]
    num_arguments: int = Field(ge=0, le=9)


def check_models() -> None:
    assert MODEL in [model.id for model in CLIENT.models.list()]
    assert CLIENT.models.retrieve(MODEL).id == MODEL


def check_plain() -> None:
    answer = CLIENT.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8
    completion = CLIENT.completions.create(model=MODEL, prompt="def add(a, b):\n", max_tokens=8)
    assert completion.choices[0].text


def check_streaming_with_usage() -> None:
    whole = CLIENT.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=24, temperature=0
    )
    *chunks, last = CLIENT.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert last.usage == whole.usage
    assert last.choices == []


def check_tools() -> None:
    answer = CLIENT.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=200,
        seed=1,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert answer.choices[0].finish_reason in {"stop", "tool_calls"}
    assert is_weather(calls[0].function.arguments)


def check_streamed_tools() -> None:
    pieces: list[str] = []
    for chunk in CLIENT.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        seed=2,
        stream=True,
    ):
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.function is not None
            pieces.append(call.function.arguments or "")
    assert len(pieces) > 2, "the arguments did not come in pieces"
    assert is_weather("".join(pieces))


def is_weather(arguments: str) -> bool:
    read = json.loads(arguments)
    assert isinstance(read["city"], str)
    assert 1 <= read["days"] <= 14
    return set(read) == {"city", "days"}


def check_structured_output() -> None:
    answer = CLIENT.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Function, max_tokens=150, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Function)


def check_structured_output_of_a_response() -> None:
    response = CLIENT.responses.parse(
        model=MODEL, input="a function", text_format=Function, max_output_tokens=150
    )
    assert isinstance(response.output_parsed, Function)


def check_a_response_in_the_background_is_joined_again() -> None:
    first: list[Any] = []
    stream = CLIENT.responses.create(
        model=MODEL,
        input="Add numbers.",
        background=True,
        stream=True,
        max_output_tokens=64,
        extra_body={"ignore_eos": True},
    )
    for event in stream:
        first.append(event)
        if len(first) == 6:
            stream.close()  # as a connection that is lost
            break
    response_id = first[0].response.id
    cut = first[-1].sequence_number
    rest: list[Any] = list(CLIENT.responses.retrieve(response_id, stream=True, starting_after=cut))
    numbers = [event.sequence_number for event in (*first, *rest)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert rest[-1].type == "response.incomplete", "it has as many tokens as it may have"
    told = "".join(
        event.delta for event in (*first, *rest) if event.type == "response.output_text.delta"
    )
    kept = CLIENT.responses.retrieve(response_id)
    assert kept.status == "incomplete"
    assert told == kept.output_text == rest[-1].response.output_text
    assert kept.usage is not None
    assert kept.usage.output_tokens == 64
    CLIENT.responses.delete(response_id)


def check_embeddings() -> None:
    texts = ["import os", "a red rose"]
    answer = CLIENT.embeddings.create(model=MODEL, input=texts)  # the client asks for base64
    assert [one.index for one in answer.data] == [0, 1]
    assert answer.usage.prompt_tokens > 0
    first, second = (one.embedding for one in answer.data)
    assert len(first) == len(second) > 8
    assert any(first)
    assert first != second
    floats = CLIENT.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    packed = struct.pack(f"<{len(first)}f", *first)
    assert packed == struct.pack(f"<{len(first)}f", *floats.data[0].embedding)
    raw: Any = CLIENT.embeddings.create(model=MODEL, input=texts, encoding_format="base64")
    assert base64.b64decode(raw.data[0].embedding) == packed


def check_errors() -> None:
    try:
        CLIENT.chat.completions.create(model="other", messages=HELLO)
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("a model that is not there was found")
    try:
        CLIENT.chat.completions.create(model=MODEL, messages=HELLO, temperature=5)
    except openai.BadRequestError as error:
        assert error.param == "temperature"
    else:
        raise AssertionError("a temperature of 5 was taken")
