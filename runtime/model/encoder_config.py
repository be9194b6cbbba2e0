"""What a model directory says about an encoder of the BERT family: shapes, positions, its head.

Encoders turn a text into a vector and generate nothing. Imports no torch. As in ``config``, no
value is trusted, and all problems are reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.config import (
    CHECKPOINT_DTYPES,
    SUPPORTED_ARCHITECTURES,
    ConfigFields,
    ModelConfig,
    SamplingDefaults,
    config_fields,
    read_architecture,
    shown,
)

Family = Literal["bert", "roberta"]
Activation = Literal["gelu", "gelu_tanh", "relu"]

_FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "roberta", "Camembert": "roberta"}
)
_MODEL: Final = "Model"
_CLASSIFIER: Final = "ForSequenceClassification"
SUPPORTED_ENCODERS: Final = tuple(
    f"{name}{kind}" for name in _FAMILIES for kind in (_MODEL, _CLASSIFIER)
)
_ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
)
_LABELS_UNSAID: Final = 2
"""What a config without labels means."""


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """An encoder of the BERT family, fully described."""

    architecture: str
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: Activation
    layer_norm_eps: float
    max_position_embeddings: int
    pad_token_id: int
    type_vocab_size: int
    has_score_head: bool
    """It ends in a classification head with one label, and makes scores in place of embeddings."""
    squashes_scores: bool
    """Whether a score is the sigmoid of what the head says."""
    dtype: str | None
    """What the checkpoint was saved in: float32, float16, bfloat16, or unknown."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends an answer: it makes none."""
        return ()

    @property
    def sampling(self) -> SamplingDefaults:
        """How tokens are drawn: there is nothing to say."""
        return SamplingDefaults()

    @property
    def head_dim(self) -> int:
        """The width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def first_position(self) -> int:
        """The position of a text's first token: RoBERTa counts from behind its padding."""
        return self.pad_token_id + 1 if self.family == "roberta" else 0

    @property
    def max_model_len(self) -> int:
        """The longest text that the positions reach."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def from_directory(cls, path: Path) -> EncoderConfig:
        """Read a model directory; raise ConfigurationError with every problem found."""
        fields = config_fields(path)
        architecture = read_architecture(fields, SUPPORTED_ENCODERS)
        config = _encoder_config(architecture, fields)
        if fields.problems:
            raise ConfigurationError(*fields.problems)
        return config


def read_config(path: Path) -> ModelConfig | EncoderConfig:
    """Read a model directory of whichever kind; raise ConfigurationError with every problem."""
    known = (*SUPPORTED_ARCHITECTURES, *SUPPORTED_ENCODERS)
    if read_architecture(config_fields(path), known) in SUPPORTED_ENCODERS:
        return EncoderConfig.from_directory(path)
    return ModelConfig.from_directory(path)


def _encoder_config(architecture: str, fields: ConfigFields) -> EncoderConfig:
    has_head = architecture.endswith(_CLASSIFIER)
    family = _FAMILIES[architecture.removesuffix(_CLASSIFIER if has_head else _MODEL)]
    activation = fields.values.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        fields.problem(f"hidden_act {shown(activation)} is not supported; supported: {supported}")
    positions = fields.values.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        fields.problem(f"position_embedding_type {shown(positions)} is not supported")
    if fields.boolean("is_decoder", default=False):
        fields.problem("is_decoder true is not supported")
    vocab_size = fields.integer("vocab_size", 2, 1 << 24)
    hidden_size = fields.integer("hidden_size", 8, 1 << 17)
    num_heads = fields.integer("num_attention_heads", 1, 4096)
    if hidden_size % num_heads:
        fields.problem(
            f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}"
        )
    dtype = fields.values.get("dtype", fields.values.get("torch_dtype"))
    config = EncoderConfig(
        architecture=architecture,
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 20),
        num_layers=fields.integer("num_hidden_layers", 1, 1024),
        num_heads=num_heads,
        activation=_ACTIVATIONS.get(str(activation), "gelu"),
        layer_norm_eps=fields.number("layer_norm_eps", 0.0, 1.0, default=1e-12),
        max_position_embeddings=fields.integer("max_position_embeddings", 1, 1 << 26),
        pad_token_id=fields.integer(
            "pad_token_id", 0, vocab_size - 1, default=1 if family == "roberta" else 0
        ),
        type_vocab_size=fields.integer("type_vocab_size", 1, 1 << 16, default=2),
        has_score_head=has_head,
        squashes_scores=_squashes_scores(fields),
        dtype=dtype if dtype in CHECKPOINT_DTYPES else None,
    )
    if config.max_model_len < 1:
        fields.problem("max_position_embeddings leaves no position behind pad_token_id")
    if has_head and _num_labels(fields) != 1:
        fields.problem(
            f"a classification head with {_num_labels(fields)} labels makes no score;"
            " supported: one label"
        )
    return config


def _num_labels(fields: ConfigFields) -> int:
    labels = fields.values.get("id2label")
    if isinstance(labels, dict):
        return len(labels)
    return fields.integer("num_labels", 1, 1 << 20, default=_LABELS_UNSAID)


def _squashes_scores(fields: ConfigFields) -> bool:
    """Whether scores go through a sigmoid: yes, unless sentence-transformers has said other."""
    newer = fields.section("sentence_transformers").values.get("activation_fn")
    name = newer or fields.values.get("sbert_ce_default_activation_function")
    kind = str(name or "Sigmoid").rpartition(".")[2]
    if kind not in {"Sigmoid", "Identity"}:
        fields.problem(f"the scores' activation {shown(name)} is not supported")
    return kind == "Sigmoid"
