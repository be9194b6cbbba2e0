"""Speculation: guess the next tokens cheaply, and let one step of the model check all guesses.

A sequence's *draft* is a longer row in a step: the model computes the last known token and the
drafted ones behind it at once, and the sampler draws at each place what it would have drawn there
anyway. As long as the drawn token equals the drafted one, the next place counts as well. So a draft
changes how many tokens a step brings, and never which (Leviathan et al., arXiv:2211.17192, with
equality in the place of rejection sampling, since the noise of every position is fixed)::

    known      … the quick          drawn      brown fox  jumps on
    draft              brown fox  jumped                  ╰── the first that differs still counts

How long drafts should be is decided before every step, from two things that are measured: how
often guesses at each place come true, request by request, and what a step costs by its number of
tokens. The best depth brings the most tokens a second; 0, if guessing does not pay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from understudy.runtime.scheduling.decision import Draws, StepPlan
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence

_LEARNING_RATE: Final = 0.1
_FORGETTING_RATE: Final = 0.004
"""A request that is not guessed for drifts back to hope, so that it is tried again."""
_HOPE: Final = 0.7


class CostTable:
    """What a step costs by its number of tokens, through measured points."""

    def __init__(self, points: Iterable[tuple[int, float]]) -> None:
        """``points`` are (tokens, seconds), at least one."""
        ordered = sorted(points)
        self._tokens = [tokens for tokens, _ in ordered]
        # More tokens never cost less; where they seem to, the measurement was disturbed.
        self._seconds: list[float] = []
        for _, seconds in ordered:
            self._seconds.append(max(seconds, self._seconds[-1] if self._seconds else 0.0))

    @property
    def points(self) -> list[tuple[int, float]]:
        """Tokens and seconds, ascending."""
        return list(zip(self._tokens, self._seconds, strict=True))

    def seconds(self, num_tokens: int) -> float:
        """The cost of a step with so many tokens."""
        place = bisect_left(self._tokens, num_tokens)
        if place < len(self._tokens) and self._tokens[place] == num_tokens:
            return self._seconds[place]
        if place == 0:
            return self._seconds[0]
        if place == len(self._tokens):
            return self._seconds[-1] * num_tokens / self._tokens[-1]
        low, high = self._tokens[place - 1], self._tokens[place]
        share = (num_tokens - low) / (high - low)
        return self._seconds[place - 1] * (1 - share) + self._seconds[place] * share


class StepCosts:
    """What a step of the model costs, profiled at first, and then as it turns out."""

    def __init__(self, profile: CostTable) -> None:
        self._profile = profile
        self._seen: dict[tuple[int, int], float] = {}

    def note(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """A step in which everybody had caught up took so long."""
        shape = num_sequences, num_tokens
        before = self._seen.get(shape, seconds)
        self._seen[shape] = before + _LEARNING_RATE * (seconds - before)

    def seconds(self, num_sequences: int, num_tokens: int) -> float:
        """The cost of a step with so many sequences and tokens, their drafts included."""
        seen = self._seen.get((num_sequences, num_tokens))
        if seen is not None:
            return seen
        # Never tried: as the profile says, but by the machine's pace of the moment.
        plain = self._seen.get((num_sequences, num_sequences))
        pace = 1.0 if plain is None else plain / self._profile.seconds(num_sequences)
        return pace * self._profile.seconds(num_tokens)


class DraftCosts(NamedTuple):
    """What guessing costs, by the number of drafts."""

    first: CostTable
    """The first token of each."""
    next: CostTable
    """One more token of each."""

    def seconds(self, num_drafts: int, depth: int) -> float:
        """The cost of so many drafts of so many tokens."""
        return self.first.seconds(num_drafts) + (depth - 1) * self.next.seconds(num_drafts)


class Costs(NamedTuple):
    """What checking costs, and what guessing does."""

    step: StepCosts
    draft: DraftCosts | None = None
    """``None``: nothing."""


class Drafter(Protocol):
    """Guesses."""

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        """Guess up to so many tokens behind each of these sequences.

        Everything that is remembered of other sequences may be forgotten.

        Returns:
            The guesses by request id; nothing for whom there is no guess.
        """
        ...


class Speculator:
    """Decides how long drafts are, and gets them.

    Args:
        drafter: Who guesses.
        depth_max: The longest draft.
        costs: For the best depth before every step; ``None``: drafts are always the longest.
    """

    def __init__(self, drafter: Drafter, *, depth_max: int, costs: Costs | None) -> None:
        assert depth_max > 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._drafter = drafter
        self._depth_max = depth_max
        self._costs = costs
        self._hopes: dict[int, list[float]] = {}
        """By request: how often the guess at each place came true if all before it did."""
        self._usual = [_HOPE] * depth_max
        """The same over all requests: what a new one begins with."""

    def propose(self, sequences: Sequence[EngineSequence]) -> dict[int, list[int]]:
        """Drafts for the running sequences that have caught up, by request id."""
        ready = [s for s in sequences if s.num_tokens == s.num_computed_tokens + 1]
        living = {sequence.request_id for sequence in sequences}
        for request_id in self._hopes.keys() - living:
            del self._hopes[request_id]
        depth = self._depth([sequence.request_id for sequence in ready])
        if depth == 0:
            return {}
        wanted = [
            (sequence, min(depth, sequence.num_tokens_max - sequence.num_tokens - 1))
            for sequence in ready
        ]
        return self._drafter.propose([pair for pair in wanted if pair[1] > 0])

    def note(self, plan: StepPlan, draws: Draws, seconds: float) -> None:
        """A step was carried out: learn from it."""
        if self._costs is not None and all(share.samples for share in plan.scheduled):
            self._costs.step.note(len(plan.scheduled), plan.num_tokens, seconds)
        for sequence, _, draft in plan.scheduled:
            drawn = draws.get(sequence.request_id)
            if sequence.request_id in plan.forced:
                continue  # nobody has guessed that
            if draft and isinstance(drawn, tuple):
                self._learn(sequence.request_id, len(draft), len(drawn) - 1)

    def _learn(self, request_id: int, num_drafted: int, num_accepted: int) -> None:
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        hopes = self._hopes.setdefault(request_id, list(self._usual))
        for place in range(min(num_accepted + 1, num_drafted)):
            came_true = float(place < num_accepted)
            hopes[place] += _LEARNING_RATE * (came_true - hopes[place])
            self._usual[place] += _LEARNING_RATE / 4 * (came_true - self._usual[place])

    def _depth(self, request_ids: list[int]) -> int:
        """The depth that brings the most tokens a second."""
        if self._costs is None:
            return self._depth_max
        if not request_ids:
            return 0
        hopes = [self._hopes.get(request_id, self._usual) for request_id in request_ids]
        num_drafts = len(request_ids)
        survivals = [1.0] * num_drafts
        expected = float(num_drafts)
        best_depth, best_rate = 0, expected / self._costs.step.seconds(num_drafts, num_drafts)
        draft_costs = self._costs.draft
        for depth in range(1, self._depth_max + 1):
            survivals = [s * hope[depth - 1] for s, hope in zip(survivals, hopes, strict=True)]
            expected += sum(survivals)
            num_tokens = num_drafts * (1 + depth)
            seconds = self._costs.step.seconds(num_drafts, num_tokens)
            if draft_costs is not None:
                seconds += draft_costs.seconds(num_drafts, depth)
            if expected / seconds > best_rate:
                best_depth, best_rate = depth, expected / seconds
        if best_depth == 0:
            self._hope_again(request_ids)
        return best_depth

    def _hope_again(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            hopes = self._hopes.setdefault(request_id, list(self._usual))
            for place, hope in enumerate(hopes):
                hopes[place] = hope + _FORGETTING_RATE * (_HOPE - hope)


class NgramDrafter:
    """Guesses that what followed the last few tokens before follows them again (prompt lookup).

    Costs next to nothing, and comes true where an answer repeats its prompt or itself: code that
    is edited, documents that are quoted, loops.
    """

    _SIZES: Final = (4, 3, 2)
    """Longer contexts are tried first; a single token says too little."""

    def __init__(self) -> None:
        self._indices: dict[int, _NgramIndex] = {}

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        """See ``Drafter``."""
        kept = {sequence.request_id for sequence, _ in wanted}
        for request_id in self._indices.keys() - kept:
            del self._indices[request_id]
        drafts: dict[int, list[int]] = {}
        for sequence, depth in wanted:
            index = self._indices.setdefault(sequence.request_id, _NgramIndex(self._SIZES))
            draft = index.look_up(sequence.token_ids, depth)
            if draft:
                drafts[sequence.request_id] = draft
        return drafts


class _NgramIndex:
    """Where in one sequence each few tokens were followed by something, the last time."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._places: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in sizes}
        self._num_indexed = 0

    def look_up(self, tokens: list[int], depth: int) -> list[int]:
        """What followed the last tokens when they were there before; nothing if they were not."""
        # The last token is followed by nothing yet.
        for end in range(self._num_indexed + 1, len(tokens)):
            for size, places in self._places.items():
                if end >= size:
                    places[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)
        for size, places in self._places.items():
            end_before = places.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if end_before is not None:
                # Behind the end of what is known, the guess goes on with itself.
                period = len(tokens) - end_before
                return [tokens[end_before + place % period] for place in range(depth)]
        return []
