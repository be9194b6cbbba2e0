"""Calls of tools and thoughts, over HTTP: streamed, in one piece, and joined again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from tests.http_harness import CHAT, HELLO, MODEL, Event, Harness, events, saying_text, serving
from tests.tiny_models import CHATML, TURN_START, write_model
from understudy.protocol.openai.presentation import decode_presentation
from understudy.runtime.parsers.names import TOOL_PARSERS

TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "how it is outside",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
BODY: Final = {"model": MODEL, "messages": HELLO, "tools": TOOLS}
TEMPLATE: Final = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML
THINKING: Final = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
TWO_CALLS: Final = (
    "<think>\nlet me see\n</think>\n\nOne moment.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "🦊"}}\n</tool_call>'
)
ARGUMENTS: Final = [{"city": "Zürich", "days": 2}, {"city": "🦊"}]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path, chat_template=TEMPLATE, max_position_embeddings=4096)


def message_of(stream: list[Event], index: int = 0) -> tuple[dict[str, Any], str | None]:
    """What the deltas of a choice come to, and how it ended."""
    message: dict[str, Any] = {"tool_calls": []}
    finish = None
    for event in stream:
        if event.comment is not None or event.data == "[DONE]":
            continue
        for choice in event.data["choices"]:
            if choice["index"] != index:
                continue
            finish = choice["finish_reason"] or finish
            for name, value in choice["delta"].items():
                if name != "tool_calls":
                    message[name] = message.get(name, "") + value
                    continue
                for call in value:
                    add_call(message["tool_calls"], call)
    return message, finish


def add_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    if delta["index"] == len(calls):
        calls.append({"id": delta["id"], "type": delta["type"], "function": {"name": ""}})
        calls[-1]["function"] = {"name": delta["function"]["name"], "arguments": ""}
    else:
        assert "id" not in delta
    calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]


async def join(harness: Harness, stream_id: str, last_event_id: str) -> list[Event]:
    headers = {"Last-Event-ID": last_event_id}
    async with harness.session.get(f"/v1/streams/{stream_id}", headers=headers) as response:
        assert response.status == 200, await response.text()
        return [event async for event in events(response)]


async def test_calls_are_told_with_their_arguments(directory: Path) -> None:
    script = saying_text(directory, TWO_CALLS)
    async with serving(
        directory, script, tool_parser="hermes", reasoning_parser="qwen3"
    ) as harness:
        answer = await harness.answer(CHAT, BODY)
        prompt = harness.served.tokenizer.decode(harness.gateway.submitted[0].prompt)
    [choice] = answer["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "One moment."
    assert message["reasoning"] == message["reasoning_content"] == "let me see"
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == (
        ARGUMENTS
    )
    assert {call["function"]["name"] for call in message["tool_calls"]} == {"weather"}
    ids = {call["id"] for call in message["tool_calls"]}
    assert len(ids) == 2
    assert json.dumps(TOOLS[0]["function"]) in prompt


async def test_a_stream_comes_to_the_same_as_an_answer_in_one_piece(directory: Path) -> None:
    script = saying_text(directory, TWO_CALLS)
    async with serving(
        directory, script, tool_parser="hermes", reasoning_parser="qwen3"
    ) as harness:
        answer = await harness.answer(CHAT, {**BODY, "n": 2, "seed": 1})
        stream = await harness.stream(CHAT, {**BODY, "n": 2, "seed": 1})
    assert stream[-1].data == "[DONE]"
    for choice in answer["choices"]:
        message, finish = message_of(stream, choice["index"])
        whole = choice["message"]
        assert finish == choice["finish_reason"] == "tool_calls"
        for name in ("role", "content", "reasoning", "reasoning_content"):
            assert message[name] == whole[name]
        told = [call["function"] for call in message["tool_calls"]]
        assert told == [call["function"] for call in whole["tool_calls"]]


async def test_a_stream_can_be_joined_behind_each_event(directory: Path) -> None:
    script = saying_text(directory, TWO_CALLS)
    async with serving(
        directory, script, tool_parser="hermes", reasoning_parser="qwen3"
    ) as harness:
        stream = await harness.stream(CHAT, BODY)
        told = [event for event in stream if event.comment is None]
        stream_id = told[0].data["id"]
        whole = message_of(told)
        assert len(told) > 20
        for cut in range(1, len(told) - 1):
            event_id = told[cut - 1].event_id
            assert event_id is not None
            rest = await join(harness, stream_id, event_id)
            assert message_of(told[:cut] + rest) == whole


async def test_a_stop_string_in_a_call_ends_the_answer(directory: Path) -> None:
    script = saying_text(directory, TWO_CALLS)
    body = {**BODY, "stop": ['", "days']}
    async with serving(
        directory, script, tool_parser="hermes", reasoning_parser="qwen3"
    ) as harness:
        answer = await harness.answer(CHAT, body)
        stream = await harness.stream(CHAT, body)
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "Zürich'
    message, finish = message_of(stream)
    assert message["tool_calls"][0]["function"] == call["function"]
    assert finish == "tool_calls"


async def test_without_parallel_calls_the_request_ends_before_the_second(directory: Path) -> None:
    script = saying_text(directory, TWO_CALLS)
    body = {**BODY, "parallel_tool_calls": False}
    async with serving(
        directory, script, tool_parser="hermes", reasoning_parser="qwen3"
    ) as harness:
        answer = await harness.answer(CHAT, body)
        message, finish = message_of(await harness.stream(CHAT, body))
        assert len(harness.gateway.cancelled) == 2
    [choice] = answer["choices"]
    assert choice["finish_reason"] == finish == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert message["tool_calls"][0]["function"] == call["function"]


async def test_at_the_limit_of_tokens_a_call_is_cut_and_said_to_be(directory: Path) -> None:
    script = saying_text(directory, TWO_CALLS)
    async with serving(directory, script, tool_parser="hermes") as harness:
        whole = len(harness.tokens(TWO_CALLS.partition('"days')[0]))
        answer = await harness.answer(CHAT, {**BODY, "max_tokens": whole})
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["arguments"].startswith('{"city": "Zürich"')


async def test_with_choice_none_calls_are_only_text(directory: Path) -> None:
    script = saying_text(directory, TWO_CALLS)
    async with serving(directory, script, tool_parser="hermes") as harness:
        answer = await harness.answer(CHAT, {**BODY, "tool_choice": "none"})
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == TWO_CALLS
    assert "tool_calls" not in choice["message"]


async def test_marks_that_are_special_tokens_are_seen(directory: Path) -> None:
    # The model's own turn mark plays the part of one that its tokenizer hides.
    path = directory / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(TURN_START, "[TOOL_CALLS]"))
    script = saying_text(directory, 'x[TOOL_CALLS][{"name": "weather", "arguments": {}}]')
    async with serving(directory, script, tool_parser="mistral") as harness:
        answer = await harness.answer(CHAT, BODY)
        plain = await harness.answer(CHAT, {**BODY, "tool_choice": "none"})
        assert harness.served.traits(max_model_len=0).mark_ids == (("[TOOL_CALLS]", 1),)
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": "{}"}
    assert len(call["id"]) == 9
    assert "[TOOL_CALLS]" not in plain["choices"][0]["message"]["content"]


async def test_the_types_of_parameters_stay_with_the_request(directory: Path) -> None:
    text = (
        "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
    )
    script = saying_text(directory, text)
    async with serving(directory, script, tool_parser="qwen3_coder") as harness:
        answer = await harness.answer(CHAT, BODY)
        [request] = harness.gateway.submitted
    assert decode_presentation(request.presentation).tools == {
        "weather": {"city": "string", "days": "integer"}
    }
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Ulm", "days": 3}


async def test_thoughts_that_the_prompt_has_opened_are_told_apart(tmp_path: Path) -> None:
    directory = write_model(tmp_path, chat_template=THINKING, max_position_embeddings=4096)
    script = saying_text(directory, "hm\n\nso</think>\nYes.")
    body = {"model": MODEL, "messages": HELLO}
    async with serving(directory, script, reasoning_parser="qwen3") as harness:
        answer = await harness.answer(CHAT, body)
        message, finish = message_of(await harness.stream(CHAT, body))
    [choice] = answer["choices"]
    assert choice["message"]["reasoning_content"] == message["reasoning_content"] == "hm\n\nso"
    assert choice["message"]["content"] == message["content"] == "Yes."
    assert choice["finish_reason"] == finish == "stop"


async def test_usage_is_told_with_each_chunk_of_calls(directory: Path) -> None:
    script = saying_text(directory, "<tool_call>")
    async with serving(directory, script, tool_parser="hermes") as harness:
        usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        stream = await harness.stream(CHAT, {**BODY, **usage})
    last = [event.data for event in stream if event.comment is None][-2]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == stream[-3].data["usage"]["completion_tokens"]


@pytest.mark.parametrize("parser", TOOL_PARSERS)
@pytest.mark.parametrize("choice", ["required", {"function": {"name": "weather"}}])
async def test_a_forced_call_has_a_grammar(directory: Path, parser: str, choice: Any) -> None:
    llguidance = pytest.importorskip("llguidance")
    async with serving(directory, saying_text(directory, "x"), tool_parser=parser) as harness:
        await harness.answer(CHAT, {**BODY, "tool_choice": choice})
        await harness.answer(CHAT, BODY)
        forced, free = harness.gateway.submitted
    assert free.params.grammar == ""
    grammar = llguidance.LLMatcher.grammar_from_lark(forced.params.grammar)
    assert not llguidance.LLMatcher.validate_grammar(grammar, llguidance.LLTokenizer("byte"))
    presentation = decode_presentation(forced.presentation)
    assert presentation.calls_max == (0 if choice == "required" else 1)


async def test_a_forced_call_may_come_behind_thoughts(tmp_path: Path) -> None:
    directory = write_model(tmp_path, chat_template=THINKING, max_position_embeddings=4096)
    async with serving(
        directory,
        saying_text(directory, "x"),
        tool_parser="hermes",
        reasoning_parser="qwen3",
    ) as harness:
        await harness.answer(CHAT, {**BODY, "tool_choice": "required"})
        [request] = harness.gateway.submitted
    assert request.params.grammar.startswith("start: thoughts ")


async def test_tools_that_the_template_does_not_show_are_named_as_ignored(
    directory: Path, tmp_path: Path
) -> None:
    blind = write_model(tmp_path / "blind", max_position_embeddings=4096)
    for model, ignored in ((directory, None), (blind, "tools")):
        async with (
            serving(model, saying_text(model, "x"), tool_parser="hermes") as harness,
            harness.post(CHAT, BODY) as response,
        ):
            assert response.status == 200
            assert response.headers.get("X-Ignored-Fields") == ignored
