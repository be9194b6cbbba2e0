"""One vector from the states of many tokens: the same bits, however the prompt is computed."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from tests.checkpoints import FAMILIES, write_checkpoint
from tests.pooling import LAST, MEAN, PARAMS, floats, pool, pooling_request, vectors
from understudy.protocol.request import FinishReason, Pooling, PoolingKind, Request
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.pooling import add_rows, unit_vector
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence

LENGTHS = (1, 2, 5, 8, 9, 16, 23, 40, 70)
BLOCK_SIZE = 8

numbers = st.floats(-1e6, 1e6, width=32)
matrices = stnp.arrays(
    np.float64, st.tuples(st.integers(1, 12), st.integers(1, 6)), elements=numbers
)


@given(matrices, st.lists(st.integers(0, 12)))
def test_a_sum_does_not_depend_on_how_its_rows_are_grouped(
    rows: np.ndarray[Any, np.dtype[np.float64]], cuts: list[int]
) -> None:
    zero = np.zeros(rows.shape[1])
    whole = add_rows(zero, rows)
    total = zero
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    for start, stop in pairwise(edges):
        total = add_rows(total, rows[start:stop])
    assert total.tobytes() == whole.tobytes()
    assert not zero.any(), "what is added to stays as it was"
    assert np.allclose(whole, rows.sum(0), rtol=1e-9, atol=1e-3)


@given(st.lists(numbers, min_size=1, max_size=20), st.integers(0, 20))
def test_vectors_are_cut_and_have_length_1_then(values: list[float], dimensions: int) -> None:
    kept = values[: dimensions or None]
    made = floats(unit_vector(np.array(values), dimensions).vector)
    assert len(made) == len(kept)
    length = math.hypot(*kept)
    if length > 1e-30:
        assert math.isclose(math.hypot(*made), 1.0, rel_tol=1e-6)
        for number, before in zip(made, kept, strict=True):
            assert math.isclose(number, before / length, rel_tol=1e-5, abs_tol=1e-6)


def test_a_vector_of_zeros_stays_one() -> None:
    assert floats(unit_vector(np.zeros(3), 2).vector) == (0.0, 0.0)


# Decoders


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    directory: Path = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, FAMILIES[request.param])
    return load_model(directory, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    # All begin alike, so that there is something to share.
    common = torch.randint(128, (20,), generator=generator).tolist()
    made: list[Request] = []
    for length in LENGTHS:
        rest = torch.randint(128, (length,), generator=generator).tolist()
        prompt = (common + rest)[:length]
        number = len(made)
        made += [pooling_request(number, prompt, MEAN), pooling_request(number + 1, prompt, LAST)]
    return made


def runner_of(model: Transformer, *, num_blocks: int) -> ModelRunner:
    return ModelRunner(model, num_blocks=num_blocks, block_size=BLOCK_SIZE)


@pytest.fixture(scope="module")
def alone(model: Transformer, requests: list[Request]) -> dict[int, bytes]:
    """Each by itself, at once, on an engine that has seen nothing before."""
    made: dict[int, bytes] = {}
    for request in requests:
        runner = runner_of(model, num_blocks=16)
        made |= vectors(
            pool(
                runner,
                [request],
                max_num_batched_tokens=1024,
                num_blocks=16,
                block_size=BLOCK_SIZE,
                enable_prefix_caching=False,
            )
        )
    return made


def test_vectors_are_what_the_states_say(
    model: Transformer, requests: list[Request], alone: dict[int, bytes]
) -> None:
    from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan

    for request in requests:
        sequence = Sequence(request, attempt=1)
        sequence.block_table = list(range(16))
        plan = StepPlan(1, (ScheduledSequence(sequence, len(request.prompt)),))
        with torch.inference_mode():
            states = model.normalise(runner_of(model, num_blocks=16).hidden_states(plan))
        assert request.pooling is not None
        is_mean = request.pooling.kind is PoolingKind.MEAN
        expected = states.double().mean(0) if is_mean else states[-1].double()
        expected = torch.nn.functional.normalize(expected, dim=0)
        ours = torch.tensor(floats(alone[request.request_id]), dtype=torch.float64)
        assert float((ours - expected).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("budget", "num_blocks", "num_seqs"), [(1, 256, 32), (7, 256, 32), (64, 256, 4), (9, 12, 32)]
)
@pytest.mark.parametrize("caching", [True, False])
def test_chunks_company_shared_prefixes_and_preemption_change_no_bit(
    model: Transformer,
    requests: list[Request],
    alone: dict[int, bytes],
    budget: int,
    num_blocks: int,
    num_seqs: int,
    caching: bool,
) -> None:
    rows = pool(
        runner_of(model, num_blocks=num_blocks),
        reversed(requests),
        max_num_batched_tokens=budget,
        max_num_seqs=num_seqs,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=caching,
    )
    assert vectors(rows) == alone
    cached = {
        request.request_id: rows[request.request_id].num_cached_tokens for request in requests
    }
    means = {r.request_id for r in requests if r.pooling == MEAN}
    assert not any(cached[request_id] for request_id in means), "every state is needed"
    assert any(cached.values()) == caching


def test_steps_that_are_not_carried_out_count_nothing(
    model: Transformer, requests: list[Request], alone: dict[int, bytes]
) -> None:
    manager = KVCacheManager(num_blocks=64, block_size=BLOCK_SIZE)
    config = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=24, max_model_len=1024, block_size=BLOCK_SIZE
    )
    scheduler = Scheduler(config, manager)
    runner = runner_of(model, num_blocks=64)
    request = requests[-2]
    scheduler.add(Sequence(request, attempt=1))
    rows = []
    number = 0
    while (plan := scheduler.schedule()) is not None:
        draws = runner.execute(plan)
        number += 1
        if number in {1, 3, 4}:
            scheduler.shed(plan)
        else:
            rows += scheduler.update(plan, draws)
    assert number > 6
    assert [row.vector for row in rows if row.finish] == [alone[request.request_id]]


def test_vectors_and_tokens_are_made_in_the_same_steps(
    model: Transformer, requests: list[Request], alone: dict[int, bytes]
) -> None:
    texts = [Request(1000 + r.request_id, 1, r.prompt, PARAMS) for r in requests]
    mixed = [one for pair in zip(requests, texts, strict=True) for one in pair]
    rows = pool(runner_of(model, num_blocks=256), mixed, num_blocks=256, block_size=BLOCK_SIZE)
    assert {number: row.vector for number, row in rows.items() if row.vector} == alone
    for text in texts:
        assert len(rows[text.request_id].tokens) == 1
        assert rows[text.request_id].finish == FinishReason.LENGTH


def test_a_prompt_may_fill_the_context(model: Transformer) -> None:
    prompt = [token % 128 for token in range(24)]
    for pooling in (MEAN, LAST):
        rows = pool(
            runner_of(model, num_blocks=3),
            [pooling_request(1, prompt, pooling), pooling_request(2, [*prompt, 1], pooling)],
            max_model_len=24,
            num_blocks=3,
            block_size=BLOCK_SIZE,
        )
        assert rows[1].vector
        assert rows[2].finish == FinishReason.ERROR


def test_a_decoder_has_no_first_state_and_no_head(model: Transformer) -> None:
    rows = pool(
        runner_of(model, num_blocks=32),
        [pooling_request(int(kind), (1, 2, 3), Pooling(kind)) for kind in PoolingKind],
        num_blocks=32,
        block_size=BLOCK_SIZE,
    )
    assert {number: bool(row.vector) for number, row in rows.items()} == {
        PoolingKind.LAST: True,
        PoolingKind.MEAN: True,
        PoolingKind.CLS: False,
        PoolingKind.SCORE: False,
    }
    assert rows[PoolingKind.CLS].finish == FinishReason.ERROR
