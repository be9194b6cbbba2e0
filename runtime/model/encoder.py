"""The encoders of the BERT family (Devlin et al., arXiv:1810.04805; Liu et al., 1907.11692).

::

    token + position + type ─ norm ─┬ attention ─ add ─ norm ─┬ MLP ─ add ─ norm ─ … ─ states
                                    └──────────┘              └────┘
    first state ─ dense ─ tanh ─ dense ─ score        with a classification head

Each text is computed by itself, in one piece: every token sees every other, so nothing can be
computed before all of it is there; and since shapes are those of the text alone, not a bit of a
vector depends on what else an engine has to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.checkpoint import Checkpoint
from understudy.runtime.model.encoder_config import Activation, EncoderConfig

_PROBLEMS_MAX: Final = 8
_ACTIVATIONS: Final[Mapping[Activation, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_tanh": lambda rows: F.gelu(rows, approximate="tanh"),
        "relu": F.relu,
    }
)
_NORM_PARTS: Final = (("weight", "gamma"), ("bias", "beta"))
"""Old checkpoints name a norm's parts in TensorFlow's way."""


class _Dense(NamedTuple):
    weight: Tensor
    bias: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)


class _Layer(NamedTuple):
    qkv: _Dense
    """Queries, keys and values, as one matrix."""
    attention_output: _Dense
    attention_norm: _Dense
    up: _Dense
    down: _Dense
    norm: _Dense


class _Head(NamedTuple):
    dense: _Dense
    out: _Dense


class EncoderWeights(NamedTuple):
    """All weights of an encoder, on one device."""

    tokens: Tensor
    positions: Tensor
    types: Tensor
    norm: _Dense
    layers: tuple[_Layer, ...]
    head: _Head | None


class Encoder:
    """A loaded encoder. Keeps no state between calls."""

    def __init__(self, config: EncoderConfig, weights: EncoderWeights) -> None:
        self.config = config
        self.device = weights.tokens.device
        self._weights = weights
        self._activate = _ACTIVATIONS[config.activation]

    def states(self, token_ids: list[int], *, second_at: int = 0) -> Tensor:
        """The last states of a text's tokens ``[tokens, hidden_size]``.

        Args:
            token_ids: The whole text, or two; at most ``max_model_len``.
            second_at: Where the second text begins; 0: there is one.
        """
        ids = torch.tensor(token_ids, device=self.device)
        hidden = self._normalise(self._embed(ids, second_at), self._weights.norm)
        for layer in self._weights.layers:
            attended = layer.attention_output(self._attend(layer.qkv(hidden)))
            hidden = self._normalise(attended + hidden, layer.attention_norm)
            hidden = self._normalise(
                layer.down(self._activate(layer.up(hidden))) + hidden, layer.norm
            )
        return hidden

    def score(self, states: Tensor) -> Tensor:
        """What the classification head says of a text, ``[1]``."""
        head = self._weights.head
        assert head is not None
        return head.out(torch.tanh(head.dense(states[0])))

    def _embed(self, ids: Tensor, second_at: int) -> Tensor:
        config, weights = self.config, self._weights
        positions = torch.arange(len(ids), device=self.device)
        if config.family == "roberta":
            # Padding has no position of its own, wherever it stands in a text.
            is_token = (ids != config.pad_token_id).long()
            positions = torch.cumsum(is_token, 0) * is_token + config.pad_token_id
        kinds = torch.zeros_like(ids)
        if second_at and config.type_vocab_size > 1:
            kinds[second_at:] = 1
        # In the order of transformers: sums of three differ in their last bits.
        hidden = F.embedding(ids, weights.tokens) + F.embedding(kinds, weights.types)
        return hidden + F.embedding(positions, weights.positions)

    def _attend(self, qkv: Tensor) -> Tensor:
        config = self.config
        heads = qkv.view(len(qkv), 3, config.num_heads, config.head_dim)
        query, key, value = heads.permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
        return mixed.transpose(0, 1).reshape(len(qkv), config.hidden_size)

    def _normalise(self, rows: Tensor, norm: _Dense) -> Tensor:
        return F.layer_norm(
            rows, rows.shape[-1:], norm.weight, norm.bias, self.config.layer_norm_eps
        )


def load_encoder(directory: Path, *, dtype: torch.dtype, device: torch.device) -> Encoder:
    """Load an encoder from a Hugging Face directory.

    Raises:
        ConfigurationError: The directory is no encoder, not a supported one, or damaged.
    """
    config = EncoderConfig.from_directory(directory)
    reader = _Reader(directory, Checkpoint.open(directory), dtype, device)
    with torch.inference_mode():
        weights = _weights(config, reader)
    reader.raise_problems()
    assert weights is not None
    return Encoder(config, weights)


class _Reader:
    """Reads tensors by name; notes what is missing or misshapen, and goes on."""

    def __init__(
        self, directory: Path, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._directory = directory
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._problems: list[str] = []

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._checkpoint.tensors

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape, converted; zeros if it is not as it should be."""
        tensor = torch.zeros(shape, dtype=self._dtype, device=self._device)
        stored = self._checkpoint.tensors.get(name)
        if stored is None:
            self._problems.append(f"{self._directory}: tensor {name} is missing")
        elif stored.shape != shape:
            self._problems.append(
                f"{stored.path}: {name} has shape {list(stored.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        elif not stored.dtype.is_floating_point:
            self._problems.append(f"{stored.path}: {name} is of {stored.dtype}, and no float")
        else:
            self._checkpoint.read(name, tensor)
        return tensor

    def dense(self, name: str, rows: int, columns: int) -> _Dense:
        """A matrix with its bias."""
        return _Dense(
            self.tensor(f"{name}.weight", rows, columns), self.tensor(f"{name}.bias", rows)
        )

    def norm(self, name: str, size: int) -> _Dense:
        """A norm's weight and bias."""
        names = [
            f"{name}.{old}" if self.has(f"{name}.{old}") else f"{name}.{new}"
            for new, old in _NORM_PARTS
        ]
        return _Dense(self.tensor(names[0], size), self.tensor(names[1], size))

    def raise_problems(self) -> None:
        """Raise ConfigurationError if anything was not as it should be."""
        if self._problems:
            raise ConfigurationError(*self._problems[:_PROBLEMS_MAX])


def _weights(config: EncoderConfig, reader: _Reader) -> EncoderWeights:
    hidden = config.hidden_size
    # A model that is saved from within a larger one keeps its name as a prefix.
    prefix = f"{config.family}." if reader.has(_TOKENS.format(f"{config.family}.")) else ""
    embeddings = f"{prefix}embeddings."
    return EncoderWeights(
        tokens=reader.tensor(_TOKENS.format(prefix), config.vocab_size, hidden),
        positions=reader.tensor(
            f"{embeddings}position_embeddings.weight", config.max_position_embeddings, hidden
        ),
        types=reader.tensor(
            f"{embeddings}token_type_embeddings.weight", config.type_vocab_size, hidden
        ),
        norm=reader.norm(f"{embeddings}LayerNorm", hidden),
        layers=tuple(_layers(config, reader, prefix)),
        head=_head(config, reader, prefix) if config.has_score_head else None,
    )


_TOKENS: Final = "{}embeddings.word_embeddings.weight"


def _layers(config: EncoderConfig, reader: _Reader, prefix: str) -> Iterator[_Layer]:
    hidden, inner = config.hidden_size, config.intermediate_size
    for index in range(config.num_layers):
        layer = f"{prefix}encoder.layer.{index}."
        attention = f"{layer}attention."
        parts = [
            reader.dense(f"{attention}self.{name}", hidden, hidden)
            for name in ("query", "key", "value")
        ]
        yield _Layer(
            qkv=_Dense(
                torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
            ),
            attention_output=reader.dense(f"{attention}output.dense", hidden, hidden),
            attention_norm=reader.norm(f"{attention}output.LayerNorm", hidden),
            up=reader.dense(f"{layer}intermediate.dense", inner, hidden),
            down=reader.dense(f"{layer}output.dense", hidden, inner),
            norm=reader.norm(f"{layer}output.LayerNorm", hidden),
        )


def _head(config: EncoderConfig, reader: _Reader, prefix: str) -> _Head:
    hidden = config.hidden_size
    if config.family == "bert":
        return _Head(
            reader.dense(f"{prefix}pooler.dense", hidden, hidden),
            reader.dense("classifier", 1, hidden),
        )
    return _Head(
        reader.dense("classifier.dense", hidden, hidden),
        reader.dense("classifier.out_proj", 1, hidden),
    )
