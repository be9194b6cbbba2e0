"""LangChain's chat model and embeddings for OpenAI's API: the package langchain-openai."""

from __future__ import annotations

import os
from typing import Any, Final, Literal

import openai
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

MODEL: Final = os.environ["MODEL"]
BASE_URL: Final = f"{os.environ['SERVER_URL']}/v1"


class Weather(BaseModel):
    """How it is outside."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=14)


def chat_model(**options: Any) -> Any:
    given = {"model": MODEL, "max_tokens": 200, "max_retries": 0, "seed": 1, **options}
    return ChatOpenAI(base_url=BASE_URL, api_key="none", **given)


def check_plain() -> None:
    message = chat_model(max_tokens=8).invoke("Add numbers.")
    assert message.content
    assert 1 <= message.usage_metadata["output_tokens"] <= 8
    assert message.response_metadata["model_name"] == MODEL


def check_streaming_with_usage() -> None:
    whole = chat_model(max_tokens=24, temperature=0).invoke("Add numbers.")
    total: Any = None
    for chunk in chat_model(max_tokens=24, temperature=0, stream_usage=True).stream("Add numbers."):
        assert isinstance(chunk, AIMessageChunk)
        total = chunk if total is None else total + chunk
    assert total.content == whole.content
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


def check_tools() -> None:
    model = chat_model().bind_tools([Weather], tool_choice="Weather")
    message = model.invoke("How will it be?")
    assert not message.invalid_tool_calls
    [call] = message.tool_calls
    assert call["name"] == "Weather"
    Weather.model_validate(call["args"])
    result = ToolMessage("rain", tool_call_id=call["id"])
    again = chat_model(max_tokens=8).invoke([HumanMessage("How will it be?"), message, result])
    assert again.usage_metadata["output_tokens"] > 0


def check_streamed_tools() -> None:
    total: Any = None
    num_pieces = 0
    model = chat_model().bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
    for chunk in model.stream("How will it be?"):
        num_pieces += len(chunk.tool_call_chunks)
        total = chunk if total is None else total + chunk
    assert num_pieces > 2, "the arguments did not come in pieces"
    assert not total.invalid_tool_calls
    Weather.model_validate(total.tool_calls[0]["args"])


def check_structured_output() -> None:
    methods: list[Literal["json_schema", "function_calling"]] = ["json_schema", "function_calling"]
    for method in methods:
        model = chat_model().with_structured_output(Weather, method=method)
        assert isinstance(model.invoke("How will it be?"), Weather), method


def check_responses() -> None:
    # Responses have no seed.
    model = chat_model(max_tokens=16, use_responses_api=True, seed=None)
    message = model.invoke("Add numbers.")
    assert message.text
    assert message.response_metadata["id"].startswith("resp_")
    further = model.invoke("And then?", previous_response_id=message.response_metadata["id"])
    assert further.usage_metadata["input_tokens"] > message.usage_metadata["input_tokens"]


def check_embeddings() -> None:
    # Else it looks for OpenAI's own tokenizer on the network.
    embeddings = OpenAIEmbeddings(
        model=MODEL, base_url=BASE_URL, api_key="none", check_embedding_ctx_length=False
    )
    first, second = embeddings.embed_documents(["import os", "a red rose"])
    assert len(first) == len(second) > 8
    assert first != second
    assert embeddings.embed_query("import os") == first


def check_errors() -> None:
    try:
        chat_model(model="other").invoke("Add numbers.")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("a model that is not there was found")
