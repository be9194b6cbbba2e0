"""Speculation with real models: it changes how many tokens a step brings, and never which."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.serving import Service, request_of, serve
from tests.unit.model.conftest import LoadModel
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.model.drafter import ModelDrafter
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.prompt_lookup import NgramDrafter
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence
from understudy.runtime.scheduling.speculation import (
    Costs,
    CostTable,
    DraftCosts,
    Drafter,
    SlowDrafter,
    Speculator,
    StepCosts,
)

NUM_BLOCKS = 256
BLOCK_SIZE = 8
PARAMS = (
    SamplingParams(seed=0, max_tokens=20, temperature=0.0),
    SamplingParams(seed=1, max_tokens=20, temperature=0.7, logprobs=2),
    SamplingParams(seed=2, max_tokens=20, top_k=20, top_p=0.9),
    SamplingParams(seed=3, max_tokens=20, temperature=0.0, repetition_penalty=1.3),
    SamplingParams(seed=4, max_tokens=20, frequency_penalty=0.5, presence_penalty=0.3),
    SamplingParams(seed=5, max_tokens=20, stop_token_ids=(3, 4, 5, 6), min_tokens=6),
)


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    # Loops, so that a lookup finds something.
    prompts = [torch.randint(128, (3 + i,), generator=generator).tolist() * 3 for i in range(6)]
    return [request_of(i, prompts[i], params) for i, params in enumerate(PARAMS)]


def drafter_of(model: Transformer) -> ModelDrafter:
    runner = ModelRunner(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return ModelDrafter(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


def speculator_of(
    drafter: SlowDrafter | None,
    *,
    lookup: Drafter | None = None,
    depth_max: int,
    costs: Costs | None = None,
) -> Speculator:
    return Speculator(lookup or Silent(), drafter=drafter, depth_max=depth_max, costs=costs)


class Silent:
    """Guesses nothing."""

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        return {}


class Liar:
    """Guesses wrong half of the time, by the oracle's answers."""

    def __init__(self, truth: Service) -> None:
        self._truth = truth

    def num_unread(self, sequence: EngineSequence) -> int:
        return 0

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        drafts = {}
        for sequence, depth in wanted:
            made = sequence.num_output_tokens
            draft = self._truth.served[sequence.request_id].tokens[made : made + depth]
            if made % 2 and draft:
                draft[made % len(draft)] ^= 1
            drafts[sequence.request_id] = draft
        return drafts


@pytest.fixture
def truth(model_of: LoadModel) -> Service:
    return serve(model_of("llama", torch.float32, "exact"), requests())


@pytest.mark.parametrize("depth", range(1, 9))
@pytest.mark.parametrize("method", ["same model", "other model", "ngram", "liar", "both"])
def test_no_draft_of_any_depth_changes_a_text(
    model_of: LoadModel, truth: Service, method: str, depth: int
) -> None:
    model = model_of("llama", torch.float32, "exact")
    drafters: dict[str, SlowDrafter | None] = {
        "same model": drafter_of(model),
        "other model": drafter_of(model_of("qwen3", torch.float32, "fast")),
        "ngram": None,
        "liar": Liar(truth),
        "both": drafter_of(model_of("qwen3", torch.float32, "fast")),
    }
    lookup = NgramDrafter() if method in {"both", "ngram"} else None
    speculator = speculator_of(drafters[method], lookup=lookup, depth_max=depth)
    assert serve(model, requests(), speculator=speculator).served == truth.served
    assert speculator.num_draft_tokens > 0


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("depth", [1, 4, 8])
def test_the_model_itself_guesses_right(model_of: LoadModel, depth: int, native: bool) -> None:
    model = model_of("llama", torch.float32, "exact", native=native)
    # Guessed at once, the likeliest are not singled out.
    asked = [request for request in requests() if not native or request.params.top_k == 0]
    speculator = speculator_of(drafter_of(model), depth_max=depth)
    assert serve(model, asked, speculator=speculator).served == serve(model, asked).served
    assert speculator.num_accepted_tokens == speculator.num_draft_tokens > 0


def test_an_adaptive_depth_changes_no_text(model_of: LoadModel, truth: Service) -> None:
    model = model_of("llama", torch.float32, "exact")
    draft_costs = DraftCosts(*[CostTable([(1, seconds)]) for seconds in (1e-5, 1e-6, 1e-6)])
    costs = Costs(StepCosts(CostTable([(1, 0.01), (64, 0.05)])), draft_costs)
    speculator = speculator_of(drafter_of(model), depth_max=8, costs=costs)
    assert serve(model, requests(), speculator=speculator).served == truth.served
    assert speculator.num_accepted_tokens > 0


def test_drafts_change_no_text_where_blocks_are_short(model_of: LoadModel, truth: Service) -> None:
    model = model_of("llama", torch.float32, "exact")
    speculator = speculator_of(drafter_of(model), depth_max=4)
    tight = serve(
        model, requests(), speculator=speculator, num_blocks=14, max_num_batched_tokens=16
    )
    assert tight.num_preemptions > 0
    assert tight.served == truth.served


def test_a_drafter_without_room_guesses_nothing(model_of: LoadModel) -> None:
    model = model_of("llama", torch.float32, "exact")
    runner = ModelRunner(model, num_blocks=1, block_size=BLOCK_SIZE)
    drafter = ModelDrafter(runner, num_blocks=1, block_size=BLOCK_SIZE)
    sequence = EngineSequence(request_of(1, range(20), PARAMS[0]), attempt=1)
    assert drafter.propose([(sequence, 4)]) == {}


def test_it_knows_how_much_it_has_to_read_before_it_guesses(model_of: LoadModel) -> None:
    drafter = drafter_of(model_of("llama", torch.float32, "fast"))
    sequence = EngineSequence(request_of(1, list(range(20)), PARAMS[0]), attempt=1)
    sequence.num_computed_tokens = 19
    assert drafter.num_unread(sequence) == 19
    (draft,) = drafter.propose([(sequence, 3)]).values()
    assert drafter.num_unread(sequence) == 0
    for token in [*draft, 5, 6]:
        sequence.append(token)
    sequence.num_computed_tokens = sequence.num_tokens - 1
    assert 0 < drafter.num_unread(sequence) <= 3
