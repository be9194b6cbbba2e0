"""Linear layers on the CPU's own kernels.

Rows are float32. A sum is always made in the same order, whatever the number of rows, so any number
of rows gives the same bits, and nothing has to be cut into tiles.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.runtime.model.native.library import Library
from understudy.runtime.model.native.structures import BRAIN, INTEGER, WIDE, Matrix, address
from understudy.runtime.model.quantization import LEVELS_INT8, Int8Weight, check_finite

_PANEL = 32
"""Outputs that the kernels keep side by side."""
_INT8_INPUTS_MAX = (2**31 - 1) // (127 * 128)
"""The sum of more products may not fit 32 bits."""


class NativeLinear:
    """``x @ weight.T + bias`` in float32.

    A weight of bfloat16 stays so, and is widened on the way: that changes no bit, and half as many
    bytes are read, which is what a few rows' time is. One of 8-bit integers has rows of 8-bit
    integers, as ``Int8Linear``, whose bits it gives: quantised, multiplied and scaled in one call.
    """

    def __init__(self, library: Library, packed: Packed, bias: Tensor | None) -> None:
        """``bias`` is ``[out]``."""
        self._out_features = packed.outputs
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._tensors = (packed, bias)
        self.matrix = Matrix(
            panels=address(packed.panels),
            start=address(packed.start),
            scales=address(packed.scales),
            bias=address(bias),
            inputs=packed.inputs,
            outputs=packed.outputs,
            kind=packed.kind,
        )
        self._reference = ctypes.byref(self.matrix)
        self._multiply = library.functions.product

    def __call__(self, x: Tensor, tiles: tuple[int, ...]) -> Tensor:  # noqa: ARG002 - one tile
        """Multiply ``[rows, in]`` to ``[rows, out]``."""
        num_rows = x.shape[0]
        result = torch.empty(num_rows, self._out_features)
        self._multiply(x.data_ptr(), x.stride(0), self._reference, result.data_ptr(), num_rows)
        return result

    def exact_row_counts(self, *, rows_max: int) -> None:
        """Any number of rows: each one's sums are made in the same order."""


class Packed(NamedTuple):
    """A weight as the kernels read it."""

    outputs: int
    inputs: int
    panels: Tensor
    """``[panels, inputs, 32]``; inputs of 8 bits are filled up to a multiple of 4."""
    start: Tensor | None = None
    """Of integers, what the sum of each output starts with, ``[panels · 32]``, int32."""
    scales: Tensor | None = None
    """Of integers, what the sum of each output is multiplied with, ``[outputs]``."""

    @property
    def kind(self) -> int:
        """Which kernel it is for."""
        return {torch.int8: INTEGER, torch.bfloat16: BRAIN, torch.float32: WIDE}[self.panels.dtype]

    @property
    def is_sound(self) -> bool:
        """Whether the tensors are as large as the kernels take them to be."""
        num_panels = -(-self.outputs // _PANEL)
        is_integer = self.kind == INTEGER
        width = -(-self.inputs // 4) * 4 if is_integer else self.inputs
        shapes = [
            None if tensor is None else tuple(tensor.shape) for tensor in (self.start, self.scales)
        ]
        wanted = [(num_panels * _PANEL,), (self.outputs,)] if is_integer else [None, None]
        return tuple(self.panels.shape) == (num_panels, width, _PANEL) and shapes == wanted


def pack(library: Library, weight: Tensor | Int8Weight) -> Packed:
    """Lay out a weight ``[out, in]``: of float32, bfloat16, or quantised."""
    if isinstance(weight, Int8Weight):
        return _pack_int8(library, weight)
    outputs, inputs = weight.shape
    panels = on_large_pages(library, (-(-outputs // _PANEL), inputs, _PANEL), weight.dtype)
    is_brain = weight.dtype == torch.bfloat16
    function = library.functions.pack_brain if is_brain else library.functions.pack_float
    weight = weight.contiguous()
    function(address(weight), address(panels), inputs, outputs)
    return Packed(outputs, inputs, panels)


def _pack_int8(library: Library, weight: Int8Weight) -> Packed:
    outputs, inputs = weight.values.shape
    if inputs > _INT8_INPUTS_MAX:
        raise ValueError(f"{inputs} inputs are too many for sums of int8 products")
    width = -(-inputs // 4) * 4
    panels = on_large_pages(library, (-(-outputs // _PANEL), width, _PANEL), torch.int8)
    start = torch.empty(len(panels) * _PANEL, dtype=torch.int32)
    values = weight.values.contiguous()
    library.functions.pack_int8(address(values), address(panels), address(start), inputs, outputs)
    # A row's scale is a 127th of its largest magnitude; the 127th is taken once, here.
    return Packed(outputs, inputs, panels, start, (weight.scales / LEVELS_INT8).contiguous())


def quantize_int8_natively(library: Library, weight: Tensor) -> Int8Weight:
    """As ``quantize_int8``, in one pass of the kernels over a weight of float32 or bfloat16.

    Raises:
        ValueError: the weight has a number that is not finite.
    """
    weight = weight.contiguous()
    out_features, in_features = weight.shape
    values, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(out_features)
    library.functions.quantize_int8(
        *(address(weight), int(weight.dtype == torch.bfloat16)),
        *(address(values), address(scales), in_features, out_features),
    )
    check_finite(scales)
    return Int8Weight(values, scales)


def on_large_pages(library: Library, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that is read faster than any other, with anything in it."""
    tensor = torch.empty(shape, dtype=dtype)
    library.functions.use_large_pages(address(tensor), tensor.nbytes)
    return tensor
