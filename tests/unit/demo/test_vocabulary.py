"""The tokenizer loses no byte, and its chat template renders what the model was trained on."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from understudy.tools.demo.corpus import Message
from understudy.tools.demo.vocabulary import (
    ASSISTANT_TURN,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    END_OF_TEXT_ID,
    SPECIAL_TOKENS,
    render_conversation,
    train_tokenizer,
)

TEXTS = ("def add(first, second):\n    return first + second\n", "import os\nimport sys\n") * 20
CONVERSATION = (
    Message("system", "You write Python."),
    Message("user", " Write a function that reads a file\n"),
    Message("assistant", "def read(path):\n    return open(path).read()"),
    Message("user", "And one that writes it."),
)


@cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


def render(messages: list[dict[str, object]], *, add_generation_prompt: bool) -> str:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_and_come_first() -> None:
    for index, text in enumerate(SPECIAL_TOKENS):
        assert small_tokenizer().encode(text).ids == [index]
    assert SPECIAL_TOKENS[END_OF_TEXT_ID] == END_OF_TEXT


def test_the_same_texts_give_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, vocab_size=300).to_str() == small_tokenizer().to_str()


@pytest.mark.parametrize("count", range(1, len(CONVERSATION) + 1))
def test_the_chat_template_renders_what_training_rendered(count: int) -> None:
    turns = CONVERSATION[:count]
    messages: list[dict[str, object]] = [turn._asdict() for turn in turns]
    rendered = render_conversation(turns)
    assert render(messages, add_generation_prompt=False) == rendered
    assert render(messages, add_generation_prompt=True) == rendered + ASSISTANT_TURN


def test_the_chat_template_takes_content_in_parts_and_content_that_is_missing() -> None:
    parts = [{"type": "text", "text": "Sort "}, {"type": "text", "text": "a list"}]
    messages: list[dict[str, object]] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
    ]
    assert render(messages, add_generation_prompt=False) == (
        "<|im_start|>user\nSort a list<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
