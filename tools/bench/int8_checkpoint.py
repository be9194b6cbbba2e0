"""Writes a model directory anew with its linear layers' weights as 8-bit integers.

    python -m understudy.tools.bench.int8_checkpoint MODEL TARGET

One scale for each output, activations quantised on the fly (compressed-tensors, ``int-quantized``):
so other servers are told to compute W8A8 from the same weights. Embeddings stay as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

_LARGEST: Final = 127
_SCALE_MIN: Final = 2.0**-100
_COPIED: Final = ("*.json", "*.jinja")


def quantization_object() -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``."""
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def write_int8(source: Path, target: Path) -> None:
    """Quantise a directory; shards become one file."""
    import torch
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True, exist_ok=True)
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.name != "model.safetensors.index.json":
                shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_object()
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            weight = tensor.float()
            scales = weight.abs().amax(dim=1, keepdim=True).div_(_LARGEST).clamp_(min=_SCALE_MIN)
            scales = scales.to(torch.bfloat16)
            levels = (weight / scales.float()).round_().clamp_(-_LARGEST, _LARGEST)
            tensors[name] = levels.to(torch.int8)
            tensors[f"{name}_scale"] = scales
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def main() -> int:
    """Write a directory."""
    parser = argparse.ArgumentParser(prog="python -m understudy.tools.bench.int8_checkpoint")
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    write_int8(arguments.model, arguments.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
