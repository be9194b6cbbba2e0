"""Linear layers with quantised weights, on the CPU, and how weights are quantised at load.

``int8`` is W8A8: weights are 8-bit integers with a scale for each output, and so is each row of
activations, with a scale of its own that is computed on the way. Products of integers are summed
in 32 bits, which is exact, so the order of the sums cannot matter: a row's bits depend neither on
the batch nor on the kernel, and exact numerics cost nothing. Conversion to float32 and the two
scales follow, each one rounding, always in the same order.

The kernel multiplies unsigned activations with signed weights, which is what the hardware has
(AVX512-VNNI, AMX). Activations are therefore kept 128 higher, and the kernel takes the difference
off again, in integers. With signed activations the library falls back on a reference that is a
thousand times slower without AMX. ``torch._int_mm`` is as exact, as fast for one row, and takes 1.1
to 2.1 times as long for more.

``int4`` keeps weights in 4 bits, with a scale and an offset for each group of inputs, and
activations in bfloat16. Its kernel reads each row's sum in one order whatever the number of rows,
so its bits do not depend on the batch either. Dequantising the weights for a fast product of many
rows would: that sums in another order. So the same kernel serves every number of rows. It is the
fastest for one row, half the memory of ``int8``, and slow for long prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor

GROUP_SIZES: Final = (128, 64, 32)
"""Inputs that share a 4-bit scale, preferred first: what the kernel takes."""

LEVELS_INT8: Final = 127.0
LARGEST_FP8: Final = 448.0
_LEVELS_INT4: Final = 15.0
_MIDDLE_INT4: Final = 8
_LARGEST_MIN: Final = 2.0**-100
"""Of a row of zeros, so that nothing is divided by zero."""
_CODE_ROWS: Final = 16
"""The 4-bit kernel's outputs come in multiples of this."""
_EXACT_TERMS: Final = 1024
"""Products of 8-bit integers whose sum stays below 2**24, exact in float32 in any order."""
_QUANTIZED_ROWS: Final = 4096
"""Rows of a weight that are quantised at once, which bounds what that needs of memory."""


class Int8Weight(NamedTuple):
    """``values * scales[:, None]``."""

    values: Tensor
    """int8, ``[out, in]``, from -127; -128 is not used by us, and taken from checkpoints."""
    scales: Tensor
    """float32, ``[out]``."""


class Fp8Weight(NamedTuple):
    """``values * scales[:, None]``; for GPUs."""

    values: Tensor
    """float8_e4m3fn, ``[out, in]``."""
    scales: Tensor
    """float32, ``[out]``."""


