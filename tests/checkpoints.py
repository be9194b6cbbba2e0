"""Random checkpoints, small enough to be written by each test session that wants one.

Names and shapes are spelled out here a second time, so that the loader is held to the format and
not to itself. Weights are large enough that logits are decisive: no test hangs on a near-tie.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

LLAMA: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
# Widths that no vector register divides.
QWEN2: Final[dict[str, Any]] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
QWEN3: Final[dict[str, Any]] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
# Heads and layers as wide as the bundled model's.
WIDE: Final[dict[str, Any]] = {
    **LLAMA,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "head_dim": 64,
}
FAMILIES: Final = {"llama": LLAMA, "wide": WIDE, "qwen2": QWEN2, "qwen3": QWEN3}


def random_tensors(config: dict[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by the names that transformers gives them."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1.6 / math.sqrt(config["hidden_size"])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    sizes = {
        "q_proj": config["num_attention_heads"] * head_dim,
        "k_proj": config["num_key_value_heads"] * head_dim,
        "v_proj": config["num_key_value_heads"] * head_dim,
    }
    architecture = config["architectures"][0]
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        for name, size in sizes.items():
            tensors[f"{prefix}.self_attn.{name}.weight"] = random(size, hidden)
            if architecture == "Qwen2ForCausalLM":
                tensors[f"{prefix}.self_attn.{name}.bias"] = random(size)
        if architecture == "Qwen3ForCausalLM":
            tensors[f"{prefix}.self_attn.q_norm.weight"] = 1 + random(head_dim)
            tensors[f"{prefix}.self_attn.k_norm.weight"] = 1 + random(head_dim)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = random(hidden, sizes["q_proj"])
        tensors[f"{prefix}.mlp.gate_proj.weight"] = random(inner, hidden)
        tensors[f"{prefix}.mlp.up_proj.weight"] = random(inner, hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = random(hidden, inner)
        tensors[f"{prefix}.input_layernorm.weight"] = 1 + random(hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = 1 + random(hidden)
    tensors["model.norm.weight"] = 1 + random(hidden)
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = random(config["vocab_size"], hidden)
    return tensors


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    *,
    tensors: dict[str, Tensor] | None = None,
    num_shards: int = 1,
) -> Path:
    """Write config.json and weights, in one file or in shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config) if tensors is None else tensors
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for index in range(num_shards):
        shard = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        chosen = names[index::num_shards]
        save_file({name: tensors[name] for name in chosen}, directory / shard)
        weight_map.update(dict.fromkeys(chosen, shard))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
