"""The decoder-only transformer of the Llama and Qwen families.

::

    token ids ─ embedding ─┬────────────────────────────┬─ … layers … ─ norm ─ lm_head ─ logits
                           └ norm ─ attention ─ add ┬────┤
                                                    └ norm ─ gated MLP ─ add

Works on a flat batch: one row a token, whichever sequence it belongs to. Only attention knows that
rows belong to sequences; it is told by a plan. Families differ in what is present
(biases, norms of queries and keys, a tied output embedding), never in the flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import KVCache, LayerCache
from understudy.runtime.model.layers import Linear
from understudy.runtime.model.native.attention import NativeAttention, NativePlan
from understudy.runtime.model.native.layers import NativeLayers
from understudy.runtime.model.native.library import native_library
from understudy.runtime.model.native.linear import NativeLinear
from understudy.runtime.model.native.structures import Guessing, address
from understudy.runtime.model.numerics import Numerics, RowTiles, common_row_counts
from understudy.runtime.model.operations import parts_for
from understudy.runtime.model.rope import RotaryEmbedding, Rotation

_LAYER_ROWS_MAX = 256
_HEAD_ROWS_MAX = 64


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Projections that share their input are one matrix."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    """Weights of the norms of query and key heads, ``[heads + kv_heads, head_dim]``."""
    attention_output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All of the layer's matrices."""
        return (self.qkv, self.attention_output, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights of a model, on one device."""

    embedding: Tensor
    """``[vocab_size, hidden_size]``; may be of a narrower dtype than the model computes in."""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear


class Batch(NamedTuple):
    """A step's flat batch. The first tensors have a row for each token, padding included."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    """Where the KV cache keeps each token; padding has none, so this is shorter."""
    tiles: tuple[int, ...]
    """How linears cut the rows."""
    attention: Any
    """The plan of the model's attention."""


class GuessedDraws(NamedTuple):
    """How some tokens in a row are drawn."""

    inverse_temperature: float
    """0 takes the likeliest."""
    keys: list[int]
    """``signed(noise_key(...))`` of each."""


class Transformer:
    """A loaded model: tokens in, hidden states and logits out. Keeps no state between calls."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        numerics: Numerics,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """``kv_dtype`` is that of keys and values; ``None``: as the model computes."""
        self.config = config
        self.numerics = numerics
        self.dtype = weights.norm.dtype
        self.kv_dtype = kv_dtype or self.dtype
        self.device = weights.embedding.device
        self._operations, self.attention = parts_for(
            config, numerics=numerics, dtype=self.dtype, device=self.device
        )
        self._weights = weights
        self._rope = RotaryEmbedding(config, self.device)
        self._native = self._native_layers()
        linears = [linear for layer in weights.layers for linear in layer.linears]
        self.tiles = _row_tiles(linears, numerics, rows_max=_LAYER_ROWS_MAX)
        self._head_tiles = _row_tiles([weights.lm_head], numerics, rows_max=_HEAD_ROWS_MAX)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute a batch's hidden states ``[rows, hidden_size]``; fills the cache on the way."""
        operations = self._operations
        hidden = F.embedding(batch.token_ids, self._weights.embedding).to(self.dtype)
        if self._native is not None:
            plan = cast("NativePlan", batch.attention)
            return self._native.run(hidden, batch.positions, batch.slots, plan, cache)
        rotation = self._rope(batch.positions)
        tiles = batch.tiles
        delta: Tensor | None = None
        for layer, layer_cache in zip(self._weights.layers, cache.layers, strict=True):
            hidden, heads = operations.normalise_and_multiply(
                hidden, delta, layer.attention_norm, layer.qkv, tiles
            )
            delta = self._attend(heads, layer, layer_cache, rotation, batch)
            hidden, gate_and_up = operations.normalise_and_multiply(
                hidden, delta, layer.mlp_norm, layer.gate_up, tiles
            )
            delta = operations.activate_and_multiply(gate_and_up, layer.down, tiles)
        return hidden if delta is None else hidden + delta

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[rows, vocab_size]``, float32, of some rows of hidden states."""
        num_rows = len(hidden)
        tiles = self._head_tiles.cut(num_rows)
        if sum(tiles) > num_rows:
            hidden = F.pad(hidden, (0, 0, 0, sum(tiles) - num_rows))
        weights = self._weights
        logits = self._operations.normalise_and_multiply(
            hidden, None, weights.norm, weights.lm_head, tiles
        ).product
        return logits[:num_rows].to(torch.float32)

    def normalise(self, hidden: Tensor) -> Tensor:
        """Some rows of hidden states as the output embedding sees them: what is pooled."""
        return self._operations.normalise(hidden, self._weights.norm)

    @property
    def guesses(self) -> bool:
        """Whether ``guess`` can be called."""
        head = self._weights.lm_head
        return self._native is not None and isinstance(head, NativeLinear)

    def guess(self, batch: Batch, cache: KVCache, draws: Sequence[GuessedDraws]) -> list[list[int]]:
        """Compute a batch, and behind each of its spans guess tokens, one after another.

        ``draws`` tells how, span by span, and how many. Nearly what computing, drawing and
        computing again would give, in a fraction of the time.
        """
        head = self._weights.lm_head
        assert self._native is not None
        assert isinstance(head, NativeLinear)
        temperatures = torch.tensor([each.inverse_temperature for each in draws])
        keys = torch.tensor([each.keys for each in draws]).t().contiguous()
        tokens = torch.empty_like(keys)
        embedding, norm = self._weights.embedding, self._weights.norm
        guessing = Guessing(
            embedding=address(embedding),
            is_brain=int(embedding.dtype == torch.bfloat16),
            norm=address(norm),
            head=head.matrix,
            inverse_temperatures=address(temperatures),
            keys=address(keys),
            tokens=address(tokens),
            depth=len(keys),
        )
        plan = cast("NativePlan", batch.attention)
        self._native.guess(batch.token_ids, batch.positions, batch.slots, plan, cache, guessing)
        guesses: list[list[int]] = tokens.t().tolist()
        return guesses

    def _native_layers(self) -> NativeLayers | None:
        """All layers in one call, where all they need is there."""
        library = native_library(self.device, self.dtype)
        if library is None or not isinstance(self.attention, NativeAttention):
            return None
        layers = self._weights.layers
        if not NativeLayers.takes(layers):
            return None
        return NativeLayers(library, self.config, layers, self._rope)

    def _attend(
        self,
        heads: Tensor,
        layer: LayerWeights,
        cache: LayerCache,
        rotation: Rotation,
        batch: Batch,
    ) -> Tensor:
        heads = heads.view(len(heads), -1, self.config.head_dim)
        query = self._operations.rotate_and_store(
            heads, layer.qk_norm, rotation, batch.slots, cache
        )
        attended = self.attention.attend(query, cache, batch.attention)
        return layer.attention_output(attended, batch.tiles)


def _row_tiles(linears: list[Linear], numerics: Numerics, *, rows_max: int) -> RowTiles:
    """Tile sizes that all of these may be called with."""
    if numerics == "fast":
        return RowTiles(None)
    counts = [linear.exact_row_counts(rows_max=rows_max) for linear in linears]
    restricting = [each for each in counts if each is not None]
    return RowTiles(common_row_counts(restricting) if restricting else None)
