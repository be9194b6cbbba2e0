"""Networks as Hugging Face model directories: written after training, read to go on from there.

The directories load in `transformers` and in Understudy's own loader; neither is needed here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from understudy.tools.demo.network import Network, NetworkShape
from understudy.tools.demo.vocabulary import END_OF_TEXT_ID, write_tokenizer

SAMPLING_DEFAULTS = {"temperature": 0.7, "top_p": 0.95}


def write_checkpoint(network: Network, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a complete model directory, with weights in bfloat16."""
    shape = network.shape
    write_tokenizer(tokenizer, directory, context_length=shape.context_length)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context_length,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END_OF_TEXT_ID,
        "torch_dtype": "bfloat16",
    }
    generation: dict[str, object] = {
        "do_sample": True,
        **SAMPLING_DEFAULTS,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation)
    weights = {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in network.state_dict().items()
    }
    weights_file = directory / "model.safetensors"
    save_file(weights, weights_file, metadata={"format": "pt"})
    weights_file.chmod(0o644)  # safetensors makes it readable for its owner alone


def read_checkpoint(directory: Path) -> Network:
    """The network that `write_checkpoint` wrote into `directory`, in float32."""
    config = json.loads((directory / "config.json").read_text())
    shape = NetworkShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        context_length=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
    )
    network = Network(shape, generator=torch.Generator().manual_seed(0))
    weights = load_file(directory / "model.safetensors")
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return network


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
