"""The names that transformers gives to a model's tensors, and their shapes by its config.

Nothing else in the system knows these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from understudy.runtime.model.config import ModelConfig


class Part(NamedTuple):
    """A tensor of the checkpoint, and the shape that the config gives it."""

    name: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """What the matrix belongs to, under whose name a quantised one has its parts."""
        return self.name.removesuffix(".weight")


class LayerParts:
    """The tensors of one layer, by their names in the checkpoint."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        prefix = f"model.layers.{index}."
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        projections = (
            (f"{attention}q_proj", queries),
            (f"{attention}k_proj", keys),
            (f"{attention}v_proj", keys),
        )
        self.attention_norm = Part(f"{prefix}input_layernorm.weight", (hidden,))
        self.mlp_norm = Part(f"{prefix}post_attention_layernorm.weight", (hidden,))
        self.qkv = [Part(f"{name}.weight", (size, hidden)) for name, size in projections]
        self.qkv_bias = (
            [Part(f"{name}.bias", (size,)) for name, size in projections]
            if config.attention_bias
            else []
        )
        self.qk_norm = (
            [Part(f"{attention}{name}.weight", (config.head_dim,)) for name in ("q_norm", "k_norm")]
            if config.qk_norm
            else []
        )
        self.output = [Part(f"{attention}o_proj.weight", (hidden, queries))]
        self.output_bias = (
            [Part(f"{attention}o_proj.bias", (hidden,))] if config.attention_output_bias else []
        )
        gates = (f"{mlp}gate_proj", f"{mlp}up_proj")
        self.gate_up = [Part(f"{name}.weight", (inner, hidden)) for name in gates]
        self.down = [Part(f"{mlp}down_proj.weight", (hidden, inner))]
        self.gate_up_bias = (
            [Part(f"{name}.bias", (inner,)) for name in gates] if config.mlp_bias else []
        )
        self.down_bias = [Part(f"{mlp}down_proj.bias", (hidden,))] if config.mlp_bias else []

    @property
    def matrices(self) -> tuple[list[Part], ...]:
        """What linears multiply with; those that become one are in one list."""
        return (self.qkv, self.output, self.gate_up, self.down)

    def __iter__(self) -> Iterator[Part]:
        yield from (self.attention_norm, self.mlp_norm)
        yield from (*self.qkv, *self.qkv_bias, *self.qk_norm, *self.output, *self.output_bias)
        yield from (*self.gate_up, *self.gate_up_bias, *self.down, *self.down_bias)


def outer_parts(config: ModelConfig) -> tuple[Part, Part, Part]:
    """Embedding, last norm and output embedding; tied, the last is the first again."""
    shape = (config.vocab_size, config.hidden_size)
    embedding = Part("model.embed_tokens.weight", shape)
    head = embedding if config.tie_word_embeddings else Part("lm_head.weight", shape)
    return embedding, Part("model.norm.weight", (config.hidden_size,)), head


def matrices_of(config: ModelConfig) -> Iterator[list[Part]]:
    """All that linears multiply with, but a tied output embedding."""
    for index in range(config.num_layers):
        yield from LayerParts(config, index).matrices
    if not config.tie_word_embeddings:
        yield [outer_parts(config)[2]]


def all_parts(config: ModelConfig) -> Iterator[Part]:
    """Every tensor that a model has, once."""
    yield from dict.fromkeys(outer_parts(config))
    for index in range(config.num_layers):
        yield from LayerParts(config, index)
