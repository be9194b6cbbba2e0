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


class NativeLinear:
    """``x @ weight.T + bias`` in float32.

    A weight of bfloat16 stays so, and is widened on the way: that changes no bit, and half as many
    bytes are read, which is what a few rows' time is. One of 8-bit integers has rows of 8-bit
    integers, as ``Int8Linear``, whose bits it gives: quantised, multiplied and scaled in one call.
    """

    def __init__(self, library: Library, weight: Tensor | Int8Weight, bias: Tensor | None) -> None:
        """Take ``weight`` ``[out, in]``, a tensor of float32 or bfloat16, ``bias`` ``[out]``."""
        if isinstance(weight, Int8Weight):
            packed, shape = _pack_int8(library, weight), weight.values.shape
        else:
            packed, shape = _pack(library, weight), weight.shape
        self._out_features, in_features = shape
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._tensors = (packed, bias)
        self.matrix = Matrix(
            panels=address(packed.panels),
            start=address(packed.start),
            scales=address(packed.scales),
            bias=address(bias),
            inputs=in_features,
            outputs=self._out_features,
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


class _Packed(NamedTuple):
    """A weight as the kernels read it."""

    panels: Tensor
    start: Tensor | None
    scales: Tensor | None
    kind: int


def _pack(library: Library, weight: Tensor) -> _Packed:
    panels = _empty_panels(library, weight)
    out_features, in_features = weight.shape
    is_brain = weight.dtype == torch.bfloat16
    pack = library.functions.pack_brain if is_brain else library.functions.pack_float
    weight = weight.contiguous()
    pack(address(weight), address(panels), in_features, out_features)
    return _Packed(panels, None, None, BRAIN if is_brain else WIDE)


def _pack_int8(library: Library, weight: Int8Weight) -> _Packed:
    out_features, in_features = weight.values.shape
    panels = _empty_panels(library, weight.values, in_multiple=4)
    start = torch.empty(len(panels) * _PANEL, dtype=torch.int32)
    values = weight.values.contiguous()
    library.functions.pack_int8(
        address(values), address(panels), address(start), in_features, out_features
    )
    # A row's scale is a 127th of its largest magnitude; the 127th is taken once, here.
    return _Packed(panels, start, (weight.scales / LEVELS_INT8).contiguous(), INTEGER)


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


def _empty_panels(library: Library, weight: Tensor, *, in_multiple: int = 1) -> Tensor:
    out_features, in_features = weight.shape
    num_panels = -(-out_features // _PANEL)
    width = -(-in_features // in_multiple) * in_multiple
    panels = torch.empty(num_panels, width, _PANEL, dtype=weight.dtype)
    library.functions.use_large_pages(address(panels), panels.nbytes)
    return panels
