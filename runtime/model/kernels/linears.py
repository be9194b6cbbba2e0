"""Linear layers on a GPU whose weights and rows both have 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.runtime.model.kernels.fp8_product import fp8_linear
from understudy.runtime.model.kernels.int8_product import int8_linear
from understudy.runtime.model.kernels.quantisation import QuantisedRows, quantise_rows
from understudy.runtime.model.quantization import Fp8Weight, Int8Weight


class TritonQuantisedLinear:
    """``x @ weight.T + bias`` by products of int8 or fp8, each row quantised with its own scale.

    Whoever makes the rows may quantise them in the same pass: see ``row_dtype`` and ``multiply``.
    """

    def __init__(
        self,
        weight: Int8Weight | Fp8Weight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Take a weight and a ``bias`` ``[out]``; ``dtype`` is that of rows and results."""
        self._values = weight.values.to(device).contiguous()
        self._scales = weight.scales.to(device, torch.float32).contiguous()
        self._bias = None if bias is None else bias.to(device).contiguous()
        self._dtype = dtype
        self._product = int8_linear if weight.values.dtype == torch.int8 else fp8_linear

    @property
    def row_dtype(self) -> torch.dtype:
        """What rows are quantised to."""
        return self._values.dtype

    def __call__(self, x: Tensor, tiles: tuple[int, ...]) -> Tensor:  # noqa: ARG002 - one tile
        """Multiply ``[rows, in]`` to ``[rows, out]``, all rows at once whatever ``tiles`` says."""
        return self.multiply(quantise_rows(x, self.row_dtype))

    def multiply(self, rows: QuantisedRows) -> Tensor:
        """The same with rows that are quantised already, to ``row_dtype``."""
        return self._product(rows, self._values, self._scales, self._bias, self._dtype)

    def exact_row_counts(self, *, rows_max: int) -> None:
        """Any number of rows: sums of integers are exact, others are made in one order."""
