"""A format's marks as tokens: how an engine, which knows no text, tells thoughts from answers.

A model that thinks has a token for each mark. A tokenizer that has none writes a mark in several,
which depend on what stands around it: then those in which it would be written in common
surroundings are looked for, and a mark that is spelled in any other way is not seen.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.request import Thinking
from understudy.runtime.parsers.reasoning import FORMATS
from understudy.runtime.tokenizer import Tokenizer

_BEFORE: Final = ("", "\n", "\n\n", " ", "a", ".")
_BEFORE_OPENING: Final = ("", "\n", "\n\n", " ")
_AFTER: Final = ("", "\n", "\n\n", " ", "a", "{")
_FORCED: Final = "\n{closing}\n\n"


class _MarkTokens(NamedTuple):
    openings: tuple[tuple[int, ...], ...]
    closings: tuple[tuple[int, ...], ...]
    forced: tuple[int, ...]


def thinking_of(
    name: str,
    tokenizer: Tokenizer,
    *,
    is_open: bool,
    budget: int | None,
    has_grammar: bool,
    vocab_size: int,
) -> Thinking:
    """What an engine has to know of a format.

    Args:
        name: Of the format.
        tokenizer: The model's.
        is_open: Whether the output begins inside the thoughts.
        budget: How many tokens they may have; ``None``: any number.
        has_grammar: Whether the answer behind them has a form.
        vocab_size: The width of the logits.

    Raises:
        InvalidRequest: the model lacks a token that would have to be forced.
    """
    marks = _mark_tokens(name, tokenizer)
    if budget is not None and max(marks.forced) >= vocab_size:
        text = "thinking_token_budget: this model has no tokens that close its thoughts"
        raise InvalidRequest(text, param="thinking_token_budget")
    openings = marks.openings
    if has_grammar:
        # Its first token settles whether an answer is one that has to follow the grammar.
        openings = tuple(each for each in openings if len(each) == 1)
    return Thinking(
        openings=() if is_open else openings,
        closings=marks.closings,
        is_open=is_open,
        budget=budget,
        forced=() if budget is None else marks.forced,
    )


@lru_cache(maxsize=8)
def _mark_tokens(name: str, tokenizer: Tokenizer) -> _MarkTokens:
    form = FORMATS[name]
    forced = _FORCED.format(closing=form.closing)
    return _MarkTokens(
        _openings(tokenizer, form.opening),
        _closings(tokenizer, form.closing),
        tuple(tokenizer.encode(forced, add_special_tokens=False)),
    )


def _openings(tokenizer: Tokenizer, mark: str) -> tuple[tuple[int, ...], ...]:
    """All that an output may begin with up to its mark."""
    texts = [(before, after) for before in _BEFORE_OPENING for after in _AFTER]
    found = [_tokens_around(tokenizer, before, mark, after) for before, after in texts]
    return tuple(dict.fromkeys((*each.before, *each.mark) for each in found if each is not None))


def _closings(tokenizer: Tokenizer, mark: str) -> tuple[tuple[int, ...], ...]:
    """The tokens that a mark may be written in, wherever it stands."""
    alone = tokenizer.encode(mark, add_special_tokens=False)
    if len(alone) == 1:
        return (tuple(alone),)
    texts = [(before, after) for before in _BEFORE for after in _AFTER]
    found = [_tokens_around(tokenizer, before, mark, after) for before, after in texts]
    return tuple(dict.fromkeys(each.mark for each in found if each is not None))


class _Around(NamedTuple):
    before: tuple[int, ...]
    mark: tuple[int, ...]
    """All tokens that have a part of it."""


def _tokens_around(tokenizer: Tokenizer, before: str, mark: str, after: str) -> _Around | None:
    """A mark in its surroundings, in tokens; ``None`` if they do not spell it."""
    tokens = tokenizer.encode(before + mark + after, add_special_tokens=False)
    spelled = [tokenizer.spell(token) for token in tokens]
    start = b"".join(spelled).find(mark.encode())
    if start < 0:
        return None
    end = start + len(mark.encode())
    first = last = position = 0
    for place, spelling in enumerate(spelled):
        if position <= start:
            first = place
        if position < end:
            last = place
        position += len(spelling)
    return _Around(tuple(tokens[:first]), tuple(tokens[first : last + 1]))
