"""Speculation: guess the next tokens cheaply, and let one step of the model check all guesses.

A sequence's *draft* is a longer row in a step: the model computes the last known token and the
drafted ones behind it at once, and the sampler draws at each place what it would have drawn there
anyway. As long as the drawn token equals the drafted one, the next place counts as well. So a draft
changes how many tokens a step brings, and never which (Leviathan et al., arXiv:2211.17192, with
equality in the place of rejection sampling, since the noise of every position is fixed)::

    known      … the quick          drawn      brown fox  jumps on
    draft              brown fox  jumped                  ╰── the first that differs still counts

Where an answer repeats what stood there before, looking it up guesses best, and for nothing; where
it does not, a draft model may be asked. Who is believed, and how far, is decided before every step
from two things that are measured: how often guesses of each kind come true at each place, request
by request, and what a step costs by its number of tokens. The best depth brings the most tokens a
second; 0, if guessing does not pay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from understudy.runtime.scheduling.decision import Draws, StepPlan
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence

_LEARNING_RATE: Final = 0.1
_FIRST_RATE: Final = 0.5
"""What is seen for the first time is learnt more of."""
_FORGETTING_RATE: Final = 0.004
"""A request that is not guessed for drifts back to hope, so that it is tried again."""
_HOPE: Final = 0.7
_SECONDS_MIN: Final = 1e-9
_FADING: Final = 0.9995
"""Of what is known of a step's shape, what is left after another step."""
_SURPRISE_MAX: Final = 3.0
_BETWEEN_S: Final = 0.001
"""Between two steps nothing is surprising that is shorter."""


def _calm(ratio: float) -> float:
    """A surprise, as far as it is believed: what else the machine did is no property of a step."""
    return min(max(ratio, 1 / _SURPRISE_MAX), _SURPRISE_MAX)


