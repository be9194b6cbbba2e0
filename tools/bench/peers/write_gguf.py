"""Writes a GGUF file of a Qwen2 model directory: ``python write_gguf.py MODEL TARGET TYPE``.

Runs in llama.cpp's environment, where the ``gguf`` package has to be; uses nothing of Understudy.
llama.cpp's own converter knows tokenizers by a digest and refuses all others, ours with them. TYPE
is ``bf16`` or ``q8_0``, and is the type of all matrices; biases and norms are in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor, from transformers'."""
    if name in NAMES:
        return NAMES[name]
    _, _, index, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{index}.{NAMES[module]}.{kind}"


def bfloat16_tensors(path: Path) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Name, shape and bits (uint16) of each tensor of a safetensors file."""
    import numpy as np

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        place = 8 + size + begin
        shape = tuple(entry["shape"])
        count = (end - begin) // 2
        yield name, shape, np.fromfile(path, np.uint16, count, offset=place).reshape(shape)


def float32_of(bits: Any) -> Any:
    """The numbers whose upper halves these bits are."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)


def add_tokenizer(writer: Any, model: Path, vocab_size: int) -> None:
    """Byte-level BPE with Qwen2's pattern; only control tokens are marked."""
    import gguf  # type: ignore[import-not-found]

    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    spellings = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    control = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    spellings |= control
    types = [gguf.TokenType.NORMAL] * vocab_size
    for number in control:
        types[number] = gguf.TokenType.CONTROL
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([spellings.get(n, f"[PAD{n}]") for n in range(vocab_size)])
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(value=False)


def main() -> None:
    """Convert."""
    import gguf

    model, target, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_eos_token_id(config["eos_token_id"])
    add_tokenizer(writer, model, config["vocab_size"])
    quantized = gguf.GGMLQuantizationType[kind.upper()]
    for path in sorted(model.glob("*.safetensors")):
        for name, shape, bits in bfloat16_tensors(path):
            if len(shape) == 1:
                writer.add_tensor(gguf_name(name), float32_of(bits))
            elif quantized is gguf.GGMLQuantizationType.BF16:
                writer.add_tensor(gguf_name(name), bits.view("uint8"), raw_dtype=quantized)
            else:
                packed = gguf.quants.quantize(float32_of(bits), quantized)
                writer.add_tensor(gguf_name(name), packed, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
