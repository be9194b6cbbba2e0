"""Grammars compiled: what they let pass is what was asked for, byte by byte and token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import Tokenizer as Backend

from tests.tiny_models import (
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    write_model,
    write_tokenizer,
)
from understudy.protocol.openai.structured_output import (
    choice_grammar,
    json_grammar,
    lark_or_gbnf_grammar,
    regex_grammar,
)
from understudy.runtime.grammars import (
    PROTOTYPES_MAX,
    GrammarError,
    Grammars,
    GrammarVocabulary,
    load_vocabulary,
    make_vocabulary,
)
from understudy.runtime.tokenizer import Tokenizer
from understudy.tools.demo.paths import demo_model_directory

TOKENIZER = Tokenizer.from_directory(demo_model_directory())


@cache
def vocabulary() -> GrammarVocabulary:
    return load_vocabulary(demo_model_directory())


@cache
def byte_tokens() -> dict[int, int]:
    """The token of each byte."""
    spelled = {TOKENIZER.spell(token): token for token in range(TOKENIZER.vocab_size)}
    return {byte: spelled[bytes([byte])] for byte in range(256)}


def accepts(grammar: str, text: str) -> bool:
    """Whether a text is a complete answer, however its tokens are cut."""
    matcher = vocabulary().compile(grammar)
    whole = TOKENIZER.encode(text, add_special_tokens=False)
    single = [byte_tokens()[byte] for byte in text.encode()]
    verdicts = set()
    for token_ids in (whole, single):
        fresh = matcher.deep_copy()
        verdicts.add(fresh.consume_tokens(token_ids) and fresh.is_accepting())
    assert len(verdicts) == 1
    return verdicts.pop()


def allowed(matcher: LLMatcher) -> set[int]:
    return bits_of(matcher.compute_bitmask())


def bits_of(mask: bytes) -> set[int]:
    bits = np.frombuffer(mask, dtype=np.uint8)
    return {int(token) for token in np.flatnonzero(np.unpackbits(bits, bitorder="little"))}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5), st.text(max_size=12))
def test_a_choice_is_one_of_the_choices(choices: list[str], other: str) -> None:
    grammar = choice_grammar(choices, param="p").text
    assert all(accepts(grammar, choice) for choice in choices)
    assert accepts(grammar, other) == (other in choices)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=12))
def test_a_text_as_a_regular_expression_is_itself(text: str) -> None:
    assert accepts(regex_grammar(re.escape(text).replace("\\ ", " "), param="p").text, text)


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        (r"a/b", "a/b", "a"),
        (r"a\/b", "a/b", r"a\/b"),
        (r"\\/", "\\/", "/"),
        ("[/]+", "//", ""),
        ("a\nb", "a\nb", "ab"),
        (r"\d{3}-\w+", "123-ab", "12-ab"),
        ("^abc$", "abc", "abcd"),
        ("a|b", "b", "c"),
        ("é+", "éé", "e"),
    ],
)
def test_a_regular_expression_matches_the_whole_answer(regex: str, good: str, bad: str) -> None:
    grammar = regex_grammar(regex, param="p").text
    assert accepts(grammar, good)
    assert not accepts(grammar, bad)


# DEL may stand in JSON as it is, but is asked to be escaped.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(TEXTS, JSON, max_size=3), st.sampled_from([None, 1, 4]))
def test_a_json_object_may_be_written_in_the_usual_ways(
    value: dict[str, Any], indent: int | None
) -> None:
    grammar = json_grammar({"type": "object"}, param="p").text
    assert accepts(grammar, json.dumps(value, indent=indent, ensure_ascii=False))
    assert accepts(grammar, json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def test_whitespace_between_the_parts_of_json_has_an_end() -> None:
    grammar = json_grammar({"type": "object"}, param="p").text
    assert accepts(grammar, '{\n  "a": 1\n}')
    assert not accepts(grammar, '{  "a": 1}')
    assert not accepts(grammar, "{\n\n}")
    assert not accepts(grammar, "{\n" + 100 * " " + "}")


def test_lark_may_be_recursive() -> None:
    grammar = lark_or_gbnf_grammar('start: "(" start ")" | "x"', param="p").text
    assert accepts(grammar, "(((x)))")
    assert not accepts(grammar, "((x)")


def test_the_first_mask_allows_what_can_begin_the_answer_and_no_more() -> None:
    matcher = vocabulary().compile(choice_grammar(["yes", "no"], param="p").text)
    spelled = {TOKENIZER.spell(token) for token in allowed(matcher)}
    assert spelled
    assert all(b"yes".startswith(each) or b"no".startswith(each) for each in spelled)
    assert allowed(matcher).isdisjoint(TOKENIZER.special_ids)


def test_a_complete_answer_is_followed_by_its_end_alone() -> None:
    matcher = vocabulary().compile(choice_grammar(["yes"], param="p").text)
    assert matcher.consume_tokens(TOKENIZER.encode("yes", add_special_tokens=False))
    assert allowed(matcher) == set(vocabulary().eos_token_ids)


def test_an_answer_that_may_end_or_go_on_may_do_both() -> None:
    matcher = vocabulary().compile("start: /a+/")
    assert matcher.consume_tokens(TOKENIZER.encode("a", add_special_tokens=False))
    assert vocabulary().eos_token_ids < allowed(matcher)


def test_logits_that_no_token_belongs_to_are_in_no_mask() -> None:
    width = TOKENIZER.vocab_size + 1000
    wide = make_vocabulary(TOKENIZER, width, vocabulary().eos_token_ids)
    beyond = TOKENIZER.vocab_size + 4
    for grammar in ("start: /(.|\\n)*/", "start: <[*]>", f"start: <[0,70,{beyond}]>"):
        mask = wide.mask(wide.compile(grammar))
        assert len(mask) * 8 >= width
        assert 70 in bits_of(mask)
        assert max(bits_of(mask)) < TOKENIZER.vocab_size
    with pytest.raises(GrammarError):
        wide.mask(wide.compile(f"start: <[{beyond}]>"))


def test_a_vocabulary_may_be_wider_than_the_logits() -> None:
    narrow = make_vocabulary(TOKENIZER, 500, vocabulary().eos_token_ids)
    assert max(allowed(narrow.compile("start: /(.|\\n)*/"))) < 500


def test_a_vocabulary_without_an_end_is_refused() -> None:
    with pytest.raises(GrammarError):
        make_vocabulary(TOKENIZER, 500, frozenset())


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "start: x",
        "start: /(/",
        'start: "a',
        '{"grammars": 1}',
        json_grammar({"type": 1}, param="p").text,
        json_grammar({"type": "array", "uniqueItems": True}, param="p").text,
        json_grammar({"$ref": "http://127.0.0.1:9/x.json"}, param="p").text,
        json_grammar({"$ref": "file:///etc/passwd"}, param="p").text,
        "start: " + "(" * 5000 + '"a"' + ")" * 5000,
    ],
)
def test_what_cannot_be_compiled_is_an_error_that_shows_no_state(grammar: str) -> None:
    with pytest.raises(GrammarError) as caught:
        vocabulary().compile(grammar)
    assert "<state>" not in str(caught.value)


def test_a_grammar_is_compiled_once_and_each_matcher_goes_its_own_way() -> None:
    grammars = Grammars(vocabulary)
    first, second = (grammars.matcher("start: /a+b/") for _ in range(2))
    assert first.consume_tokens(TOKENIZER.encode("aa", add_special_tokens=False))
    fresh = vocabulary().compile("start: /a+b/")
    assert allowed(second) == allowed(fresh) != allowed(first)


def test_an_error_is_an_error_every_time() -> None:
    grammars = Grammars(vocabulary)
    for _ in range(2):
        with pytest.raises(GrammarError):
            grammars.matcher("start: x")


def test_grammars_are_forgotten_and_compiled_again() -> None:
    grammars = Grammars(vocabulary)
    for number in range(2 * PROTOTYPES_MAX):
        grammars.matcher(f'start: "a{number}"')
    assert allowed(grammars.matcher('start: "a0"')) == allowed(vocabulary().compile('start: "a0"'))


@pytest.mark.parametrize(
    ("kind", "end"), [(byte_level_tokenizer, "<|endoftext|>"), (sentencepiece_tokenizer, "</s>")]
)
def test_any_kind_of_tokenizer_can_follow_a_grammar_to_its_end(
    kind: Callable[[], Backend], end: str, tmp_path: Path
) -> None:
    write_model(tmp_path, eos_token_id=2)
    write_tokenizer(tmp_path, kind(), eos_token=end)
    loaded = load_vocabulary(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    schema = {
        "type": "object",
        "properties": {"the fox": {"const": "ü"}},
        "required": ["the fox"],
        "additionalProperties": False,
    }
    matcher = loaded.compile(json_grammar(schema, param="p").text)
    made: list[int] = []
    while not allowed(matcher) <= loaded.eos_token_ids:
        # The longest token that the grammar allows: so nothing is padded with spaces.
        made.append(max(allowed(matcher), key=lambda token: len(tokenizer.spell(token).strip())))
        assert matcher.consume_token(made[-1])
        assert len(made) < 200
    assert json.loads(b"".join(map(tokenizer.spell, made)))["the fox"] == "ü"
