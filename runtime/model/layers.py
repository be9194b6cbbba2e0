"""The layers between the attentions: linear, normalisation, gated activation.

Plain functions and small classes, on tensors of shape ``[rows, width]``, a row for each token of
the step's flat batch. Knows nothing of sequences or of the KV cache. Linears whose weights are
quantised are in ``understudy.runtime.model.quantization``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from understudy.runtime.model.numerics import agreeing_row_counts, cancelling_probe

_PACK_BYTES_MIN: Final = 8 << 20
"""Below this a float32 weight stays a plain matrix: measured, a packed product costs 35 µs to
call, and the plain one is as fast for small weights."""
_FEW_ROWS: Final = 2


class Linear(Protocol):
    """A matrix that rows are multiplied with, whatever form its weights have."""

    def __call__(self, x: Tensor, tiles: tuple[int, ...]) -> Tensor:
        """Multiply ``[rows, in]`` to ``[rows, out]``, one tile of rows after the other.

        ``tiles`` are sizes that add up to the number of rows; a linear that takes any row count
        need not cut.
        """
        ...

    def exact_row_counts(self, *, rows_max: int) -> tuple[int, ...] | None:
        """Tile sizes up to ``rows_max`` that give the same bits here; ``None`` is any size."""
        ...


class LinearShape(NamedTuple):
    """What decides which kernels a ``DenseLinear`` runs."""

    in_features: int
    out_features: int
    has_bias: bool
    dtype: torch.dtype
    device: torch.device


class DenseLinear:
    """``x @ weight.T + bias``, with the weight laid out as this machine multiplies fastest.

    The layout, and with it the order of the sums, depends only on the weight's shape, dtype and
    device.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take ``weight`` ``[out, in]`` and ``bias`` ``[out]``; the weight may be laid out anew."""
        self._shape = LinearShape(
            weight.shape[1], weight.shape[0], bias is not None, weight.dtype, weight.device
        )
        self._multiply = _product(weight, bias)

    def __call__(self, x: Tensor, tiles: tuple[int, ...]) -> Tensor:
        """Multiply ``[rows, in]`` to ``[rows, out]``, tile by tile."""
        if len(tiles) == 1:
            return self._multiply(x)
        return torch.cat([self._multiply(tile) for tile in torch.split(x, list(tiles))])

    def exact_row_counts(self, *, rows_max: int) -> tuple[int, ...]:
        """Tile sizes that give a linear of this shape the same bits on this machine."""
        return _exact_row_counts(self._shape, rows_max, torch.get_num_threads())


@cache
def _exact_row_counts(shape: LinearShape, rows_max: int, _num_threads: int) -> tuple[int, ...]:
    probe = cancelling_probe(
        in_features=shape.in_features,
        out_features=shape.out_features,
        dtype=shape.dtype,
        device=shape.device,
    )
    bias = probe.weight.new_zeros(shape.out_features) if shape.has_bias else None
    linear = DenseLinear(probe.weight, bias)
    return agreeing_row_counts(lambda x: linear(x, (len(x),)), probe.rows, rows_max=rows_max)


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if weight.device.type == "cpu" and torch._C._has_mkldnn:
        if weight.dtype == torch.float32 and weight.nbytes < _PACK_BYTES_MIN:
            return _transposed_product(weight, bias)
        return _packed_product(weight, bias)

    def multiply(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    return multiply


def _transposed_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A small float32 weight, stored ``[in, out]``.

    The library lays the weight out anew on each call, which for two rows, the least that most
    machines compute alike, takes longer than multiplying: it is kept laid out for those.
    """
    transposed = weight.t().contiguous()
    as_given = transposed.t()

    def multiply(x: Tensor) -> Tensor:
        if bias is None:
            return torch.mm(x, transposed)
        return torch.addmm(bias, x, transposed)

    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return multiply
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, _FEW_ROWS)
    multiply_few = torch.ops.mkl._mkl_linear

    def multiply_any(x: Tensor) -> Tensor:
        if x.shape[0] == _FEW_ROWS:
            return cast("Tensor", multiply_few(x, packed, as_given, bias, _FEW_ROWS))
        return multiply(x)

    return multiply_any


def _packed_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A weight in oneDNN's own blocked layout, 1.4 to 2 times as fast as the plain one."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, packed, bias, "none", [], "")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square (Zhang and Sennrich, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def silu_and_multiply(gate_and_up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer, arXiv:2002.05202) of ``[rows, 2 * width]``.

    Spelled out, because ``F.silu`` computes the last few elements of a tensor by another formula,
    which would make a row's bits depend on its place in the batch; ``exp`` does not.
    """
    gate, up = gate_and_up.to(torch.float32).chunk(2, dim=-1)
    divisor = torch.neg(gate).exp_().add_(1.0)
    return torch.div(gate, divisor, out=divisor).mul_(up).to(gate_and_up.dtype)
