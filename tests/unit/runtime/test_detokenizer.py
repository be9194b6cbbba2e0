from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.tiny_models import (
    END_OF_TEXT_ID,
    VOCAB_SIZE,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    write_tokenizer,
)
from understudy.protocol.request import FinishReason
from understudy.runtime.detokenizer import Detokenizer, StopStrings
from understudy.runtime.tokenizer import Tokenizer

LENGTH = FinishReason.LENGTH
STOP = FinishReason.STOP

token_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40)
texts = st.text(alphabet="ab \nßい🦊", max_size=24)
stop_strings = st.lists(
    st.text(alphabet="ab \nßい🦊\ufffd", min_size=1, max_size=5), min_size=1, max_size=3
)
groupings = st.lists(st.integers(1, 5), min_size=40, max_size=40)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("byte_level")
    write_tokenizer(directory, byte_level_tokenizer())
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("sentencepiece")
    write_tokenizer(directory, sentencepiece_tokenizer(), bos_token="<s>", eos_token="</s>")
    return Tokenizer.from_directory(directory)


def grouped(tokens: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    groups = []
    start = 0
    for size in sizes:
        if start >= len(tokens):
            break
        groups.append(tokens[start : start + size])
        start += size
    return groups or [()]


def run(detokenizer: Detokenizer, groups: Sequence[Sequence[int]], finish: int) -> tuple[str, int]:
    """The text, and the number of tokens that count."""
    text = ""
    num_tokens = 0
    for place, group in enumerate(groups):
        is_last = place == len(groups) - 1
        delta = detokenizer.push(group, finish if is_last else 0)
        text += delta.text
        num_tokens += delta.num_tokens
        if delta.is_stopped:
            break
    return text, num_tokens


@given(tokens=token_ids, sizes=groupings)
def test_deltas_make_the_text_of_any_tokens(
    byte_level: Tokenizer, tokens: list[int], sizes: list[int]
) -> None:
    text, num_tokens = run(Detokenizer(byte_level), grouped(tokens, sizes), LENGTH)
    assert text == byte_level.decode(tokens)
    assert num_tokens == len(tokens)


@given(text=st.text(max_size=40), sizes=groupings)
def test_deltas_make_a_sentencepiece_text(
    sentencepiece: Tokenizer, text: str, sizes: list[int]
) -> None:
    tokens = sentencepiece.encode(text, add_special_tokens=True)[:40]
    whole = sentencepiece.decode(tokens)
    assume("\ufffd" not in whole)
    made, _ = run(Detokenizer(sentencepiece), grouped(tokens, sizes), LENGTH)
    assert made == whole


@given(data=st.lists(st.integers(0, 255), max_size=20))
def test_bytes_that_are_no_characters_are_replaced(
    sentencepiece: Tokenizer, data: list[int]
) -> None:
    tokens = [3 + byte for byte in data]
    made, _ = run(Detokenizer(sentencepiece, prompt=(300,)), [[token] for token in tokens], LENGTH)
    assert made == bytes(data).decode(errors="replace")


@given(tokens=token_ids, stop=stop_strings, sizes=groupings)
def test_what_was_given_out_depends_on_the_tokens_so_far_alone(
    byte_level: Tokenizer, tokens: list[int], stop: list[str], sizes: list[int]
) -> None:
    in_groups = Detokenizer(byte_level, stop=tuple(stop))
    made = ""
    seen: list[int] = []
    for group in grouped(tokens, sizes):
        delta = in_groups.push(group)
        made += delta.text
        seen += group
        replayed = Detokenizer(byte_level, stop=tuple(stop))
        text, num_tokens = run(replayed, [(token,) for token in seen], 0)
        assert made == text
        if delta.is_stopped:
            assert num_tokens == len(seen) - len(group) + delta.num_tokens
            break
        assert replayed.num_characters == in_groups.num_characters


def stopped_by_looking_at_every_prefix(
    tokenizer: Tokenizer, tokens: list[int], stop: list[str], *, min_tokens: int, include: bool
) -> tuple[str, int]:
    """The slow and obvious way: after each token, look at the whole text."""
    unwatched = Detokenizer(tokenizer)
    text = ""
    searched_from = 0
    for place, token in enumerate(tokens):
        is_last = place == len(tokens) - 1
        text += unwatched.push((token,), LENGTH if is_last else 0).text
        if place < min_tokens:
            searched_from = len(text)
            continue
        for end in range(searched_from, len(text) + 1):
            starts = [
                end - len(string)
                for string in stop
                if end - len(string) >= searched_from and text[:end].endswith(string)
            ]
            if starts:
                return text[: end if include else min(starts)], place + 1
    return text, len(tokens)


@given(
    text=texts,
    stop=stop_strings,
    sizes=groupings,
    min_tokens=st.integers(0, 4),
    include=st.booleans(),
)
def test_a_text_ends_at_the_stop_string_that_is_complete_first(
    byte_level: Tokenizer,
    text: str,
    stop: list[str],
    sizes: list[int],
    min_tokens: int,
    include: bool,
) -> None:
    tokens = byte_level.encode(text, add_special_tokens=False)[:40]
    detokenizer = Detokenizer(
        byte_level, stop=tuple(stop), min_tokens=min_tokens, include_stop=include
    )
    expected = stopped_by_looking_at_every_prefix(
        byte_level, tokens, stop, min_tokens=min_tokens, include=include
    )
    assert run(detokenizer, grouped(tokens, sizes), LENGTH) == expected


@given(tokens=token_ids, stop=stop_strings)
def test_text_is_held_back_only_if_it_may_become_a_stop_string(
    byte_level: Tokenizer, tokens: list[int], stop: list[str]
) -> None:
    detokenizer = Detokenizer(byte_level, stop=tuple(stop))
    whole = Detokenizer(byte_level)
    known = made = ""
    for token in tokens:
        known += whole.push((token,)).text
        delta = detokenizer.push((token,))
        made += delta.text
        if delta.is_stopped:
            return
        held = known[len(made) :]
        assert known.startswith(made)
        assert not held or any(string.startswith(held) for string in stop)


def test_a_stop_string_may_lie_across_tokens(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("ab", add_special_tokens=False)
    assert len(tokens) == 2
    detokenizer = Detokenizer(byte_level, stop=("ab",))
    assert detokenizer.push(tokens[:1]).text == ""
    delta = detokenizer.push(tokens[1:])
    assert (delta.text, delta.is_stopped) == ("", True)


def test_a_stop_string_may_end_inside_a_token(byte_level: Tokenizer) -> None:
    [token] = byte_level.encode(" the", add_special_tokens=False)
    delta = Detokenizer(byte_level, stop=("th",)).push((token,))
    assert (delta.text, delta.is_stopped) == (" ", True)


def test_tokens_behind_a_stop_string_do_not_count(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("abab", add_special_tokens=False)
    assert len(tokens) == 4
    assert Detokenizer(byte_level, stop=("b",)).push(tokens).num_tokens == 2


def test_held_text_is_given_out_at_the_end(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("xab", add_special_tokens=False)
    detokenizer = Detokenizer(byte_level, stop=("abc",))
    assert detokenizer.push(tokens).text == "x"
    assert detokenizer.push((), LENGTH).text == "ab"


def test_a_character_that_is_never_whole_is_replaced_at_the_end(byte_level: Tokenizer) -> None:
    [lone] = [token for token in range(VOCAB_SIZE) if byte_level.spell(token) == b"\xc3"]
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push((lone,)).text == ""
    assert detokenizer.push((), LENGTH).text == "\ufffd"


def test_a_stop_token_is_not_part_of_the_text_unless_asked_for(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("ab", add_special_tokens=False)
    assert Detokenizer(byte_level).push(tokens, STOP).text == "a"
    assert Detokenizer(byte_level, include_stop=True).push(tokens, STOP).text == "ab"
    assert Detokenizer(byte_level).push(tokens, STOP).num_tokens == 2


def test_a_special_stop_token_is_never_part_of_the_text(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, include_stop=True)
    assert detokenizer.push((END_OF_TEXT_ID,), STOP).text == ""


def test_the_first_space_of_a_text_is_dropped_and_that_of_an_answer_is_not(
    sentencepiece: Tokenizer,
) -> None:
    tokens = sentencepiece.encode("the fox", add_special_tokens=False)
    begin = sentencepiece.bos_token_id
    assert begin is not None
    assert Detokenizer(sentencepiece).push(tokens).text == "the fox"
    assert Detokenizer(sentencepiece, prompt=(begin,)).push(tokens).text == "the fox"
    assert Detokenizer(sentencepiece, prompt=(begin, *tokens)).push(tokens).text == " the fox"


def test_invalid_bytes_cost_the_same_however_many_there_were(byte_level: Tokenizer) -> None:
    [lone] = [token for token in range(VOCAB_SIZE) if byte_level.spell(token) == b"\x80"]
    detokenizer = Detokenizer(byte_level)
    for _ in range(10_000):
        assert len(detokenizer.push((lone,)).text) == 1


@given(text=texts, stop=stop_strings)
def test_the_held_length_is_that_of_the_longest_beginning(text: str, stop: list[str]) -> None:
    beginnings = [
        length
        for string in stop
        for length in range(1, len(string))
        if text.endswith(string[:length])
    ]
    assert StopStrings(tuple(stop)).held_length(text) == max(beginnings, default=0)
