"""The whole model by kernels against the whole model in plain torch, and its promise about bits."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.checkpoints import FAMILIES, write_checkpoint
from tests.serving import Service, request_of, serve
from understudy.protocol.request import SamplingParams
from understudy.runtime.model import operations, sampler
from understudy.runtime.model import runner as runner_module
from understudy.runtime.model.attention import Indices
from understudy.runtime.model.exactness import prove_exactness
from understudy.runtime.model.kernels import decode_graphs
from understudy.runtime.model.kernels.attention import TritonAttention
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence

CPU = torch.device("cpu")
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Transformer, Transformer]:
    """One model, plain and by kernels, as if the CPU were a GPU."""
    directory = write_checkpoint(tmp_path_factory.mktemp("model"), FAMILIES[request.param])
    plain = load_model(directory, dtype=torch.float32, device=CPU, numerics="exact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "has_kernels", lambda _: True)
        fast = load_model(directory, dtype=torch.float32, device=CPU, numerics="exact")
    assert isinstance(fast.attention, TritonAttention)
    return plain, fast


def sequences_of(lengths: tuple[int, ...], vocab_size: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(vocab_size, (length,), generator=generator).tolist()
        params = SamplingParams(seed=0, max_tokens=9)
        sequence = Sequence(request_of(index, tokens, params), attempt=0)
        sequence.block_table = list(range(index, 4 * len(lengths), len(lengths)))
        sequences.append(sequence)
    return sequences


@pytest.mark.parametrize("models", ["qwen2", "qwen3"], indirect=True)
def test_logits_are_those_of_plain_torch(models: tuple[Transformer, Transformer]) -> None:
    logits = []
    for model in models:
        sequences = sequences_of((20, 33), model.vocab_size)
        runner = ModelRunner(model, num_blocks=8, block_size=BLOCK_SIZE)
        with torch.inference_mode():
            plan = StepPlan(0, (ScheduledSequence(sequences[0], 20),))
            first = runner.logits(plan)
            sequences[0].num_computed_tokens = 19
            step = [ScheduledSequence(sequences[0], 1), ScheduledSequence(sequences[1], 33)]
            second = runner.logits(StepPlan(1, tuple(step)))
        assert first is not None
        assert second is not None
        logits.append(torch.cat((first, second)))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_exact_numerics_hold(models: tuple[Transformer, Transformer]) -> None:
    prove_exactness(models[1], block_size=BLOCK_SIZE)


class Settled:
    """An event, a stream and a graph that have nothing to wait for."""

    def __init__(self, *_: object) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, _: object) -> None: ...


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of graphs but the recording: a replay computes anew."""
    for name in ("Event", "Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Settled)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(
        decode_graphs, "_pinned", lambda length: torch.zeros(length, dtype=torch.int32)
    )

    def replay(graph: decode_graphs._DecodeGraph) -> None:
        graph.hidden, graph.logits = graph._compute()

    monkeypatch.setattr(decode_graphs._DecodeGraph, "replay", replay)


@pytest.mark.parametrize("models", ["llama"], indirect=True)
@pytest.mark.usefixtures("graphs")
def test_steps_behind_steps_draw_what_steps_in_turn_draw(
    models: tuple[Transformer, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With requests that come late, end at other times, and grow out of one graph into another."""
    model = models[1]
    requests = [
        request_of(
            index,
            range(3, 5 + 3 * index),
            SamplingParams(
                seed=index,
                max_tokens=(3, 24, 8, 17, 7, 13)[index],
                temperature=(0.0, 0.9, 1.4)[index % 3],
                top_k=(0, 5)[index % 2],
            ),
        )
        for index in range(6)
    ]

    def serve_all(*, overlaps: bool) -> Service:
        return serve(
            model,
            requests,
            max_num_seqs=4,
            max_num_batched_tokens=40,
            num_blocks=16,
            block_size=BLOCK_SIZE,
            overlaps=overlaps,
        )

    in_turn = serve_all(overlaps=False)
    monkeypatch.setattr(runner_module, "_decode_graphs", decode_graphs.DecodeGraphs)
    monkeypatch.setattr(sampler, "has_kernels", lambda _: True)
    monkeypatch.setattr(decode_graphs, "SPLIT_KEYS", BLOCK_SIZE)
    behind: list[tuple[bool, bool]] = []
    run_behind = decode_graphs.DecodeGraphs.run_behind

    def noting(
        graphs: decode_graphs.DecodeGraphs,
        tables: list[list[int]],
        kept: Indices | None,
        token_ids: Tensor,
    ) -> decode_graphs.Decoded | None:
        before = graphs._latest
        decoded = run_behind(graphs, tables, kept, token_ids)
        behind.append((kept is None, graphs._latest is before))
        return decoded

    monkeypatch.setattr(decode_graphs.DecodeGraphs, "run_behind", noting)
    ahead = serve_all(overlaps=True)
    assert ahead.served == in_turn.served
    assert ahead.num_steps_ahead > len(behind) > 12, "and some behind steps of other kinds"
    assert set(behind) >= {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize("models", ["llama"], indirect=True)
@pytest.mark.usefixtures("graphs")
def test_warming_up_records_what_so_many_sequences_need(
    models: tuple[Transformer, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_decode_graphs", decode_graphs.DecodeGraphs)
    monkeypatch.setattr(sampler, "has_kernels", lambda _: True)
    runner = ModelRunner(models[1], num_blocks=8, block_size=BLOCK_SIZE)
    before = runner.cache.layers[0].keys.clone()
    runner.warm_up(3)
    assert runner._graphs is not None
    assert [size for size, _ in runner._graphs._graphs] == [4, 2, 1]
    assert torch.equal(runner.cache.layers[0].keys, before), "nobody's keys"


@pytest.mark.parametrize("models", ["qwen2"], indirect=True)
@pytest.mark.usefixtures("graphs")
def test_a_padded_decode_step_gives_the_bits_of_an_unpadded_one(
    models: tuple[Transformer, Transformer],
) -> None:
    model = models[1]
    lengths = (20, 33, 1)
    runner = ModelRunner(model, num_blocks=12, block_size=BLOCK_SIZE)
    sequences = sequences_of(lengths, model.vocab_size)
    with torch.inference_mode():
        for sequence in sequences:
            if sequence.num_tokens > 1:
                share = ScheduledSequence(sequence, sequence.num_tokens - 1)
                runner.hidden_states(StepPlan(0, (share,)))
                sequence.num_computed_tokens = sequence.num_tokens - 1
        step = StepPlan(1, tuple(ScheduledSequence(sequence, 1) for sequence in sequences))
        hidden, logits = runner.hidden_states(step), runner.logits(step)
        zero_slot = runner.cache.zero_slot
        runner._graphs = decode_graphs.DecodeGraphs(model, runner.cache)
        assert torch.equal(runner.hidden_states(step), hidden)
        found = runner.logits(step)
    assert found is not None
    assert logits is not None
    assert torch.equal(found, logits)
    assert not runner.cache.layers[0].keys[zero_slot].any()
