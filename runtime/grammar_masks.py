"""Which tokens each sequence of a step may draw, found out while the model computes the step.

A matcher for each sequence that has a grammar follows its output. Before the model starts,
``begin`` sets threads to work; when the logits are there, ``collect`` takes the masks::

    step        begin ──▶ forward pass ──────────────▶ collect ──▶ sampler
    threads           ╰─▶ new tokens, mask, draft, masks ─╯

Nothing here is state that could be lost: a matcher is made again by replaying the output, after a
preemption, on another engine, or when it was forgotten. A draft gets the mask of every place that
the grammar lets it reach, and leaves no trace.

A grammar whose masks take long holds nobody up: its sequence is left out of a step's draws until
its mask is there. One whose masks cannot be found within the limits ends its own request. It counts
only if a matcher that did nothing but replay the output fails as well, so that an end, too, depends
on the output alone. Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import zip_longest
from time import perf_counter
from typing import Final, NamedTuple, TypeAlias

from llguidance import LLMatcher

from understudy.runtime.grammars import GrammarError, Grammars, check
from understudy.runtime.scheduling.decision import NoDraw, ScheduledSequence
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence
from understudy.runtime.scheduling.thinking import Phase

MASK_WAIT_S: Final = 0.02
"""How long a step waits for masks that were not ready with the logits."""
NUM_THREADS: Final = 4
KEPT_STEPS: Final = 64
"""A matcher that was not asked for in so many steps is forgotten."""

Masks: TypeAlias = tuple[bytes, ...]
"""A mask for the next token, and one behind each drafted token that the grammar lets pass. A bit
for each token, the lowest of each byte first."""


class GrammarMasks:
    """The matchers of one runner's sequences.

    Args:
        grammars: Compiles, for several runners if need be.
        report: Told of a request whose grammar failed, and why.

    Attributes:
        mask_s: Seconds that threads have spent on masks, replays and compiling included.
        num_masks: How many masks they have made.
        num_waits: How often a sequence was left out of a step's draws.
        wait_s: Seconds that steps waited for masks.
    """

    def __init__(
        self, grammars: Grammars, *, report: Callable[[int, str], None] = lambda *_: None
    ) -> None:
        self.mask_s = 0.0
        self.num_masks = 0
        self.num_waits = 0
        self.wait_s = 0.0
        self._grammars = grammars
        self._report = report
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._followers: dict[int, _Follower] = {}
        self._step = 0

    def begin(self, scheduled: Iterable[ScheduledSequence]) -> None:
        """Set threads to work on the masks of the sequences that sample."""
        self._step += 1
        for share in scheduled:
            sequence = share.sequence
            if not share.samples or grammar_start(sequence) is None:
                continue
            follower = self._followers.get(sequence.request_id)
            if follower is None:
                follower = _Follower(self._grammars, sequence.params.grammar)
                self._followers[sequence.request_id] = follower
            follower.used_at = self._step
            if follower.is_busy or follower.has_masks_for(sequence.token_ids):
                continue
            errand = follower.turn_to(share)
            follower.future = self._threads.submit(follower.run, errand)

    def collect(self, scheduled: Iterable[ScheduledSequence]) -> dict[int, Masks | NoDraw]:
        """The masks by request id, for the sequences that ``begin`` was told of."""
        asked = [
            (share, self._followers[share.sequence.request_id])
            for share in scheduled
            if share.samples and grammar_start(share.sequence) is not None
        ]
        if not asked:
            return {}
        self._wait([follower for _, follower in asked])
        found = {
            share.sequence.request_id: self._take(share, follower) for share, follower in asked
        }
        self._forget_unused()
        return found

    def close(self) -> None:
        """Give the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _wait(self, followers: list[_Follower]) -> None:
        """Wait for those that are usually fast; only if all are slow, for any of them."""
        busy = [follower for follower in followers if follower.is_busy]
        quick = [follower for follower in busy if not follower.is_slow]
        if not quick and len(busy) < len(followers):
            return
        futures = [each.future for each in quick or busy if each.future is not None]
        if futures:
            begun_at = perf_counter()
            wait(
                futures,
                timeout=MASK_WAIT_S,
                return_when="ALL_COMPLETED" if quick else "FIRST_COMPLETED",
            )
            self.wait_s += perf_counter() - begun_at

    def _take(self, share: ScheduledSequence, follower: _Follower) -> Masks | NoDraw:
        follower.is_slow = follower.is_busy
        if follower.future is None or follower.is_busy:
            self.num_waits += 1
            return NoDraw.WAITING
        error = follower.future.exception()
        if error is not None:
            self._report(share.sequence.request_id, f"{type(error).__name__}: {error}")
            del self._followers[share.sequence.request_id]
            return NoDraw.REFUSED
        result = follower.future.result()
        self.mask_s += result.seconds
        self.num_masks += len(result.masks)
        return _usable(result, share.draft)

    def _forget_unused(self) -> None:
        unused = [
            request_id
            for request_id, follower in self._followers.items()
            if follower.used_at < self._step - KEPT_STEPS and not follower.is_busy
        ]
        for request_id in unused:
            del self._followers[request_id]


def grammar_start(sequence: EngineSequence) -> int | None:
    """The place in ``token_ids`` from which the grammar is to be followed.

    ``None`` if there is no grammar, or thoughts or an echo come first.
    """
    if not sequence.params.grammar:
        return None
    num_echoed = len(sequence.params.echoed)
    if sequence.num_output_tokens < num_echoed:
        return None
    thoughts = sequence.thoughts
    if thoughts is None:
        return sequence.num_prompt_tokens + num_echoed
    if thoughts.phase in {Phase.THOUGHTS, Phase.CLOSING}:
        return None
    return sequence.num_prompt_tokens + thoughts.answer_start


