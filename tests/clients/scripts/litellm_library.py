"""LiteLLM, as a library: by its OpenAI and by its Anthropic provider."""

from __future__ import annotations

import json
import os
from typing import Any, Final, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a price list at import

import litellm
from pydantic import BaseModel, Field

MODEL: Final = f"openai/{os.environ['MODEL']}"
SERVER_URL: Final = os.environ["SERVER_URL"]
SERVER: Final[dict[str, Any]] = {
    "api_base": f"{SERVER_URL}/v1",
    "api_key": "none",
    "num_retries": 0,
}
HELLO: Final = [{"role": "user", "content": "Add numbers."}]
WEATHER: Final = {
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


def complete(**options: Any) -> Any:
    given = {"model": MODEL, "messages": HELLO, "max_tokens": 200, "seed": 1, **SERVER, **options}
    return litellm.completion(**given)


def check_plain() -> None:
    answer = complete(max_tokens=8)
    assert answer.choices[0].message.content
    assert 1 <= answer.usage.completion_tokens <= 8


def check_streaming_with_usage() -> None:
    whole = complete(max_tokens=24, temperature=0)
    chunks = list(
        complete(max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def check_tools() -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = complete(tools=[WEATHER], tool_choice=choice)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert is_weather(call.function.arguments)


def check_streamed_tools() -> None:
    pieces = [
        call.function.arguments or ""
        for chunk in complete(
            tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, stream=True
        )
        for call in chunk.choices[0].delta.tool_calls or []
    ]
    assert len(pieces) > 2, "the arguments did not come in pieces"
    assert is_weather("".join(pieces))


def is_weather(arguments: str) -> bool:
    read = json.loads(arguments)
    assert isinstance(read["city"], str)
    assert 1 <= read["days"] <= 14
    return set(read) == {"city", "days"}


def check_structured_output() -> None:
    answer = complete(response_format=Function)
    Function.model_validate_json(answer.choices[0].message.content)


def check_responses() -> None:
    answer: Any = litellm.responses(
        model=MODEL, input="Add numbers.", max_output_tokens=16, **SERVER
    )
    assert answer.status in {"completed", "incomplete"}
    assert answer.usage.output_tokens <= 16
    assert any(part.text for item in answer.output for part in item.content)


def check_anthropic_messages() -> None:
    answer = complete(
        model=f"anthropic/{os.environ['MODEL']}", api_base=SERVER_URL, max_tokens=8, seed=None
    )
    assert answer.choices[0].message.content
    assert 1 <= answer.usage.completion_tokens <= 8


def check_embeddings() -> None:
    answer: Any = litellm.embedding(
        model=MODEL, input=["import os", "a red rose"], encoding_format="float", **SERVER
    )
    first, second = (one["embedding"] for one in answer.data)
    assert len(first) == len(second) > 8
    assert first != second


def check_errors() -> None:
    try:
        complete(model="openai/other")
    except litellm.NotFoundError as error:
        assert "other" in str(error)
    else:
        raise AssertionError("a model that is not there was found")
    try:
        complete(temperature=5)
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a temperature of 5 was taken")
