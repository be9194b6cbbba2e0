"""Marks as tokens: found in whatever surroundings, and spelled as the parser reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import (
    SPECIAL_TOKENS,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    write_tokenizer,
)
from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.deltas import ContentDelta, ReasoningDelta
from understudy.protocol.request import Thinking
from understudy.runtime.parsers.output_parser import OutputParser
from understudy.runtime.parsers.thinking import thinking_of
from understudy.runtime.scheduling.thinking import Phase, progress_of
from understudy.runtime.tokenizer import Tokenizer
from understudy.tools.demo.paths import demo_model_directory

DEMO = Tokenizer.from_directory(demo_model_directory())
AROUND = st.sampled_from(["", "\n", "\n\n", " ", "x = 1", "so.", "{", "größe"])


@dataclass
class Parsing:
    """How the parser reads it."""

    begins_in_reasoning: bool
    reasoning_parser: str = "qwen3"
    tool_parser: str = ""
    calls_max: int = 0
    tools: dict[str, dict[str, str]] = field(default_factory=dict)


def marks_of(tokenizer: Tokenizer, *, is_open: bool, budget: int | None = None) -> Thinking:
    return thinking_of(
        "qwen3",
        tokenizer,
        is_open=is_open,
        budget=budget,
        has_grammar=False,
        vocab_size=1 << 20,
    )


def encode(text: str) -> list[int]:
    return DEMO.encode(text, add_special_tokens=False)


@given(AROUND, AROUND)
def test_a_closing_mark_is_found_wherever_it_stands(before: str, after: str) -> None:
    thinking = marks_of(DEMO, is_open=True)
    tokens = encode(f"{before}</think>{after}")
    assert progress_of(thinking, tokens).phase is Phase.ANSWER


@given(st.sampled_from(["", "\n", "\n\n"]), AROUND)
def test_an_opening_mark_is_found_at_the_beginning_only(before: str, after: str) -> None:
    thinking = marks_of(DEMO, is_open=False)
    assert progress_of(thinking, encode(f"{before}<think>{after}")).phase is Phase.THOUGHTS
    assert progress_of(thinking, encode(f"x{before}<think>{after}")).phase is Phase.ANSWER


@given(st.lists(st.integers(3, 4095), max_size=8), st.booleans())
def test_forced_tokens_close_the_thoughts_for_the_parser(
    thoughts: list[int], is_open: bool
) -> None:
    """Also behind half a character."""
    thinking = marks_of(DEMO, is_open=is_open, budget=len(thoughts))
    opening = [] if is_open else encode("<think>\n")
    text = DEMO.decode([*opening, *thoughts, *thinking.forced, *encode("answer")])
    parser = OutputParser(Parsing(begins_in_reasoning=is_open))
    deltas = [*parser.push(text), *parser.finish()]
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    assert content == "answer"
    assert all(isinstance(delta, ContentDelta | ReasoningDelta) for delta in deltas)


def test_a_model_with_tokens_for_its_marks_needs_no_more_than_them(tmp_path: Path) -> None:
    special = (*SPECIAL_TOKENS, "<think>", "</think>")
    write_tokenizer(tmp_path, byte_level_tokenizer(special_tokens=special))
    tokenizer = Tokenizer.from_directory(tmp_path)
    opening, closing = (tokenizer.encode(m, add_special_tokens=False) for m in special[-2:])
    thinking = marks_of(tokenizer, is_open=False, budget=3)
    assert thinking.closings == (tuple(closing),)
    assert tuple(opening) in thinking.openings
    assert closing[0] in thinking.forced
    formed = thinking_of(
        "qwen3", tokenizer, is_open=False, budget=None, has_grammar=True, vocab_size=480
    )
    assert formed.openings == (tuple(opening),)
    assert formed.forced == ()


def test_pieces_with_a_mark_for_the_space_work_as_well(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, sentencepiece_tokenizer())
    tokenizer = Tokenizer.from_directory(tmp_path)
    thinking = marks_of(tokenizer, is_open=True, budget=2)
    tokens = tokenizer.encode("the fox</think>def", add_special_tokens=False)
    assert progress_of(marks_of(tokenizer, is_open=True), tokens).phase is Phase.ANSWER
    assert "</think>" in tokenizer.decode(thinking.forced)


def test_a_token_beyond_the_logits_cannot_be_forced() -> None:
    with pytest.raises(InvalidRequest) as refused:
        thinking_of("qwen3", DEMO, is_open=True, budget=1, has_grammar=False, vocab_size=9)
    assert refused.value.param == "thinking_token_budget"
