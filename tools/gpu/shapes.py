"""The shapes of well-known models, and models of these shapes with random weights.

Weights are drawn on the device, from a seed: nothing is downloaded, and billions of numbers take
seconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from understudy.runtime.model.config import ModelConfig, SamplingDefaults
from understudy.runtime.model.layers import Linear
from understudy.runtime.model.linears import make_linear
from understudy.runtime.model.numerics import Numerics
from understudy.runtime.model.quantization_config import Quantization
from understudy.runtime.model.transformer import LayerWeights, ModelWeights, Transformer

LLAMA_3_8B: Final = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    attention_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    max_position_embeddings=16384,
    eos_token_ids=(),
    bos_token_id=None,
    sampling=SamplingDefaults(),
    dtype="bfloat16",
)
QWEN_2_5_7B: Final = replace(
    LLAMA_3_8B,
    architecture="Qwen2ForCausalLM",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    attention_bias=True,
)
QWEN_2_5_05B: Final = replace(
    QWEN_2_5_7B,
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)
QWEN_3_06B: Final = replace(
    LLAMA_3_8B,
    architecture="Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    tie_word_embeddings=True,
    qk_norm=True,
)
SHAPES: Final = {
    "Llama-3-8B": LLAMA_3_8B,
    "Qwen2.5-7B": QWEN_2_5_7B,
    "Qwen2.5-0.5B": QWEN_2_5_05B,
    "Qwen3-0.6B": QWEN_3_06B,
}

_WEIGHT_SCALE: Final = 0.02


def random_model(
    config: ModelConfig,
    device: torch.device,
    *,
    quantization: Quantization = "none",
    kv_dtype: torch.dtype | None = None,
    numerics: Numerics = "fast",
) -> Transformer:
    """A model of this shape as it would be loaded, from weights in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return tensor.normal_(0.0, _WEIGHT_SCALE, generator=generator)

    def made(weight: Tensor, bias: Tensor | None, kind: Quantization) -> Linear:
        dtype = torch.bfloat16
        return make_linear(weight, bias, quantization=kind, dtype=dtype, device=device)

    def linear(rows: int, columns: int, *, has_bias: bool = False) -> Linear:
        return made(random(rows, columns), random(rows) if has_bias else None, quantization)

    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    num_normed = config.num_heads + config.num_kv_heads
    layers = tuple(
        LayerWeights(
            attention_norm=1 + random(hidden),
            qkv=linear(queries + 2 * keys, hidden, has_bias=config.attention_bias),
            qk_norm=1 + random(num_normed, config.head_dim) if config.qk_norm else None,
            attention_output=linear(hidden, queries),
            mlp_norm=1 + random(hidden),
            gate_up=linear(2 * inner, hidden),
            down=linear(hidden, inner),
        )
        for _ in range(config.num_layers)
    )
    embedding = random(config.vocab_size, hidden)
    head = embedding if config.tie_word_embeddings else random(config.vocab_size, hidden)
    # As the loader has it: the output embedding is never coarser than int8.
    lm_head = made(head, None, "none" if quantization == "none" else "int8")
    weights = ModelWeights(embedding, layers, 1 + random(hidden), lm_head)
    return Transformer(config, weights, numerics=numerics, kv_dtype=kv_dtype)
