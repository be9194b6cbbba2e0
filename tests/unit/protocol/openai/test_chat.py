from __future__ import annotations

import json
from typing import Any

import pytest

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.answer import Answer, Heading
from understudy.protocol.openai.chat import ChatCompletion, chat_response, parse_chat
from understudy.protocol.openai.logprobs import TokenLogprob
from understudy.protocol.openai.sampling import ModelTraits

MODEL = ModelTraits(name="m", vocab_size=100, max_model_len=64)
HELLO = [{"role": "user", "content": "hello"}]


def parse(**body: Any) -> ChatCompletion:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO, **body}).encode(), MODEL)


def refused(**body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**body)
    return caught.value


def test_a_plain_body_asks_for_an_answer_to_its_messages() -> None:
    chat = parse()
    assert list(chat.messages) == HELLO
    assert chat.add_generation_prompt
    assert not chat.continue_final_message
    assert chat.generation.max_tokens is None


@pytest.mark.parametrize("messages", [None, []])
def test_there_must_be_a_message(messages: Any) -> None:
    assert refused(messages=messages).param == "messages"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{}], "messages[0]"),
        ([{"content": "x"}], "messages[0]"),
        ([*HELLO, {"role": "robot", "content": "x"}], "messages[1].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "x"},
                        {"type": "image_url", "image_url": {"url": "http://x"}},
                    ],
                }
            ],
            "messages[0].content[1]",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}],
            "messages[0].tool_calls",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}],
            "messages[0].tool_calls",
        ),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
        (HELLO * 65, "messages"),
    ],
)
def test_a_message_that_is_none_is_refused_by_its_place(messages: Any, param: str) -> None:
    assert refused(messages=messages).param == param


def test_messages_reach_the_template_with_what_templates_read() -> None:
    chat = parse(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a", "extra": 1}]},
            {"role": "user", "content": "b", "name": "Ann", "unknown": {"x": 1}},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "hm",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"x": 1}'},
                    }
                ],
            },
            {"role": "tool", "content": "d", "tool_call_id": "c1"},
        ]
    )
    assert list(chat.messages) == [
        {"role": "developer", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": "b", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "f", "arguments": {"x": 1}},
                }
            ],
        },
        {"role": "tool", "content": "d", "tool_call_id": "c1"},
    ]


def test_the_newer_name_for_the_most_tokens_wins() -> None:
    assert parse(max_tokens=3).generation.max_tokens == 3
    assert parse(max_completion_tokens=4).generation.max_tokens == 4
    assert parse(max_tokens=3, max_completion_tokens=4).generation.max_tokens == 4


@pytest.mark.parametrize(
    ("body", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"top_logprobs": 0}, None),
    ],
)
def test_log_probabilities_are_asked_for_in_two_fields(body: Any, logprobs: int | None) -> None:
    assert parse(**body).generation.sampling.logprobs == logprobs


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_log_probabilities_out_of_range_are_refused(body: Any, param: str) -> None:
    assert refused(**body).param == param


def test_a_message_can_be_continued() -> None:
    chat = parse(continue_final_message=True)
    assert chat.continue_final_message
    assert not chat.add_generation_prompt
    both = refused(continue_final_message=True, add_generation_prompt=True)
    assert both.param == "continue_final_message"


def test_template_variables_are_passed_on() -> None:
    assert parse(chat_template_kwargs={"a": [1]}).template_kwargs == {"a": [1]}


@pytest.mark.parametrize(
    "name", ["messages", "tools", "chat_template", "add_generation_prompt", "a b"]
)
def test_template_variables_cannot_be_what_has_a_field_of_its_own(name: str) -> None:
    assert refused(chat_template_kwargs={name: 1}).param == "chat_template_kwargs"


def test_there_are_only_so_many_template_variables() -> None:
    many = {f"x{index}": 1 for index in range(65)}
    assert refused(chat_template_kwargs=many).param == "chat_template_kwargs"


def test_an_answer_in_one_piece_has_openais_shape() -> None:
    logprob = TokenLogprob(b" h", -0.5, (TokenLogprob(b" h", -0.5), TokenLogprob(b"\xc3", -2.0)))
    answers = [Answer(0, " hi", 2, "stop", [logprob]), Answer(1, "", 1, "length", None)]
    assert chat_response(
        Heading("chatcmpl-1", 5, "m"), answers, num_prompt_tokens=3, num_cached_tokens=1
    ) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " hi", "refusal": None},
                "logprobs": {
                    "content": [
                        {
                            "token": " h",
                            "logprob": -0.5,
                            "bytes": [32, 104],
                            "top_logprobs": [
                                {"token": " h", "logprob": -0.5, "bytes": [32, 104]},
                                {"token": "\ufffd", "logprob": -2.0, "bytes": [195]},
                            ],
                        }
                    ],
                    "refusal": None,
                },
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
