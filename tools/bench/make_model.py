"""Writes a model directory of Qwen2.5-0.5B's shape with random weights.

    python -m understudy.tools.bench.make_model /tmp/half-billion
    python -m understudy.tools.bench.make_model /tmp/two-layers --layers 2

A step takes as long with these weights as with trained ones, and nothing has to be downloaded. One
seed gives the same bytes. The tokenizer is the bundled model's, filled up to the vocabulary's width
with tokens that no text becomes and that each spell a word of their own, so that every server shows
every token. The row of the end token is zero: its logit is zero, and the largest of 151,936 others
is not, so that greedy answers never end early, even where a server cannot ignore the end token.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from understudy.tools.demo.paths import demo_model_directory

if TYPE_CHECKING:
    import torch

HIDDEN_SIZE: Final = 896
INTERMEDIATE_SIZE: Final = 4864
NUM_LAYERS: Final = 24
NUM_HEADS: Final = 14
NUM_KV_HEADS: Final = 2
VOCAB_SIZE: Final = 151_936
END_TOKEN_ID: Final = 0
INITIALIZER_RANGE: Final = 0.02
_LAYERS_MAX: Final = 256


class Shape(NamedTuple):
    """A tensor of the checkpoint, and what is in it."""

    name: str
    sizes: tuple[int, ...]
    is_norm: bool = False
    """All ones; everything else is random."""


def config_object(num_layers: int) -> dict[str, Any]:
    """``config.json``."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": INITIALIZER_RANGE,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": num_layers,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": END_TOKEN_ID,
        "pad_token_id": END_TOKEN_ID,
        "torch_dtype": "bfloat16",
    }


def tensor_shapes(num_layers: int) -> Iterator[Shape]:
    """Every tensor in the order in which its numbers are drawn, by transformers' names."""
    kv_size = HIDDEN_SIZE // NUM_HEADS * NUM_KV_HEADS
    yield Shape("model.embed_tokens.weight", (VOCAB_SIZE, HIDDEN_SIZE))
    for index in range(num_layers):
        prefix = f"model.layers.{index}"
        for name, size in (("q_proj", HIDDEN_SIZE), ("k_proj", kv_size), ("v_proj", kv_size)):
            yield Shape(f"{prefix}.self_attn.{name}.weight", (size, HIDDEN_SIZE))
            yield Shape(f"{prefix}.self_attn.{name}.bias", (size,))
        yield Shape(f"{prefix}.self_attn.o_proj.weight", (HIDDEN_SIZE, HIDDEN_SIZE))
        yield Shape(f"{prefix}.mlp.gate_proj.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE))
        yield Shape(f"{prefix}.mlp.up_proj.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE))
        yield Shape(f"{prefix}.mlp.down_proj.weight", (HIDDEN_SIZE, INTERMEDIATE_SIZE))
        yield Shape(f"{prefix}.input_layernorm.weight", (HIDDEN_SIZE,), is_norm=True)
        yield Shape(f"{prefix}.post_attention_layernorm.weight", (HIDDEN_SIZE,), is_norm=True)
    yield Shape("model.norm.weight", (HIDDEN_SIZE,), is_norm=True)


def num_parameters(num_layers: int) -> int:
    """How many numbers a model of so many layers has."""
    return sum(math.prod(shape.sizes) for shape in tensor_shapes(num_layers))


def widen_tokenizer(tokenizer: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer file whose vocabulary is filled up to a width.

    No merge makes the new tokens, so a text becomes the same tokens as before.
    """
    model = tokenizer["model"]
    vocab = dict(model["vocab"])
    assert sorted(vocab.values()) == list(range(len(vocab))), "ids without gaps"
    assert len(vocab) <= vocab_size, len(vocab)
    # The alphabet's mark for a space, and characters that stand for themselves.
    vocab |= {f"\u0120w{number}": number for number in range(len(vocab), vocab_size)}
    assert len(vocab) == vocab_size, "a new token has the spelling of an old one"
    return {**tokenizer, "model": {**model, "vocab": vocab}}


def write_model(directory: Path, *, num_layers: int = NUM_LAYERS, seed: int = 0) -> None:
    """Write a whole model directory; what is there already under these names is replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config_object(num_layers))
    ends = {"eos_token_id": END_TOKEN_ID, "pad_token_id": END_TOKEN_ID}
    _write_json(directory / "generation_config.json", {"do_sample": False, **ends})
    bundled = demo_model_directory()
    tokenizer = json.loads((bundled / "tokenizer.json").read_text(encoding="utf-8"))
    _write_json(directory / "tokenizer.json", widen_tokenizer(tokenizer, VOCAB_SIZE), indent=None)
    settings = json.loads((bundled / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write_json(directory / "tokenizer_config.json", {**settings, "model_max_length": 32_768})
    shutil.copyfile(bundled / "chat_template.jinja", directory / "chat_template.jinja")
    _write_weights(directory / "model.safetensors", num_layers, seed)


def _write_json(path: Path, value: dict[str, Any], *, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(path: Path, num_layers: int, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for shape in tensor_shapes(num_layers):
        if shape.is_norm:
            tensors[shape.name] = torch.ones(shape.sizes, dtype=torch.bfloat16)
            continue
        drawn = torch.randn(shape.sizes, generator=generator).mul_(INITIALIZER_RANGE)
        if shape.name == "model.embed_tokens.weight":
            drawn[END_TOKEN_ID] = 0.0
        tensors[shape.name] = drawn.to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> int:
    """Write a directory."""
    parser = argparse.ArgumentParser(prog="python -m understudy.tools.bench.make_model")
    parser.add_argument("directory", type=Path, help="is made if it is not there")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS, metavar="N", help="(24)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (0)")
    arguments = parser.parse_args()
    if not 1 <= arguments.layers <= _LAYERS_MAX:
        parser.error(f"--layers: expected 1 to {_LAYERS_MAX}, got {arguments.layers}")
    write_model(arguments.directory, num_layers=arguments.layers, seed=arguments.seed)
    print(f"{arguments.directory}: {num_parameters(arguments.layers):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
