"""Checkpoints whose matrices are quantised, packed as the formats' own tools pack them.

Packing is spelled out number by number, so that the reader is held to the formats and not to
itself. Numbers are drawn first, and matrices made from them: the dequantised twin is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tests.checkpoints import LLAMA, random_tensors, write_checkpoint

SHAPE: Final[dict[str, Any]] = {
    **LLAMA,
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
}
AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


class Grouped(NamedTuple):
    """``(codes - zeros) * scales``."""

    codes: Tensor
    """int64 from 0 to 15, ``[out, in]``."""
    scales: Tensor
    """float16, ``[out, groups]``."""
    zeros: Tensor
    """int64, ``[out, groups]``."""

    @property
    def dequantized(self) -> Tensor:
        size = self.codes.shape[1] // self.scales.shape[1]
        scales = self.scales.float().repeat_interleave(size, dim=1)
        return (self.codes - self.zeros.repeat_interleave(size, dim=1)) * scales


class Pair(NamedTuple):
    """A quantised checkpoint, and the same in floating point."""

    quantized: Path
    dequantized: Path


def words(numbers: Tensor, *, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack eight numbers of a dimension into each int32; place ``i`` holds number ``order[i]``."""
    moved = numbers.movedim(dim, -1)
    packed = torch.zeros(*moved.shape[:-1], moved.shape[-1] // 8, dtype=torch.int64)
    for place, number in enumerate(order):
        packed |= moved[..., number::8] << (4 * place)
    packed -= (packed >= 1 << 31) * (1 << 32)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


def random_grouped(
    shape: tuple[int, int], group_size: int, *, zeros: tuple[int, int], seed: int
) -> Grouped:
    """A matrix whose zero points lie in a range, the end included."""
    generator = torch.Generator().manual_seed(seed)
    out, groups = shape[0], shape[1] // group_size
    return Grouped(
        torch.randint(16, shape, generator=generator),
        (0.01 + 0.02 * torch.rand(out, groups, generator=generator)).half(),
        torch.randint(zeros[0], zeros[1] + 1, (out, groups), generator=generator),
    )


def gptq_parts(module: str, matrix: Grouped) -> dict[str, Tensor]:
    size = matrix.codes.shape[1] // matrix.scales.shape[1]
    return {
        f"{module}.qweight": words(matrix.codes.t(), dim=0),
        f"{module}.qzeros": words(matrix.zeros.t() - 1, dim=1),
        f"{module}.scales": matrix.scales.t().contiguous(),
        f"{module}.g_idx": (torch.arange(matrix.codes.shape[1]) // size).to(torch.int32),
        f"{module}.bias": torch.zeros(len(matrix.codes), dtype=torch.float16),
    }


def awq_parts(module: str, matrix: Grouped) -> dict[str, Tensor]:
    return {
        f"{module}.qweight": words(matrix.codes.t(), dim=1, order=AWQ_ORDER),
        f"{module}.qzeros": words(matrix.zeros.t(), dim=1, order=AWQ_ORDER),
        f"{module}.scales": matrix.scales.t().contiguous(),
    }


def packed_parts(module: str, matrix: Grouped) -> dict[str, Tensor]:
    """Compressed-tensors' ``pack-quantized``: signed numbers, stored 8 higher."""
    parts = {
        f"{module}.weight_packed": words(matrix.codes, dim=1),
        f"{module}.weight_scale": matrix.scales,
        f"{module}.weight_shape": torch.tensor(matrix.codes.shape),
    }
    if bool((matrix.zeros != 8).any()):
        parts[f"{module}.weight_zero_point"] = words(matrix.zeros, dim=0)
    return parts


def compressed_tensors(
    name: str, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"dynamic": False, "symmetric": True, "actorder": None, **weights},
                "input_activations": activations,
                "output_activations": None,
            }
        },
    }


INT8: Final = compressed_tensors(
    "int-quantized",
    {"num_bits": 8, "type": "int", "strategy": "channel"},
    {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True},
)


def configured(kind: str, group_size: int) -> dict[str, Any]:
    """The ``quantization_config`` of one kind of checkpoint."""
    match kind:
        case "gptq":
            return {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False}
        case "awq":
            return {
                "quant_method": "awq",
                "bits": 4,
                "group_size": group_size,
                "zero_point": True,
                "version": "gemm",
            }
        case "int8":
            return INT8
        case "fp8-channel" | "fp8-tensor":
            strategy = kind.removeprefix("fp8-")
            return compressed_tensors(
                "float-quantized",
                {"num_bits": 8, "type": "float", "strategy": strategy},
                {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            )
        case _:
            weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}
            is_symmetric = kind != "packed-asymmetric"
            return compressed_tensors("pack-quantized", {**weights, "symmetric": is_symmetric})


def _parts(
    kind: str, module: str, shape: tuple[int, int], group_size: int, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The stored parts of one random matrix, and what they stand for."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "int8":
        values = torch.randint(-127, 128, shape, generator=generator)
        scales = (0.001 + 0.001 * torch.rand(shape[0], 1, generator=generator)).bfloat16()
        parts = {f"{module}.weight": values.to(torch.int8), f"{module}.weight_scale": scales}
        return parts, values * scales.float()
    if kind.startswith("fp8"):
        stored = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        count = (shape[0], 1) if kind == "fp8-channel" else (1,)
        scales = 0.1 + 0.05 * torch.rand(count, generator=generator)
        parts = {f"{module}.weight": stored, f"{module}.weight_scale": scales}
        return parts, stored.float() * scales
    pack, zeros = {
        "gptq": (gptq_parts, (1, 16)),
        "awq": (awq_parts, (0, 15)),
        "packed": (packed_parts, (8, 8)),
        "packed-asymmetric": (packed_parts, (0, 15)),
    }[kind]
    matrix = random_grouped(shape, group_size, zeros=zeros, seed=seed)
    return pack(module, matrix), matrix.dequantized


def write_pair(
    directory: Path, kind: str, *, group_size: int = 32, shape: dict[str, Any] | None = None
) -> Pair:
    """Write a quantised checkpoint and its dequantised twin; the output embedding is neither's."""
    shape = SHAPE if shape is None else shape
    plain = random_tensors(shape)
    quantized: dict[str, Tensor] = {}
    for seed, (name, tensor) in enumerate(plain.items()):
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            quantized[name] = tensor
            continue
        rows, columns = tensor.shape
        parts, plain[name] = _parts(kind, module, (rows, columns), group_size, seed)
        quantized |= parts
    # Where a linear has a bias, it takes the place of the zeros that tools write otherwise.
    quantized |= {name: tensor for name, tensor in plain.items() if name.endswith(".bias")}
    config = {**shape, "quantization_config": configured(kind, group_size)}
    return Pair(
        write_checkpoint(directory / "quantized", config, tensors=quantized),
        write_checkpoint(directory / "dequantized", shape, tensors=plain),
    )
