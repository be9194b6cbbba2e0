"""A Llama decoder written for training: whole windows at once, no KV cache.

It knows nothing of files, text or optimisation. Serving uses the transformer in `runtime/model`;
this one exists so that training needs torch alone. Parameter names and arithmetic follow the
Hugging Face `LlamaForCausalLM`, so an exported state dictionary loads there unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkShape:
    """The sizes of one network, under the names of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5


class Rotation(nn.Module):
    """Rotary position embedding (Su et al., 2021) in the half-split layout that Llama uses."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        frequencies = shape.rope_theta**-exponents
        angles = torch.outer(torch.arange(shape.context_length, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, heads: Tensor) -> Tensor:
        """Rotate `heads` [batch, head, position, head_dim], whose first position is 0."""
        length = heads.shape[-2]
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return heads * self.cosine[:length] + turned * self.sine[:length]


class Attention(nn.Module):
    """Causal grouped-query attention without biases."""

    def __init__(self, shape: NetworkShape, rotation: Rotation) -> None:
        super().__init__()
        query_size = shape.num_heads * shape.head_dim
        key_size = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)
        self.head_dim = shape.head_dim
        self.group_size = shape.num_heads // shape.num_kv_heads
        # One table serves all layers; in a tuple, so that it is not a sub-module of each of them.
        self.rotation = (rotation,)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` [batch, position, hidden_size] to the same shape."""
        batch, length, _ = hidden.shape
        rotate = self.rotation[0]

        def split(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, self.head_dim).transpose(1, 2)

        query = rotate(split(self.q_proj(hidden)))
        key = rotate(split(self.k_proj(hidden))).repeat_interleave(self.group_size, dim=1)
        value = split(self.v_proj(hidden)).repeat_interleave(self.group_size, dim=1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class FeedForward(nn.Module):
    """The gated feed-forward block (SwiGLU; Shazeer, 2020)."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` [batch, position, hidden_size] to the same shape."""
        gated = functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        output: Tensor = self.down_proj(gated)
        return output


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, shape: NetworkShape, rotation: Rotation) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape, rotation)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` [batch, position, hidden_size] to the same shape."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Decoder(nn.Module):
    """Embedding, layers and final norm: the part that checkpoints call `model`."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        rotation = Rotation(shape)
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape, rotation) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.rotation = rotation

    def forward(self, tokens: Tensor) -> Tensor:
        """Final hidden states [batch, position, hidden_size] of `tokens` [batch, position]."""
        hidden: Tensor = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        output: Tensor = self.norm(hidden)
        return output


class Network(nn.Module):
    """A causal language model whose output projection is its embedding (tied)."""

    def __init__(self, shape: NetworkShape, *, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator) -> None:
        """Normal weights; the projections into the residual stream start at nothing."""
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                deviation = 0.02 if "embed_tokens" in name else weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=deviation, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, position, vocab_size] of `tokens` [batch, position] int64."""
        return functional.linear(self.model(tokens), self.model.embed_tokens.weight)

    def num_parameters(self) -> int:
        """How many numbers a checkpoint of this network holds."""
        return sum(weight.numel() for weight in self.parameters())
