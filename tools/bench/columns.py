"""What a comparison measures: its columns, their prompts, and the rate that each comes to. Pure.

Prompts are made of tokens that each spell a word of lower-case letters with a space before it, and
whose text becomes the same token again: so a server that takes only text gets the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Final, Literal, NamedTuple, TypeAlias

WORDS_MAX: Final = 2_000
WORDS_MIN: Final = 100
_WORD: Final = re.compile(r" [a-z]+")


class Column(NamedTuple):
    """One load: a burst of requests, or one after another where ``concurrency`` is 1."""

    name: str
    title: str
    concurrency: int
    num_requests: int
    common: int
    """Tokens at the start of every prompt that are the same in all of them."""
    own: int
    output: int
    counts: Literal["output", "prompt"]
    """Which tokens its rate counts."""


COLUMNS: Final = (
    Column("single", "one stream 128→128", 1, 1, 0, 128, 128, "output"),
    Column("prefill", "prefill 1024", 1, 2, 0, 1024, 1, "prompt"),
    Column("streams8", "8 streams 256→64", 8, 8, 0, 256, 64, "output"),
    Column("streams32", "32 streams 256→64", 32, 32, 0, 256, 64, "output"),
    Column("common", "8 x (512 common + 32 → 32)", 8, 8, 512, 32, 32, "output"),
    Column("distinct", "8 x (544 → 32)", 8, 8, 0, 544, 32, "output"),
)
WARM_UP: Final = Column("warm-up", "", 2, 4, 0, 32, 8, "output")
TOKENS_MAX: Final = max(column.common + column.own + column.output for column in COLUMNS)


class Word(NamedTuple):
    """A token that is a word."""

    token_id: int
    text: str


class Prompt(NamedTuple):
    """The same prompt twice."""

    token_ids: tuple[int, ...]
    text: str


class Answered(NamedTuple):
    """What came of a column's requests."""

    wall_s: float
    """From the first one's start to the last one's end."""
    prompt_tokens: int
    output_tokens: int


Encode: TypeAlias = Callable[[str], list[int]]
Decode: TypeAlias = Callable[[list[int]], str]


def find_words(vocab_size: int, encode: Encode, decode: Decode) -> list[Word]:
    """The first words of a vocabulary, by token id.

    Raises:
        ValueError: It has too few; the comparison's prompts would be too much alike.
    """
    words: list[Word] = []
    for token_id in range(vocab_size):
        text = decode([token_id])
        if _WORD.fullmatch(text) and encode(text) == [token_id]:
            words.append(Word(token_id, text))
            if len(words) == WORDS_MAX:
                break
    if len(words) < WORDS_MIN:
        raise ValueError(f"the tokenizer has {len(words)} tokens that are words")
    return words


def prompts_of(column: Column, words: Sequence[Word], *, seed: int) -> list[Prompt]:
    """The prompts of a column in one round. Another seed or column shares no prefix with them."""
    prefix = _draw(words, column.common, f"{seed} {column.name} common")
    return [
        _joined(prefix + _draw(words, column.own, f"{seed} {column.name} {number}"))
        for number in range(column.num_requests)
    ]


def rate(column: Column, answered: Answered) -> float:
    """Tokens/s of a column."""
    assert answered.wall_s > 0.0, answered
    counted = answered.prompt_tokens if column.counts == "prompt" else answered.output_tokens
    return counted / answered.wall_s


def _draw(words: Sequence[Word], number: int, purpose: str) -> list[Word]:
    return Random(purpose).choices(words, k=number)  # noqa: S311 - a load must repeat


def _joined(words: Sequence[Word]) -> Prompt:
    return Prompt(tuple(word.token_id for word in words), "".join(word.text for word in words))
