"""Reads matrices that a checkpoint keeps quantised, in the packings of its tools.

Of a matrix ``[out, in]`` called ``m``, with groups of inputs; ``words`` are int32 that hold eight
4-bit numbers each, the first in the lowest bits:

=================  ========================================================================
int-quantized      ``m.weight`` int8, ``m.weight_scale`` ``[out, 1]``
float-quantized    ``m.weight`` float8, ``m.weight_scale`` ``[out, 1]`` or of the whole matrix
pack-quantized     ``m.weight_packed`` words ``[out, in/8]``, ``m.weight_scale`` ``[out, groups]``,
                   ``m.weight_zero_point`` words ``[out/8, groups]``; numbers are 8 higher
gptq               ``m.qweight`` words ``[in/8, out]``, ``m.scales`` ``[groups, out]``,
                   ``m.qzeros`` words ``[groups, out/8]``, each 1 lower than the zero point
awq                ``m.qweight`` words ``[in, out/8]``, ``m.scales`` ``[groups, out]``,
                   ``m.qzeros`` words ``[groups, out/8]``; in words the outputs come in the order
                   0, 2, 4, 6, 1, 3, 5, 7
=================  ========================================================================

Knows nothing of layers, and multiplies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from understudy.runtime.model.checkpoint import Checkpoint
from understudy.runtime.model.quantization import (
    GROUP_SIZES,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    check_finite,
    dequantize_int4,
)
from understudy.runtime.model.quantization_config import CheckpointQuantization

FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
"""What scales, biases, norms and matrices that are not quantised are stored in."""

_PER_WORD: Final = 8
_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of its eight outputs is: the inverse of the order above."""
_MIDDLE: Final = 8

Shape = tuple[int, ...]
Weight = Int8Weight | Fp8Weight | Int4Weight | Tensor
"""A matrix as it is to be multiplied; a tensor is in floating point."""


class StoredPart(NamedTuple):
    """A tensor that a checkpoint must or may have."""

    name: str
    shapes: tuple[Shape, ...]
    """One of these."""
    dtypes: tuple[torch.dtype, ...]
    """One of these."""
    is_required: bool = True


