"""What a directory says of an encoder, and of how vectors are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.encoders import write_sentence_transformers
from tests.tiny_models import write_model
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import PoolingKind
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.encoder_config import SUPPORTED_ENCODERS, EncoderConfig, read_config
from understudy.runtime.model.pooling_config import pooling_of

SHAPE: dict[str, Any] = {
    "architectures": ["BertModel"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def write(directory: Path, **fields: Any) -> Path:
    values = {name: value for name, value in {**SHAPE, **fields}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def problems(directory: Path) -> list[str]:
    with pytest.raises(ConfigurationError) as raised:
        read_config(directory)
    return [problem.partition("config.json: ")[2] for problem in raised.value.problems]


def test_an_encoder_is_told_from_a_decoder(tmp_path: Path) -> None:
    decoder = write_model(tmp_path / "decoder")
    assert isinstance(read_config(decoder), ModelConfig)
    for architecture in SUPPORTED_ENCODERS:
        config = read_config(write(tmp_path, architectures=[architecture], num_labels=1))
        assert isinstance(config, EncoderConfig)
        assert config.has_score_head == architecture.endswith("Classification")


def test_positions_of_roberta_begin_behind_its_padding(tmp_path: Path) -> None:
    bert = read_config(write(tmp_path))
    assert bert.max_model_len == 64
    roberta = read_config(write(tmp_path, architectures=["RobertaModel"]))
    assert roberta.max_model_len == 62


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"hidden_act": "silu"}, "hidden_act 'silu' is not supported; supported: gelu, gelu_new,"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder true is not supported"),
        ({"pad_token_id": 100}, "pad_token_id must be an integer from 0 to 99, got 100"),
        (
            {"architectures": ["RobertaModel"], "pad_token_id": 63},
            "max_position_embeddings leaves no position behind pad_token_id",
        ),
        (
            {"architectures": ["BertForSequenceClassification"]},
            "a classification head with 2 labels makes no score; supported: one label",
        ),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
            "a classification head with 2 labels",
        ),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}},
            "the scores' activation 'torch.nn.modules.activation.Tanh' is not supported",
        ),
        (
            {"architectures": ["GPT2Model"]},
            "unsupported architecture 'GPT2Model'; supported: Llama",
        ),
    ],
)
def test_what_cannot_be_served_is_said(
    tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    [told] = problems(write(tmp_path, **fields))
    assert told.startswith(problem)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    told = problems(write(tmp_path, hidden_size=30, is_decoder=True, num_hidden_layers=0))
    assert len(told) == 3


@pytest.mark.parametrize(
    ("fields", "squashes"),
    [
        ({}, True),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, False),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}}, True),
    ],
)
def test_scores_are_squashed_unless_the_checkpoint_says_other(
    tmp_path: Path, fields: dict[str, Any], squashes: bool
) -> None:
    head = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    config = EncoderConfig.from_directory(write(tmp_path, **head, **fields))
    assert config.squashes_scores == squashes


# Pooling


def kind_of(directory: Path) -> PoolingKind:
    return pooling_of(directory, read_config(directory))


def test_without_a_word_decoders_take_the_last_state_and_encoders_the_mean(tmp_path: Path) -> None:
    assert kind_of(write(tmp_path)) is PoolingKind.MEAN
    assert kind_of(write_model(tmp_path / "decoder")) is PoolingKind.LAST
    head = write(tmp_path, architectures=["BertForSequenceClassification"], num_labels=1)
    assert kind_of(head) is PoolingKind.SCORE


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("cls", PoolingKind.CLS), ("mean", PoolingKind.MEAN), ("lasttoken", PoolingKind.LAST)],
)
def test_a_checkpoints_own_word_counts(tmp_path: Path, mode: str, kind: PoolingKind) -> None:
    write_sentence_transformers(write(tmp_path), mode)
    assert kind_of(tmp_path) is kind
    (tmp_path / "modules.json").unlink()
    assert kind_of(tmp_path) is kind
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    assert kind_of(tmp_path) is kind


def test_a_decoder_may_be_pooled_by_its_mean_but_not_by_its_first_state(tmp_path: Path) -> None:
    mean, first = write_model(tmp_path / "mean"), write_model(tmp_path / "first")
    write_sentence_transformers(mean, "mean")
    assert kind_of(mean) is PoolingKind.MEAN
    write_sentence_transformers(first, "cls")
    with pytest.raises(ConfigurationError, match="sees nothing of the text"):
        kind_of(first)


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        ("{", "no valid JSON"),
        ("{}", "must be a JSON array of objects"),
        ("[1]", "must be a JSON array of objects"),
        ('[{"type": "sentence_transformers.models.Dense"}]', "the module 'Dense' is not supported"),
        ('[{"type": "x.Pooling", "path": "../other"}]', "is no folder's name"),
        ('[{"type": "x.Pooling", "path": "/etc"}]', "is no folder's name"),
    ],
)
def test_modules_that_are_not_known_are_refused(tmp_path: Path, modules: str, problem: str) -> None:
    (write(tmp_path) / "modules.json").write_text(modules)
    with pytest.raises(ConfigurationError, match=problem):
        kind_of(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "weightedmean"},
    ],
)
def test_poolings_that_are_not_known_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write(tmp_path) / "1_Pooling"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="supported: cls, mean, lasttoken"):
        kind_of(tmp_path)
