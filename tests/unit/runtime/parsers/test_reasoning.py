from __future__ import annotations

import pytest

from understudy.protocol.openai.deltas import ParsedText, put_together
from understudy.runtime.parsers.reasoning import ReasoningParser, begins_inside


def parse(name: str, text: str, *, is_inside: bool = False) -> ParsedText:
    """What a text comes to; the same character by character as at once."""
    results = []
    for pieces in ([text], list(text)):
        parser = ReasoningParser(name, is_inside=is_inside)
        deltas = [delta for piece in pieces for delta in parser.push(piece)]
        results.append(put_together([*deltas, *parser.finish()]))
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize(
    ("text", "is_inside", "reasoning", "content"),
    [
        ("<think>\nso\n\nit is\n</think>\n\nFour.", False, "so\n\nit is", "Four."),
        ("so it is</think>Four.", True, "so it is", "Four."),
        ("<think>so</think>Four.", True, "so", "Four."),
        (" Four.", False, "", " Four."),
        ("Four <think>.</think>", False, "", "Four <think>.</think>"),
        ("so it ", True, "so it ", ""),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("<thi", False, "", "<thi"),
        ("", True, "", ""),
    ],
)
def test_thoughts_and_answer_are_told_apart(
    text: str, is_inside: bool, reasoning: str, content: str
) -> None:
    assert parse("qwen3", text, is_inside=is_inside) == ParsedText(content, reasoning, ())


def test_mistral_thinks_between_marks_of_its_own() -> None:
    assert parse("mistral", "[THINK]a[/THINK]b") == ParsedText("b", "a", ())


@pytest.mark.parametrize(
    ("name", "prompt", "is_inside"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "user: <think>\nassistant: ", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("deepseek_r1", "assistant: ", True),
        ("deepseek_r1", "assistant: <think>\n</think>\n", False),
    ],
)
def test_the_prompt_says_where_an_answer_begins(name: str, prompt: str, is_inside: bool) -> None:
    assert begins_inside(name, prompt) is is_inside


@pytest.mark.parametrize(
    ("name", "begun", "is_inside"),
    [
        ("qwen3", "<think>so", True),
        ("qwen3", "<think>so</think>Fo", False),
        ("qwen3", "Fo", False),
        ("deepseek_r1", "so", True),
        ("deepseek_r1", "so</think>Fo", False),
    ],
)
def test_an_answer_that_goes_on_says_it_itself(name: str, begun: str, is_inside: bool) -> None:
    assert begins_inside(name, "prompt " + begun, begun=begun) is is_inside
