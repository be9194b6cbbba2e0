"""Encoders of the BERT family: as transformers computes them, whatever is computed beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.encoders import (
    BERT,
    BERT_SCORER,
    ENCODERS,
    LENGTH_MAX,
    ROBERTA,
    SCORERS,
    VOCAB_SIZE,
    reference,
    write_encoder,
)
from tests.pooling import LAST, MEAN, PARAMS, floats, pool, pooling_request, vectors
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import FinishReason, Pooling, PoolingKind, Request
from understudy.runtime.model.encoder import Encoder, load_encoder
from understudy.runtime.model.encoder_runner import EncoderRunner

CPU = torch.device("cpu")
LENGTHS = (1, 2, 3, 7, 16, 17, 40, 64, 100, LENGTH_MAX)
CLS = Pooling(PoolingKind.CLS)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    return load_encoder(directory, dtype=dtype, device=CPU)


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 1e-5


@pytest.mark.parametrize("architecture", ENCODERS)
def test_states_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    directory = write_encoder(tmp_path, architecture)
    encoder, model = load(directory), reference(directory, architecture)
    with torch.inference_mode():
        for prompt in prompts():  # all ids, the padding's among them
            theirs = model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
            assert_near(encoder.states(prompt), theirs)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_activations_are_those_of_transformers(tmp_path: Path, activation: str) -> None:
    directory = write_encoder(tmp_path, BERT, hidden_act=activation)
    encoder, model = load(directory), reference(directory, BERT)
    prompt = prompts()[5]
    with torch.inference_mode():
        theirs = model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
        assert_near(encoder.states(prompt), theirs)


@pytest.mark.parametrize("architecture", SCORERS)
def test_scores_of_pairs_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    directory = write_encoder(tmp_path, architecture)
    encoder, model = load(directory), reference(directory, architecture)
    is_bert = architecture == BERT_SCORER
    with torch.inference_mode():
        for prompt in prompts()[2:]:
            second_at = len(prompt) // 2 if is_bert else 0
            kinds = [0] * len(prompt)
            if is_bert:
                kinds[second_at:] = [1] * (len(prompt) - second_at)
            theirs = model(
                input_ids=torch.tensor([prompt]), token_type_ids=torch.tensor([kinds])
            ).logits[0]
            states = encoder.states(prompt, second_at=second_at)
            assert_near(encoder.score(states), theirs)


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("pooling", [MEAN, LAST, CLS, Pooling(PoolingKind.MEAN, dimensions=7)])
def test_vectors_do_not_depend_on_what_is_computed_beside_them(
    tmp_path: Path, architecture: str, pooling: Pooling
) -> None:
    directory = write_encoder(tmp_path, architecture)
    encoder, model = load(directory), reference(directory, architecture)
    requests = [pooling_request(i, prompt, pooling) for i, prompt in enumerate(prompts())]
    alone: dict[int, bytes] = {}
    for request in requests:
        alone |= vectors(
            pool(EncoderRunner(encoder), [request], max_model_len=LENGTH_MAX, block_size=4)
        )
    for budget in (3, 32, 1000):
        together = pool(
            EncoderRunner(load(directory)),
            reversed(requests),
            max_model_len=LENGTH_MAX,
            max_num_batched_tokens=budget,
            num_blocks=80,
            block_size=4,
            enable_prefix_caching=False,
        )
        assert vectors(together) == alone
    for request in requests:
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([request.prompt])).last_hidden_state[0]
        picked = {PoolingKind.MEAN: states.mean(0), PoolingKind.LAST: states[-1]}
        theirs = picked.get(pooling.kind, states[0])[: pooling.dimensions or None]
        ours = torch.tensor(floats(alone[request.request_id]))
        assert_near(ours, torch.nn.functional.normalize(theirs, dim=0))


def test_what_an_encoder_cannot_make_ends_with_an_error(tmp_path: Path) -> None:
    runner = EncoderRunner(load(write_encoder(tmp_path, BERT)))
    requests = [
        Request(1, 1, (1, 2, 3), PARAMS),  # a token
        pooling_request(2, (1, 2, 3), Pooling(PoolingKind.SCORE)),
        pooling_request(3, (1, 2, 3), MEAN),
    ]
    ended = pool(runner, requests, max_model_len=LENGTH_MAX)
    assert [ended[number].finish for number in (1, 2)] == [FinishReason.ERROR] * 2
    assert ended[3].finish == FinishReason.STOP


def test_numbers_that_are_not_finite_end_one_request_and_no_other(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path, BERT)
    tensors = load_file(directory / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][7] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    runner = EncoderRunner(load(directory))
    requests = [pooling_request(1, (1, 7, 2), MEAN), pooling_request(2, (1, 6, 2), MEAN)]
    ended = pool(runner, requests, max_model_len=LENGTH_MAX)
    assert [ended[number].finish for number in (1, 2)] == [FinishReason.ERROR, FinishReason.STOP]


def test_bfloat16_is_near(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path, ROBERTA)
    prompt = prompts()[6]
    with torch.inference_mode():
        one = load(directory).states(prompt)
        other = load(directory, torch.bfloat16).states(prompt)
    assert other.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(one, other.float())
    assert float(cosine.min()) > 0.99


def test_names_of_old_checkpoints_are_known(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path, BERT)
    encoder = load(directory)
    tensors = load_file(directory / "model.safetensors")
    old = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    save_file(old, directory / "model.safetensors")
    prompt = prompts()[4]
    with torch.inference_mode():
        assert torch.equal(load(directory).states(prompt), encoder.states(prompt))


def test_a_damaged_checkpoint_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path, BERT)
    tensors = load_file(directory / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["embeddings.LayerNorm.weight"] = torch.ones(3)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ConfigurationError) as raised:
        load(directory)
    assert [line.partition(": ")[2] for line in raised.value.problems] == [
        "embeddings.LayerNorm.weight has shape [3], config.json asks for [48]",
        "tensor encoder.layer.1.output.dense.bias is missing",
    ]


def test_a_type_that_the_model_lacks_changes_nothing(tmp_path: Path) -> None:
    encoder = load(write_encoder(tmp_path, ROBERTA))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["type_vocab_size"] == 1
    with torch.inference_mode():
        assert torch.equal(encoder.states([5, 6, 7], second_at=1), encoder.states([5, 6, 7]))
