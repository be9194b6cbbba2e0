"""Linear layers on the CPU's own kernels.

Rows are float32. A sum is always made in the same order, whatever the number of rows, so any number
of rows gives the same bits, and nothing has to be cut into tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.runtime.model.native.library import Library, pointer
from understudy.runtime.model.quantization import LEVELS_INT8, Int8Weight

_PANEL = 32
"""Outputs that the kernels keep side by side."""


class NativeLinear:
    """``x @ weight.T + bias`` in float32; a weight of bfloat16 stays so, and is widened on the way.

    That changes no bit, and half as many bytes are read, which is what a few rows' time is.
    """

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None) -> None:
        """Take ``weight`` ``[out, in]``, float32 or bfloat16, and ``bias`` ``[out]``."""
        self._out_features, self._in_features = weight.shape
        self._is_brain = weight.dtype == torch.bfloat16
        self._panels = _empty_panels(weight)
        functions = library.functions
        pack = functions.pack_brain if self._is_brain else functions.pack_float
        weight = weight.contiguous()
        pack(pointer(weight), pointer(self._panels), self._in_features, self._out_features)
        self._bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._multiply = functions.product_float
        self._fixed = (pointer(self._panels), int(self._is_brain), pointer(self._bias))

    def __call__(self, x: Tensor, tiles: tuple[int, ...]) -> Tensor:  # noqa: ARG002 - one tile
        """Multiply ``[rows, in]`` to ``[rows, out]``."""
        num_rows = len(x)
        result = torch.empty(num_rows, self._out_features)
        self._multiply(
            *(x.data_ptr(), x.stride(0), *self._fixed, result.data_ptr()),
            *(num_rows, self._in_features, self._out_features),
        )
        return result

    def exact_row_counts(self, *, rows_max: int) -> None:
        """Any number of rows: each one's sums are made in the same order."""


class NativeInt8Linear:
    """A linear whose weights and activations are 8-bit integers: see ``quantization``.

    The same bits as ``Int8Linear``; rows are quantised, multiplied and scaled in one call.
    """

    def __init__(self, library: Library, weight: Int8Weight, bias: Tensor | None) -> None:
        """Take a weight, and a ``bias`` ``[out]``."""
        self._out_features, self._in_features = weight.values.shape
        num_outputs = -(-self._out_features // _PANEL) * _PANEL
        self._panels = _empty_panels(weight.values, in_multiple=4)
        self._start = torch.empty(num_outputs, dtype=torch.int32)
        values = weight.values.contiguous()
        library.functions.pack_int8(
            *(pointer(values), pointer(self._panels), pointer(self._start)),
            *(self._in_features, self._out_features),
        )
        # A row's scale is a 127th of its largest magnitude; the 127th is taken once, here.
        self._scales = (weight.scales / LEVELS_INT8).contiguous()
        self._bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._multiply = library.functions.product_int8
        kept = (self._panels, self._start, self._scales, self._bias)
        self._fixed = tuple(pointer(tensor) for tensor in kept)

    def __call__(self, x: Tensor, tiles: tuple[int, ...]) -> Tensor:  # noqa: ARG002 - one tile
        """Multiply ``[rows, in]`` to ``[rows, out]``."""
        num_rows = len(x)
        result = torch.empty(num_rows, self._out_features)
        self._multiply(
            *(x.data_ptr(), x.stride(0), *self._fixed, result.data_ptr()),
            *(num_rows, self._in_features, self._out_features),
        )
        return result

    def exact_row_counts(self, *, rows_max: int) -> None:
        """Any number of rows: sums of integers are exact."""


def _empty_panels(weight: Tensor, *, in_multiple: int = 1) -> Tensor:
    out_features, in_features = weight.shape
    num_panels = -(-out_features // _PANEL)
    width = -(-in_features // in_multiple) * in_multiple
    return torch.empty(num_panels, width, _PANEL, dtype=weight.dtype)