def stored_parts(scheme: CheckpointQuantization, module: str, shape: Shape) -> Iterator[StoredPart]:
    """The tensors that a quantised matrix ``[out, in]`` consists of.

    Raises:
        ValueError: the matrix has no size that the scheme can pack.
    """
    out_features, in_features = shape
    words, ints = (torch.int32,), (torch.int32, torch.int64)
    if scheme.format in {"int-quantized", "float-quantized"}:
        is_int = scheme.format == "int-quantized"
        dtype = torch.int8 if is_int else torch.float8_e4m3fn
        scale_shapes: tuple[Shape, ...] = (
            ((1,), ()) if scheme.is_per_tensor else ((out_features, 1),)
        )
        yield StoredPart(f"{module}.weight", (shape,), (dtype,))
        yield StoredPart(f"{module}.weight_scale", scale_shapes, FLOATS)
        if not is_int:
            yield StoredPart(f"{module}.input_scale", ((1,), ()), FLOATS, is_required=False)
        return
    size = scheme.group_size or in_features
    if in_features % size or in_features % _PER_WORD or out_features % _PER_WORD:
        raise ValueError(
            f"[{out_features}, {in_features}] does not fit groups of {size} in words of {_PER_WORD}"
        )
    groups, packed_out = in_features // size, out_features // _PER_WORD
    if scheme.format == "pack-quantized":
        packed = (out_features, in_features // _PER_WORD)
        yield StoredPart(f"{module}.weight_packed", (packed,), words)
        yield StoredPart(f"{module}.weight_scale", ((out_features, groups),), FLOATS)
        yield StoredPart(f"{module}.weight_shape", ((2,),), ints, is_required=False)
        if not scheme.is_symmetric:
            yield StoredPart(f"{module}.weight_zero_point", ((packed_out, groups),), words)
        return
    is_gptq = scheme.format == "gptq"
    packed = (in_features // _PER_WORD, out_features) if is_gptq else (in_features, packed_out)
    yield StoredPart(f"{module}.qweight", (packed,), words)
    yield StoredPart(f"{module}.qzeros", ((groups, packed_out),), words)
    yield StoredPart(f"{module}.scales", ((groups, out_features),), FLOATS)
    if is_gptq:
        yield StoredPart(f"{module}.g_idx", ((in_features,),), words, is_required=False)


def read_matrix(
    checkpoint: Checkpoint,
    scheme: CheckpointQuantization,
    module: str,
    shape: Shape,
    *,
    keeps_fp8: bool = False,
) -> Weight:
    """Read a matrix whose parts are known to be there, in their shapes.

    4-bit weights whose groups the kernel does not take become floating point, and so does fp8,
    unless that is to be kept.

    Raises:
        ValueError: scales are not finite, or the inputs are in another order.
    """
    match scheme.format:
        case "int-quantized":
            scales = _scales(checkpoint, f"{module}.weight_scale")
            return Int8Weight(checkpoint.stored(f"{module}.weight"), scales.flatten())
        case "float-quantized":
            weight = checkpoint.stored(f"{module}.weight").to(torch.float32)
            scales = _scales(checkpoint, f"{module}.weight_scale")
            if keeps_fp8:
                check_finite(weight)
                values = checkpoint.stored(f"{module}.weight")
                return Fp8Weight(values, scales.flatten().expand(len(values)))
            weight *= scales
            check_finite(weight)
            return weight
        case "pack-quantized":
            return _for_kernel(_read_packed(checkpoint, scheme, module, shape))
        case "gptq":
            return _for_kernel(_read_gptq(checkpoint, scheme, module, shape))
        case "awq":
            return _for_kernel(_read_awq(checkpoint, module))


def join(weights: list[Weight]) -> Weight:
    """Several matrices of one scheme as one, outputs after outputs."""
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    if isinstance(first, Tensor):
        return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
    columns = zip(*(weight for weight in weights if not isinstance(weight, Tensor)), strict=True)
    return type(first)(*(torch.cat(column) for column in columns))


def _scales(checkpoint: Checkpoint, name: str) -> Tensor:
    scales = checkpoint.stored(name).to(torch.float32)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{name} has numbers that are not finite")
    return scales


def _numbers(words: Tensor) -> Tensor:
    """The 4-bit numbers of each word, in a dimension of their own at the end."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8)


def _read_packed(
    checkpoint: Checkpoint, scheme: CheckpointQuantization, module: str, shape: Shape
) -> Int4Weight:
    name = f"{module}.weight_shape"
    if name in checkpoint.tensors and tuple(checkpoint.stored(name).tolist()) != shape:
        raise ValueError(f"{name} is not {list(shape)}, as config.json asks for")
    codes = _numbers(checkpoint.stored(f"{module}.weight_packed")).flatten(1)
    scales = _scales(checkpoint, f"{module}.weight_scale")
    if scheme.is_symmetric:
        return Int4Weight(codes, scales, scales * -_MIDDLE)
    zeros = _numbers(checkpoint.stored(f"{module}.weight_zero_point")).transpose(1, 2).flatten(0, 1)
    return Int4Weight(codes, scales, -scales * zeros)


def _read_gptq(
    checkpoint: Checkpoint, scheme: CheckpointQuantization, module: str, shape: Shape
) -> Int4Weight:
    in_features = shape[1]
    name = f"{module}.g_idx"
    if name in checkpoint.tensors:
        order = torch.arange(in_features) // (scheme.group_size or in_features)
        if not torch.equal(checkpoint.stored(name).to(torch.int64), order):
            raise ValueError(f"{name} reorders the inputs (desc_act), which is not supported")
    codes = _numbers(checkpoint.stored(f"{module}.qweight")).transpose(1, 2).flatten(0, 1)
    zeros = _numbers(checkpoint.stored(f"{module}.qzeros")).flatten(1).to(torch.float32) + 1
    scales = _scales(checkpoint, f"{module}.scales")
    return _transposed(codes, scales, zeros)


def _read_awq(checkpoint: Checkpoint, module: str) -> Int4Weight:
    codes = _numbers(checkpoint.stored(f"{module}.qweight"))[..., _AWQ_PLACES].flatten(1)
    zeros = _numbers(checkpoint.stored(f"{module}.qzeros"))[..., _AWQ_PLACES].flatten(1)
    return _transposed(codes, _scales(checkpoint, f"{module}.scales"), zeros)


def _transposed(codes: Tensor, scales: Tensor, zeros: Tensor) -> Int4Weight:
    """From inputs first to outputs first."""
    return Int4Weight(
        codes.t().contiguous(), scales.t().contiguous(), (-scales * zeros).t().contiguous()
    )


def _for_kernel(weight: Int4Weight) -> Int4Weight | Tensor:
    """Cut groups to a size that the kernel takes, or dequantise."""
    whole = weight.group_size
    size = next((size for size in GROUP_SIZES if whole % size == 0), None)
    if size is None:
        return dequantize_int4(weight)
    return Int4Weight(
        weight.codes,
        weight.scales.repeat_interleave(whole // size, dim=1),
        weight.offsets.repeat_interleave(whole // size, dim=1),
    )
