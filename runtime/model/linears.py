"""Which linear a weight becomes: the quickest that its form, dtype and device have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from understudy.runtime.model.layers import DenseLinear, Linear
from understudy.runtime.model.native.library import native_library
from understudy.runtime.model.native.linear import (
    NativeLinear,
    Packed,
    pack,
    quantize_int8_natively,
)
from understudy.runtime.model.operations import has_kernels
from understudy.runtime.model.quantization import (
    Fp8Weight,
    Int4Linear,
    Int4Weight,
    Int8Linear,
    Int8Weight,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from understudy.runtime.model.quantization_config import Quantization
from understudy.runtime.model.quantized_checkpoint import Weight


def make_linear(
    weight: Weight,
    bias: Tensor | None,
    *,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    keep: Callable[[Packed], None] | None = None,
) -> Linear:
    """A linear for rows of ``dtype``; ``quantization`` is of a weight in floating point.

    ``keep`` is given what was packed, if it was.

    Raises:
        ValueError: the weight cannot be quantised.
    """
    if has_kernels(device):
        return _for_kernels(weight, bias, quantization=quantization, dtype=dtype, device=device)
    library = native_library(device, dtype)
    if isinstance(weight, Tensor) and quantization == "int8":
        if library is None:
            weight = quantize_int8(weight)
        else:
            weight = quantize_int8_natively(library, weight)
    elif isinstance(weight, Tensor) and quantization == "int4":
        weight = quantize_int4(weight)
    assert not isinstance(weight, Fp8Weight), "a CPU's fp8 is widened when it is read"
    if isinstance(weight, Int4Weight):
        return Int4Linear(weight, bias, dtype=dtype)
    if library is not None:
        packed = pack(library, weight)
        if keep is not None:
            keep(packed)
        return NativeLinear(library, packed, bias)
    if isinstance(weight, Int8Weight):
        return Int8Linear(weight, bias, dtype=dtype)
    return DenseLinear(weight.to(device, dtype), bias)


def _for_kernels(
    weight: Weight,
    bias: Tensor | None,
    *,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> Linear:
    """A linear on a GPU; weights of 4 bits never come here."""
    from understudy.runtime.model.kernels.linears import TritonQuantisedLinear

    assert not isinstance(weight, Int4Weight)
    if isinstance(weight, Tensor) and quantization == "int8":
        weight = quantize_int8(weight)
    elif isinstance(weight, Tensor) and quantization == "fp8":
        weight = quantize_fp8(weight)
    if isinstance(weight, Tensor):
        return DenseLinear(weight.to(device, dtype), bias)
    return TritonQuantisedLinear(weight, bias, dtype=dtype, device=device)


def kept_dtype(stored: torch.dtype, *, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In what dtype a weight is kept that the checkpoint stores in ``stored``.

    Narrower than ``dtype`` where the kernels widen it on the way, which changes no bit.
    """
    is_widened = native_library(device, dtype) is not None
    return stored if is_widened and stored == torch.bfloat16 else dtype