class Int4Weight(NamedTuple):
    """``codes * scale + offset``, a scale and an offset for each group of inputs."""

    codes: Tensor
    """uint8 from 0 to 15, ``[out, in]``."""
    scales: Tensor
    """float32, ``[out, groups]``."""
    offsets: Tensor
    """float32, ``[out, groups]``: what a code of 0 stands for."""

    @property
    def group_size(self) -> int:
        """Inputs of a group."""
        return self.codes.shape[1] // self.scales.shape[1]


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Quantise ``[out, in]``: each output's largest magnitude becomes 127.

    Raises:
        ValueError: the weight has a number that is not finite.
    """
    values, scales = _by_output(weight, torch.int8, LEVELS_INT8)
    return Int8Weight(values, scales)


def quantize_fp8(weight: Tensor) -> Fp8Weight:
    """Quantise ``[out, in]``: each output's largest magnitude becomes 448.

    Raises:
        ValueError: the weight has a number that is not finite.
    """
    values, scales = _by_output(weight, torch.float8_e4m3fn, LARGEST_FP8)
    return Fp8Weight(values, scales)


def _by_output(weight: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """Values of 8 bits, and a scale for each output."""
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    for start in range(0, len(weight), _QUANTIZED_ROWS):
        rows = weight[start : start + _QUANTIZED_ROWS].to(torch.float32)
        scale = rows.abs().amax(dim=1).clamp_(min=_LARGEST_MIN).div_(largest)
        scales[start : start + _QUANTIZED_ROWS] = scale
        rows = rows / scale[:, None]
        if not dtype.is_floating_point:
            rows = rows.round_()
        values[start : start + _QUANTIZED_ROWS] = rows.to(dtype)
    check_finite(scales)
    return values, scales


def quantize_int4(weight: Tensor) -> Int4Weight:
    """Quantise ``[out, in]``: each group's least number becomes 0 and its greatest 15.

    Raises:
        ValueError: the weight has a number that is not finite, or no group size divides it.
    """
    out_features, in_features = weight.shape
    size = next((size for size in GROUP_SIZES if in_features % size == 0), None)
    if size is None:
        raise ValueError(f"int4 needs inputs in multiples of {GROUP_SIZES[-1]}, got {in_features}")
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(out_features, in_features // size)
    offsets = torch.empty_like(scales)
    for start in range(0, out_features, _QUANTIZED_ROWS):
        rows = slice(start, start + _QUANTIZED_ROWS)
        groups = weight[rows].to(torch.float32).view(-1, in_features // size, size)
        least, greatest = groups.aminmax(dim=2)
        scale = (greatest - least).div_(_LEVELS_INT4).clamp_(min=_LARGEST_MIN)
        steps = (groups - least[..., None]).div_(scale[..., None])
        codes[rows] = steps.round_().clamp_(0, _LEVELS_INT4).flatten(1)
        scales[rows], offsets[rows] = scale, least
    check_finite(scales)
    check_finite(offsets)
    return Int4Weight(codes, scales, offsets)


def dequantize_int4(weight: Int4Weight) -> Tensor:
    """The weight as float32, ``[out, in]``."""
    groups = weight.codes.to(torch.float32).view(*weight.scales.shape, weight.group_size)
    return groups.mul_(weight.scales[..., None]).add_(weight.offsets[..., None]).flatten(1)


def check_finite(numbers: Tensor) -> None:
    """Raise ``ValueError`` if one is not finite."""
    if not bool(numbers.isfinite().all()):
        raise ValueError("has numbers that are not finite")


class Int8Linear:
    """A linear whose weights and activations are 8-bit integers: W8A8."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        """Take a weight and a ``bias`` ``[out]``; ``dtype`` is that of rows and results."""
        self._bias = None if bias is None else bias.to(torch.float32)
        self._dtype = dtype
        # A tensor, because torch divides a plain number by a tensor in two operations.
        self._levels = torch.tensor(LEVELS_INT8)
        product = _onednn_product if _onednn_is_exact() else portable_product
        # A row's scale is a 127th of its largest magnitude; the 127th is taken once, here.
        self._multiply = product(Int8Weight(weight.values, weight.scales / LEVELS_INT8))

    def __call__(self, x: Tensor, tiles: tuple[int, ...]) -> Tensor:  # noqa: ARG002 - one tile
        """Multiply ``[rows, in]`` to ``[rows, out]``, all rows at once whatever ``tiles`` says."""
        largest = x.abs().amax(dim=1, keepdim=True).to(torch.float32).clamp_(min=_LARGEST_MIN)
        # Truncating what is half above rounds it, since all of it is positive.
        levels = torch.mul(x, torch.div(self._levels, largest)).add_(128.5).to(torch.uint8)
        result = self._multiply(levels).mul_(largest)
        if self._bias is not None:
            result.add_(self._bias)
        return result.to(self._dtype)

    def exact_row_counts(self, *, rows_max: int) -> None:
        """Any number of rows: sums of integers are exact."""


class Int4Linear:
    """A linear whose weights have 4 bits; rows are multiplied in bfloat16, summed in float32."""

    def __init__(self, weight: Int4Weight, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        """Take a weight and a ``bias`` ``[out]``; ``dtype`` is that of rows and results.

        The weight's groups must be of a size that the kernel takes.
        """
        self._group_size = weight.group_size
        assert self._group_size in GROUP_SIZES
        self._bias = bias
        self._dtype = dtype
        self._out_features = len(weight.codes)
        surplus = -self._out_features % _CODE_ROWS
        codes, scales, offsets = (torch.nn.functional.pad(t, (0, 0, 0, surplus)) for t in weight)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        # The kernel takes what a code of 8 stands for.
        middles = scales * _MIDDLE_INT4 + offsets
        self._scales = torch.stack((scales.t(), middles.t()), dim=2).to(torch.bfloat16).contiguous()

    def __call__(self, x: Tensor, tiles: tuple[int, ...]) -> Tensor:  # noqa: ARG002 - one tile
        """Multiply ``[rows, in]`` to ``[rows, out]``, all rows at once whatever ``tiles`` says."""
        result = cast(
            "Tensor",
            torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.to(torch.bfloat16), self._packed, self._group_size, self._scales
            ),
        )
        result = result[:, : self._out_features].to(self._dtype)
        return result if self._bias is None else result + self._bias

    def exact_row_counts(self, *, rows_max: int) -> None:
        """Any number of rows: each one's sums are made in the same order."""


def _onednn_product(weight: Int8Weight) -> Callable[[Tensor], Tensor]:
    """``levels - 128`` times the weight, float32, by the library's integer kernels."""
    packed = torch.ops.onednn.qlinear_prepack(weight.values, None)
    scales = weight.scales
    zero_points = torch.zeros(len(scales), dtype=torch.int32)
    multiply = torch.ops.onednn.qlinear_pointwise.default

    def product(levels: Tensor) -> Tensor:
        return cast(
            "Tensor",
            multiply(
                *(levels, 1.0, 128, packed, scales, zero_points),
                *(None, 1.0, 0, torch.float32, "none", [], ""),
            ),
        )

    return product


def portable_product(weight: Int8Weight) -> Callable[[Tensor], Tensor]:
    """The same bits from any matrix library, slower: partial sums that float32 holds exactly."""

    def product(levels: Tensor) -> Tensor:
        rows = levels.to(torch.float32).sub_(128.0)
        sums = torch.zeros(len(rows), len(weight.values), dtype=torch.int32)
        for start in range(0, rows.shape[1], _EXACT_TERMS):
            terms = slice(start, start + _EXACT_TERMS)
            values = weight.values[:, terms].to(torch.float32)
            sums += (rows[:, terms] @ values.t()).to(torch.int32)
        return sums.to(torch.float32).mul_(weight.scales)

    return product


@cache
def _onednn_is_exact() -> bool:
    """Whether the library's kernels keep sums of extreme values on this processor.

    Instruction sets before VNNI add pairs of products in 16 bits, where they saturate.
    """
    if not torch._C._has_mkldnn:
        return False
    values = torch.full((64, 256), 127, dtype=torch.int8)
    values[::2] = -127
    weight = Int8Weight(values, torch.ones(len(values)))
    levels = torch.full((33, 256), 255, dtype=torch.uint8)
    levels[::3] = 1
    expected = portable_product(weight)(levels)
    try:
        product = _onednn_product(weight)
        found = [product(levels[:count]) for count in (1, 33)]
    except RuntimeError:
        # A library that has no such kernel for this processor.
        return False
    return all(torch.equal(part, expected[: len(part)]) for part in found)