class _Errand(NamedTuple):
    """What a thread is to do: bring a matcher to the output's end, and make masks from there on."""

    token_ids: list[int]
    """Prompt and output. Tokens behind ``num_tokens`` may come in meanwhile."""
    start: int
    """Where what the grammar governs begins."""
    num_tokens: int
    num_same: int
    """How many tokens from there on are those that the matcher has seen."""
    draft: tuple[int, ...]


class _Result(NamedTuple):
    masks: Masks
    draft: tuple[int, ...]
    """The draft that they were made for."""
    seconds: float


class _Follower:
    """Follows one sequence's output, an errand at a time.

    What begins with an underscore belongs to the thread that runs the errand.
    """

    __slots__ = (
        "_grammar",
        "_grammars",
        "_matcher",
        "_num_ends",
        "_num_seen",
        "errand",
        "future",
        "is_slow",
        "used_at",
    )

    def __init__(self, grammars: Grammars, grammar: str) -> None:
        self.errand: _Errand | None = None
        self.future: Future[_Result] | None = None
        self.is_slow = False
        self.used_at = 0
        self._grammars = grammars
        self._grammar = grammar
        self._matcher: LLMatcher | None = None
        self._num_seen = 0
        """Tokens of the output that are taken in."""
        self._num_ends = 0
        """The last of them, from the one that ended the answer on: the matcher has not seen these.
        """

    @property
    def is_busy(self) -> bool:
        """Whether a thread is still at work."""
        return self.future is not None and not self.future.done()

    def has_masks_for(self, token_ids: list[int]) -> bool:
        """Whether the last errand was for these very tokens."""
        errand = self.errand
        return (
            errand is not None
            and errand.token_ids is token_ids
            and errand.num_tokens == len(token_ids)
        )

    def turn_to(self, share: ScheduledSequence) -> _Errand:
        """The errand for a sequence as it stands."""
        token_ids, start = share.sequence.token_ids, grammar_start(share.sequence)
        assert start is not None
        before = self.errand
        if before is None or before.start != start:
            num_same = 0
        elif before.token_ids is token_ids:
            num_same = before.num_tokens - start  # a sequence's list only grows
        else:
            seen = before.token_ids[start : before.num_tokens]
            num_same = _num_equal(seen, token_ids[start:])
        self.errand = _Errand(token_ids, start, len(token_ids), num_same, share.draft)
        return self.errand

    def run(self, errand: _Errand) -> _Result:
        """Do the errand, on a thread.

        Raises:
            GrammarError: the grammar cannot be followed any further.
        """
        begun_at = perf_counter()
        try:
            masks = self._masks(errand)
        except GrammarError:
            # What drafts left behind, or a rollback, must not decide. The output alone does.
            self._matcher = None
            masks = self._masks(errand)
        return _Result(masks, errand.draft, perf_counter() - begun_at)

    def _masks(self, errand: _Errand) -> Masks:
        matcher = self._advance(errand)
        masks = [self._mask(matcher)]
        num_drafted = 0
        try:
            for token in errand.draft:
                if not _allows(masks[-1], token) or token in self._eos_token_ids:
                    break
                if matcher.try_consume_tokens([token]) != 1:
                    break
                num_drafted += 1
                masks.append(self._mask(matcher))
            if num_drafted and not matcher.rollback(num_drafted):
                self._matcher = None
        except GrammarError:
            self._matcher = None  # it failed on a guess: that says nothing of the request
        return tuple(masks)

    def _advance(self, errand: _Errand) -> LLMatcher:
        """Bring the matcher to the output's end."""
        if self._matcher is None:
            self._matcher = self._grammars.matcher(self._grammar)
            self._num_seen = self._num_ends = 0
        matcher = self._matcher
        num_back = max(self._num_seen - errand.num_same, 0)
        num_ends_back = min(num_back, self._num_ends)
        self._num_ends -= num_ends_back
        if num_back > num_ends_back and not matcher.rollback(num_back - num_ends_back):
            raise GrammarError("it cannot go back")
        self._num_seen -= num_back
        start = errand.start + self._num_seen
        new = errand.token_ids[start : errand.num_tokens]
        if self._num_ends == 0:
            num_text = next((i for i, t in enumerate(new) if t in self._eos_token_ids), len(new))
            if num_text and not matcher.consume_tokens(new[:num_text]):
                check(matcher)
            self._num_ends = len(new) - num_text
        else:
            self._num_ends += len(new)
        self._num_seen += len(new)
        return matcher

    def _mask(self, matcher: LLMatcher) -> bytes:
        return self._end_mask() if self._num_ends else self._grammars.vocabulary.mask(matcher)

    def _end_mask(self) -> bytes:
        """Behind its end, an answer goes on with nothing but its end."""
        bits = sum(1 << token for token in self._eos_token_ids)
        return bits.to_bytes(-(-self._grammars.vocabulary.width // 32) * 4, "little")

    @property
    def _eos_token_ids(self) -> frozenset[int]:
        return self._grammars.vocabulary.eos_token_ids


def _usable(result: _Result, draft: tuple[int, ...]) -> Masks:
    """The masks that hold for a draft, which may not be the one that they were made for."""
    return result.masks[: _num_equal(result.draft, draft) + 1]


def _num_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The length of the beginning that two rows of tokens share."""
    if ours == theirs[: len(ours)]:
        return len(ours)
    return next(i for i, (a, b) in enumerate(zip_longest(ours, theirs, fillvalue=-1)) if a != b)


def _allows(mask: bytes, token: int) -> bool:
    return token >> 3 < len(mask) and bool(mask[token >> 3] >> (token & 7) & 1)
