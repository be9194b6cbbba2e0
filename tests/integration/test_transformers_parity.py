"""Our engine and ``transformers`` on the same checkpoints, saved by ``transformers`` itself.

Random weights, large enough that logits are decisive. Everything is served in batches through the
real scheduler: with small and large chunks, and with a cache so small that sequences lose it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from tests.serving import Service, request_of, serve
from understudy.protocol.request import FinishReason, SamplingParams
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedModel,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

VOCAB_SIZE: Final = 256
NUM_TOKENS: Final = 64
PROMPT_LENGTHS: Final = (1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 33, 40, 48, 63, 90, 130)
NUM_TOP: Final = 5

SHAPE: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE: Final = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE: Final = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
YARN_ROPE: Final = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


def llama_with_llama3_rope() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE))


def llama_with_biases_and_linear_rope() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR_ROPE)
    )


def qwen2_tied() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))


def qwen3_with_yarn_rope() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32, rope_parameters=YARN_ROPE))


@dataclass
class Pair:
    """One checkpoint, loaded by both sides."""

    theirs: Any  # transformers' own types do not know that a causal model can generate
    ours: Transformer

    @cached_property
    def prompts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(7)
        return [
            torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
            for length in PROMPT_LENGTHS
        ]

    @cached_property
    def their_tokens(self) -> list[list[int]]:
        """What ``generate`` answers to each prompt, greedily."""
        answers: list[list[int]] = []
        for prompt in self.prompts:
            tokens = torch.tensor([prompt])
            answer = self.theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
            )
            answers.append(answer[0, len(prompt) :].tolist())
        return answers

    def their_logits(self, tokens: list[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.theirs(torch.tensor([tokens])).logits[0]
        return logits

    def serve(self, **limits: Any) -> Service:
        params = SamplingParams(seed=0, max_tokens=NUM_TOKENS, temperature=0.0, logprobs=NUM_TOP)
        requests = [request_of(i, prompt, params) for i, prompt in enumerate(self.prompts)]
        return serve(self.ours, requests, **limits)


@pytest.fixture(scope="module", autouse=True)
def quiet_and_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    scope="module",
    params=[
        llama_with_llama3_rope,
        llama_with_biases_and_linear_rope,
        qwen2_tied,
        qwen3_with_yarn_rope,
    ],
    ids=lambda make: make.__name__,
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(11)
    theirs = request.param().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # transformers starts biases at 0 and norms at 1, which would hide a mistake in them.
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    directory: Path = tmp_path_factory.mktemp("model")
    is_sharded = request.param is llama_with_llama3_rope
    theirs.save_pretrained(directory, max_shard_size="100KB" if is_sharded else "1GB")
    assert is_sharded == (directory / "model.safetensors.index.json").exists()
    ours = load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    return Pair(theirs, ours)


@pytest.mark.parametrize("max_num_batched_tokens", [16, 64])
def test_greedy_text_is_that_of_generate(pair: Pair, max_num_batched_tokens: int) -> None:
    service = pair.serve(max_num_batched_tokens=max_num_batched_tokens)
    assert service.num_preemptions == 0
    for index, tokens in enumerate(pair.their_tokens):
        served = service.served[index]
        assert served.tokens == tokens, f"prompt {index}"
        assert served.finish is FinishReason.LENGTH


def test_greedy_text_survives_a_cache_that_is_too_small_for_all(pair: Pair) -> None:
    service = pair.serve(max_num_batched_tokens=64, num_blocks=60)
    assert service.num_preemptions > 10
    for index, tokens in enumerate(pair.their_tokens):
        assert service.served[index].tokens == tokens, f"prompt {index}"


def test_logits_are_within_1e_4(pair: Pair) -> None:
    runner = ModelRunner(pair.ours, num_blocks=64, block_size=8)
    for index, (prompt, answer) in enumerate(zip(pair.prompts, pair.their_tokens, strict=True)):
        tokens = prompt + answer
        params = SamplingParams(seed=0, max_tokens=1)
        sequence = Sequence(request_of(index, tokens, params), attempt=0)
        sequence.block_table = list(range(math.ceil(len(tokens) / 8)))
        plan = StepPlan(0, (ScheduledSequence(sequence, len(tokens)),))
        with torch.inference_mode():
            logits = pair.ours.logits(runner.hidden_states(plan))
        torch.testing.assert_close(logits, pair.their_logits(tokens), atol=1e-4, rtol=0.0)


def test_logprobs_are_within_1e_4(pair: Pair) -> None:
    service = pair.serve(max_num_batched_tokens=64)
    for index, (prompt, answer) in enumerate(zip(pair.prompts, pair.their_tokens, strict=True)):
        theirs = pair.their_logits(prompt + answer).log_softmax(dim=1)[len(prompt) - 1 : -1]
        ours = service.served[index].logprobs
        assert len(ours) == NUM_TOKENS
        for expected, token, reported in zip(theirs, answer, ours, strict=True):
            assert reported.chosen == pytest.approx(expected[token].item(), abs=1e-4)
            values = [value for _, value in reported.top]
            assert values == pytest.approx(expected.topk(NUM_TOP).values.tolist(), abs=1e-4)
            for token_id, value in reported.top:
                assert value == pytest.approx(expected[token_id].item(), abs=1e-4)