class CostTable:
    """What a step costs by its number of tokens, through measured points."""

    def __init__(self, points: Iterable[tuple[int, float]]) -> None:
        """``points`` are (tokens, seconds), at least one."""
        ordered = sorted(points)
        self._tokens = [tokens for tokens, _ in ordered]
        # More tokens never cost less, and none cost nothing; where they seem to, the measurement
        # was disturbed.
        self._seconds: list[float] = []
        for _, seconds in ordered:
            self._seconds.append(max(seconds, self._seconds[-1] if self._seconds else _SECONDS_MIN))

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
    """What a step of the model costs, profiled at first, and then as it turns out.

    A step without drafts costs what such steps of so many sequences cost lately; drafts cost what
    so many more tokens do in the profile, times what that turned out to be wrong by for this shape.
    The latter fades while nobody tries the shape: a time that was disturbed must not rule it out
    for ever.
    """

    def __init__(self, profile: CostTable) -> None:
        """``profile`` is by tokens; what it says of a single one does not matter for long."""
        self._profile = profile
        self._plain_s: dict[int, float] = {}
        """Seconds of a step without drafts, by the number of sequences."""
        self._extra: dict[tuple[int, int], tuple[float, int]] = {}
        """By shape: its factor, and after how many steps it was seen last."""
        self._num_noted = 0
        self.between_s = 0.0
        """What passes between two steps, on average: a step that is saved saves this as well."""

    def note_between(self, seconds: float) -> None:
        """So much time passed between two steps, their drafts left out."""
        seconds = min(max(seconds, 0.0), _SURPRISE_MAX * self.between_s + _BETWEEN_S)
        self.between_s += _LEARNING_RATE * (seconds - self.between_s)

    def note(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """A step in which everybody had caught up took so long."""
        self._num_noted += 1
        shape = num_sequences, num_tokens
        is_plain = num_tokens == num_sequences
        is_first = num_sequences not in self._plain_s if is_plain else shape not in self._extra
        surprise = _calm(seconds / self.seconds(num_sequences, num_tokens))
        lesson = 1 + (_FIRST_RATE if is_first else _LEARNING_RATE) * (surprise - 1)
        if is_plain:
            self._plain_s[num_sequences] = self._plain(num_sequences) * lesson
        else:
            self._extra[shape] = self._extra_of(shape) * lesson, self._num_noted

    def seconds(self, num_sequences: int, num_tokens: int) -> float:
        """The cost of a step with so many sequences and tokens, their drafts included."""
        if num_tokens == num_sequences:
            return self._plain(num_sequences)
        drafts_s = self._profile.seconds(num_tokens) - self._profile.seconds(num_sequences)
        extra = self._extra_of((num_sequences, num_tokens))
        return extra * (self._plain(num_sequences) + drafts_s)

    def _plain(self, num_sequences: int) -> float:
        known = self._plain_s.get(num_sequences)
        if known is not None:
            return known
        profiled = self._profile.seconds(num_sequences)
        if not self._plain_s:
            return profiled
        nearest = min(self._plain_s, key=lambda count: abs(count - num_sequences))
        return max(self._plain_s[nearest] + profiled - self._profile.seconds(nearest), profiled)

    def _extra_of(self, shape: tuple[int, int]) -> float:
        if shape not in self._extra:
            return 1.0
        factor, noted_at = self._extra[shape]
        return 1.0 + (factor - 1.0) * _FADING ** (self._num_noted - noted_at)


class DraftCosts:
    """What guessing costs, by the number of drafts: profiled at first, then as it turns out."""

    def __init__(self, first: CostTable, more: CostTable, reading: CostTable) -> None:
        """``first`` is of the first token of each draft, ``more`` of one more token of each.

        ``reading`` is of known tokens, by their number, that were not read yet.
        """
        self._first = first
        self._more = more
        self._reading = reading
        self._pace = 1.0

    def note(self, num_drafts: int, depth: int, num_read: int, seconds: float) -> None:
        """So many drafts of so many tokens took so long, with what had to be read for them."""
        expected_s = self.seconds(num_drafts, depth) + self.reading_s(num_read)
        self._pace *= 1 + _LEARNING_RATE * (_calm(seconds / expected_s) - 1)

    def revive(self) -> None:
        """Nobody was asked: drift back to what was profiled."""
        self._pace **= 1.0 - _FORGETTING_RATE

    def seconds(self, num_drafts: int, depth: int) -> float:
        """The cost of so many drafts of so many tokens."""
        more_s = (depth - 1) * self._more.seconds(num_drafts)
        return self._pace * (self._first.seconds(num_drafts) + more_s)

    def reading_s(self, num_tokens: int) -> float:
        """The cost of reading so many tokens before a first guess."""
        return self._pace * self._reading.seconds(num_tokens) if num_tokens else 0.0


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


class SlowDrafter(Drafter, Protocol):
    """Guesses after reading what is known."""

    def num_unread(self, sequence: EngineSequence) -> int:
        """How many tokens it has to read before it can guess for this sequence."""
        ...


class _Hopes:
    """How often guesses of one kind came true, request by request, at each place of a draft."""

    def __init__(self, depth_max: int) -> None:
        self._by_request: dict[int, list[float]] = {}
        """How often the guess at each place came true if all before it did."""
        self._usual = [_HOPE] * depth_max
        """The same over all requests: what a new one begins with."""

    def of(self, request_id: int) -> list[float]:
        """What to expect of each place."""
        return self._by_request.get(request_id, self._usual)

    def keep(self, request_ids: set[int]) -> None:
        """Forget all others."""
        for request_id in self._by_request.keys() - request_ids:
            del self._by_request[request_id]

    def learn(self, request_id: int, num_drafted: int, num_accepted: int) -> None:
        """So many guesses came true."""
        hopes = self._by_request.setdefault(request_id, list(self._usual))
        for place in range(min(num_accepted + 1, num_drafted)):
            came_true = float(place < num_accepted)
            hopes[place] += _LEARNING_RATE * (came_true - hopes[place])
            self._usual[place] += _LEARNING_RATE / 4 * (came_true - self._usual[place])

    def revive(self, request_id: int) -> None:
        """Nobody guessed: drift back to hope."""
        hopes = self._by_request.setdefault(request_id, list(self._usual))
        for place, hope in enumerate(hopes):
            hopes[place] = hope + _FORGETTING_RATE * (_HOPE - hope)


class _Work(NamedTuple):
    """What the next step is to do so far, and what it is expected to bring."""

    num_tokens: int
    expected: float
    draft_s: float = 0.0


class _Choice(NamedTuple):
    """Whose drafts are looked up and whose are asked for, how deep, and the tokens a second."""

    found: list[int]
    found_depth: int
    asked: list[EngineSequence]
    asked_depth: int
    rate: float


class _Answer(NamedTuple):
    """What the drafter last did."""

    num_drafts: int
    depth: int
    num_read: int


class Speculator:
    """Decides how long drafts are, and gets them.

    Args:
        lookup: Who guesses for nothing, and only where something stood there before.
        drafter: Who guesses everywhere else; ``None``: nobody.
        depth_max: The longest draft.
        costs: For the best depth before every step; ``None``: drafts are always the longest.
    """

    def __init__(
        self, lookup: Drafter, *, drafter: SlowDrafter | None, depth_max: int, costs: Costs | None
    ) -> None:
        assert depth_max > 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._lookup = lookup
        self._drafter = drafter
        self._depth_max = depth_max
        self._costs = costs
        self._found = _Hopes(depth_max)
        self._asked = _Hopes(depth_max)
        self._looked_up: set[int] = set()
        """Whose last draft was found."""
        self._last_answer: _Answer | None = None

    def propose(self, sequences: Sequence[EngineSequence]) -> dict[int, list[int]]:
        """Drafts for the running sequences that have caught up, by request id."""
        self._last_answer = None
        living = {sequence.request_id for sequence in sequences}
        self._found.keep(living)
        self._asked.keep(living)
        ready = [s for s in sequences if s.num_tokens == s.num_computed_tokens + 1]
        rooms = {
            sequence: room
            for sequence in ready
            if (room := min(self._depth_max, sequence.num_tokens_max - sequence.num_tokens - 1)) > 0
        }
        if not rooms:
            return {}
        found = self._lookup.propose([*rooms.items()])
        chosen = self._choose(len(ready), [*rooms], found)
        self._looked_up = set(chosen.found) if chosen.found_depth else set()
        drafts = {number: found[number][: chosen.found_depth] for number in self._looked_up}
        if self._drafter is not None and chosen.asked_depth:
            asked = {s: min(chosen.asked_depth, rooms[s]) for s in chosen.asked}
            num_unread = sum(map(self._drafter.num_unread, asked))
            answered = self._drafter.propose([(s, asked.get(s, 0)) for s in rooms])
            if answered:  # perhaps not by all: where there is no room nothing is read either
                num_read = num_unread - sum(map(self._drafter.num_unread, asked))
                self._last_answer = _Answer(len(answered), chosen.asked_depth, num_read)
            drafts |= answered
        return drafts

    def note_between(self, seconds: float) -> None:
        """So much time passed between two steps, their drafts left out."""
        if self._costs is not None:
            self._costs.step.note_between(seconds)

    def note_proposal(self, seconds: float) -> None:
        """The last drafts took so long to make."""
        answer = self._last_answer
        if answer is not None and self._costs is not None and self._costs.draft is not None:
            self._costs.draft.note(*answer, seconds)

    def note(self, plan: StepPlan, draws: Draws, seconds: float) -> None:
        """A step was carried out: learn from it."""
        if self._costs is not None and all(share.samples for share in plan.scheduled):
            self._costs.step.note(len(plan.scheduled), plan.num_tokens, seconds)
        for sequence, _, draft in plan.scheduled:
            drawn = draws.get(sequence.request_id)
            if sequence.request_id in plan.forced:
                continue  # nobody has guessed that
            if draft and isinstance(drawn, tuple):
                self.num_draft_tokens += len(draft)
                self.num_accepted_tokens += len(drawn) - 1
                hopes = self._found if sequence.request_id in self._looked_up else self._asked
                hopes.learn(sequence.request_id, len(draft), len(drawn) - 1)

    def _choose(
        self, num_ready: int, sequences: list[EngineSequence], found: Mapping[int, list[int]]
    ) -> _Choice:
        """Who is believed, and how far.

        Either what was found is all there is, or the drafter is asked besides: then also where
        something was found that is less likely to come true than what the drafter would say.
        """
        chosen = self._best_depths(num_ready, list(found), [])
        others: list[EngineSequence] = []
        if self._drafter is not None:
            believed = {
                number for number in found if self._found.of(number)[0] >= self._asked.of(number)[0]
            }
            others = [s for s in sequences if s.request_id not in believed]
            besides = self._best_depths(num_ready, list(believed), others)
            if self._costs is None or besides.rate > chosen.rate:
                chosen = besides
        for number in found.keys() - set(chosen.found if chosen.found_depth else ()):
            self._found.revive(number)
        if self._costs is not None and not chosen.asked_depth:
            for sequence in others:
                self._asked.revive(sequence.request_id)
            if self._costs.draft is not None:
                self._costs.draft.revive()
        return chosen

    def _best_depths(
        self, num_ready: int, found: list[int], others: list[EngineSequence]
    ) -> _Choice:
        """The depths that bring the most tokens a second: of drafts found, and of drafts asked for.

        One is chosen after the other, what costs nothing first.
        """
        if self._costs is None:
            return _Choice(found, self._depth_max, others, self._depth_max if others else 0, 0.0)
        work = _Work(num_ready, float(num_ready))
        found_depth, work = self._deepen(num_ready, work, found, self._found)
        asked = [sequence.request_id for sequence in others]
        asked_depth, work = self._deepen(
            num_ready, work, asked, self._asked, self._costs.draft, self._reading_s(others)
        )
        return _Choice(found, found_depth, others, asked_depth, self._rate(num_ready, work))

    def _deepen(
        self,
        num_ready: int,
        work: _Work,
        request_ids: list[int],
        hopes: _Hopes,
        draft: DraftCosts | None = None,
        reading_s: float = 0.0,
    ) -> tuple[int, _Work]:
        """The depth of drafts for these that brings the most tokens a second, and the work then.

        ``reading_s`` is what reading costs for each token that each of the sequences will get.
        """
        count = len(request_ids)
        chances = [hopes.of(request_id) for request_id in request_ids]
        survivals = [1.0] * count
        expected = work.expected
        best_depth, best, best_rate = 0, work, self._rate(num_ready, work)
        for depth in range(1, self._depth_max + 1 if count else 1):
            survivals = [s * each[depth - 1] for s, each in zip(survivals, chances, strict=True)]
            expected += sum(survivals)
            draft_s = 0.0
            if draft is not None:
                draft_s = draft.seconds(count, depth) + reading_s * expected / num_ready
            more = _Work(work.num_tokens + count * depth, expected, work.draft_s + draft_s)
            rate = self._rate(num_ready, more)
            if rate > best_rate:
                best_depth, best, best_rate = depth, more, rate
        return best_depth, best

    def _reading_s(self, sequences: list[EngineSequence]) -> float:
        """What the drafter has to read first, spread over the tokens that its reader will get."""
        if self._drafter is None or self._costs is None or self._costs.draft is None:
            return 0.0
        draft, num_unread = self._costs.draft, self._drafter.num_unread
        return sum(
            draft.reading_s(num_unread(sequence)) / (sequence.num_tokens_max - sequence.num_tokens)
            for sequence in sequences
        )

    def _rate(self, num_sequences: int, work: _Work) -> float:
        """Tokens a second."""
        assert self._costs is not None
        step = self._costs.step
        step_s = step.between_s + step.seconds(num_sequences, work.num_tokens)
        return work.expected / (step_s + work.draft_s)
