"""Which tokens each place of a step may draw, from a request's grammar and its thoughts together.

A grammar governs what follows the thoughts; a budget for thoughts, once spent, leaves one token.
Knows no tensors and no model: a mask is bits.
"""

from __future__ import annotations

from typing import TypeAlias

from understudy.protocol.request import Thinking
from understudy.runtime.grammar_masks import Masks
from understudy.runtime.scheduling.decision import NoDraw, ScheduledSequence
from understudy.runtime.scheduling.thinking import Phase, Progress, advance, forced_token

Allowed: TypeAlias = tuple[bytes | None, ...]
"""What may be drawn next, and behind each drafted token; ``None``: anything. Behind the last place
that is here, nothing counts that is drawn."""


def allowed_tokens(
    share: ScheduledSequence, grammar: Masks | NoDraw | None
) -> Allowed | NoDraw | None:
    """What a sequence that samples may draw; ``None``: anything anywhere.

    Args:
        share: The sequence's share of a step.
        grammar: What its grammar allows, if it governs the next token.
    """
    sequence = share.sequence
    if sequence.params.echoed:
        return _echoing(share, grammar)
    thinking, progress = sequence.params.thinking, sequence.thoughts
    if thinking is None or progress is None:
        return grammar
    if isinstance(grammar, NoDraw):
        return grammar
    if not sequence.params.grammar:
        masks = _along(thinking, progress, share.draft, stops_at_answer=False)
        return masks if any(masks) else None
    if grammar is None:
        return _along(thinking, progress, share.draft, stops_at_answer=True)
    if progress.phase is Phase.START:
        # Behind a first token, either the grammar goes on or the thoughts do.
        return (_widened(grammar[0], thinking),)
    return grammar


def _echoing(share: ScheduledSequence, grammar: Masks | NoDraw | None) -> Allowed | NoDraw | None:
    """What the output begins with is settled; a grammar, if there is one, waits for its end."""
    sequence = share.sequence
    masks = tuple(map(_only, sequence.forced_ahead(len(share.draft) + 1)))
    if not masks:
        return grammar
    if sequence.params.grammar:
        return masks
    return masks + (None,) * (len(share.draft) + 1 - len(masks))


def _along(
    thinking: Thinking, progress: Progress, draft: tuple[int, ...], *, stops_at_answer: bool
) -> Allowed:
    """A mask for each place of a draft, up to the answer if a grammar takes over there."""
    masks = [_mask(thinking, progress)]
    for token in draft:
        progress = advance(thinking, progress, token)
        if stops_at_answer and progress.phase is Phase.ANSWER:
            break
        masks.append(_mask(thinking, progress))
    return tuple(masks)


def _mask(thinking: Thinking, progress: Progress) -> bytes | None:
    token = forced_token(thinking, progress)
    return None if token is None else _only(token)


def _only(token: int) -> bytes:
    return bytes(token >> 3) + bytes([1 << (token & 7)])


def _widened(mask: bytes, thinking: Thinking) -> bytes:
    """A mask that allows the opening of thoughts as well."""
    bits = bytearray(mask)
    for token, *_ in thinking.openings:
        bits.extend(bytes(max(0, (token >> 3) + 1 - len(bits))))
        bits[token >> 3] |= 1 << (token & 7)
    return bytes(bits)
