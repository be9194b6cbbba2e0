"""Drawing tokens without leaving the GPU and without sorting.

Two kernels. The first finds, for rows that keep only some of the likeliest tokens, the least logit
that is kept: top-k and top-p are both questions of the kind "how much is at or above this logit?",
and bisection over the 2**32 numbers that a float32 can be answers them exactly. The second adds the
noise of ``noise`` to what is kept and takes the largest.

Draws what ``sampler`` draws; ties at a threshold share one fate here as there.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from understudy.runtime.model.attention import Indices
from understudy.runtime.model.noise import Keys, noise_keys, seed_hash
from understudy.runtime.model.transfer import to_device

_BLOCK: Final = 4096
_GOLDEN = tl.constexpr(-7046029254386353131)
_MIX_1 = tl.constexpr(-4658895280553007687)
_MIX_2 = tl.constexpr(-7723592293110705685)
_INT32_BITS = tl.constexpr(0x7FFFFFFF)


class Draw(NamedTuple):
    """How one row is drawn."""

    temperature: float
    """0 takes the likeliest."""
    seed: int
    position: int
    """Index in the output of the token to draw."""
    top_k: int
    """0 is off."""
    top_p: float
    min_p: float


class Draws:
    """How the rows of a step are drawn, as the kernels read it.

    What a step needs that comes behind another one is made of the other's without a look at any
    single row.
    """

    def __init__(
        self, numbers: npt.NDArray[np.float64], seed_hashes: Keys, positions: Keys
    ) -> None:
        """``numbers`` ``[5, rows]``: temperature, top_p, log of min_p, and integers: key, top_k."""
        self._numbers = numbers
        self._seed_hashes = seed_hashes
        self._positions = positions
        numbers[3] = noise_keys(seed_hashes, positions).view(np.float64)
        truncated = (numbers[4].view(np.int64) > 0) | (numbers[1] < 1) | (numbers[2] > -np.inf)
        self.are_truncated = bool((truncated & (numbers[0] > 0)).any())
        """Whether a row keeps only some of its tokens."""

    @classmethod
    def of(cls, draws: Sequence[Draw]) -> "Draws":
        """Lay them out."""
        numbers = np.empty((5, len(draws)))
        numbers[0] = [draw.temperature for draw in draws]
        numbers[1] = [draw.top_p for draw in draws]
        with np.errstate(divide="ignore"):
            numbers[2] = np.log(np.array([draw.min_p for draw in draws]))
        numbers[4] = np.array([draw.top_k for draw in draws], dtype=np.int64).view(np.float64)
        seed_hashes = np.array([seed_hash(draw.seed) for draw in draws], dtype=np.uint64)
        # Those of a prompt that is echoed are negative, and wrap around.
        positions = np.array([draw.position for draw in draws], dtype=np.int64)
        return cls(numbers, seed_hashes, positions.view(np.uint64))

    def next(self, kept: Indices | None) -> "Draws":
        """Of the same rows, or of some of them, what is drawn behind this."""
        rows = slice(None) if kept is None else kept
        positions = self._positions[rows] + np.uint64(1)
        return Draws(self._numbers[:, rows].copy(), self._seed_hashes[rows], positions)

    def __len__(self) -> int:
        return self._numbers.shape[1]

    def on(self, device: torch.device) -> Tensor:
        """The numbers, on a device."""
        return to_device(self._numbers, device)


def draw_tokens(logits: Tensor, draws: Draws) -> Tensor:
    """A token for each row of ``logits`` ``[rows, vocab_size]``, float32; ``[rows]``, int64."""
    rows, vocab_size = logits.shape
    assert rows == len(draws)
    assert logits.is_contiguous()
    temperatures, top_p, log_min_p, keys, top_k = draws.on(logits.device)
    keys, top_k = keys.view(torch.int64), top_k.view(torch.int64)
    least = torch.full_like(temperatures, -torch.inf)
    block = min(_BLOCK, triton.next_power_of_2(vocab_size))
    if draws.are_truncated:
        _least_kernel[(rows,)](
            logits, temperatures, top_k, top_p, log_min_p, least, vocab_size,
            block=block, num_warps=16,
        )  # fmt: skip
    chunks = triton.cdiv(vocab_size, block)
    best = torch.empty(rows, chunks, dtype=torch.float64, device=logits.device)
    tokens = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    _draw_kernel[(rows, chunks)](
        logits, temperatures, keys, least, best, tokens, vocab_size, chunks,
        block=block, num_warps=8,
    )  # fmt: skip
    return tokens.gather(1, best.argmax(dim=1, keepdim=True)).squeeze(1)


@triton.jit
def _ordered(x):
    """An integer for each float32, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _INT32_BITS)


@triton.jit
def _amount_above(
    logits, least, floor, peak, inverse_temperature, vocab_size, counts: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """How many logits, or how much of the mass, are at or above two bounds."""
    amount = tl.zeros([block], tl.float64)
    bound = tl.maximum(least, floor)
    for start in range(0, vocab_size, block):
        columns = start + tl.arange(0, block)
        mask = columns < vocab_size
        x = tl.load(logits + columns, mask=mask, other=float("-inf"))
        kept = mask & (_ordered(x).to(tl.int64) >= bound)
        if counts:
            amount += tl.where(kept, 1.0, 0.0)
        else:
            amount += tl.where(kept, tl.exp((x - peak) * inverse_temperature), 0.0).to(tl.float64)
    return tl.sum(amount, 0)


@triton.jit
def _threshold(
    logits, floor, ceiling, wanted, peak, inverse_temperature, vocab_size, counts: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The highest bound at or above which there is as much as wanted."""
    low = floor
    high = ceiling
    while low < high:
        middle = low + (high - low + 1) // 2
        amount = _amount_above(
            logits, middle, floor, peak, inverse_temperature, vocab_size, counts, block
        )
        if amount >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit(
    do_not_specialize_on_alignment=["temperatures", "top_ks", "top_ps", "log_min_ps", "leasts"]
)
def _least_kernel(
    logits, temperatures, top_ks, top_ps, log_min_ps, leasts, vocab_size, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    log_min_p = tl.load(log_min_ps + row)
    logits += row * vocab_size
    if temperature > 0.0:
        peaks = tl.full([block], float("-inf"), tl.float32)
        for start in range(0, vocab_size, block):
            columns = start + tl.arange(0, block)
            x = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf"))
            peaks = tl.maximum(peaks, x)
        peak = tl.max(peaks, 0)
        ceiling = _ordered(peak).to(tl.int64)
        # Minus infinity; no logit is less.
        floor = _ordered(tl.full([], float("-inf"), tl.float32)).to(tl.int64)
        lowest = floor
        inverse = (1.0 / temperature).to(tl.float32)
        if (top_k > 0) & (top_k < vocab_size):
            wanted = top_k.to(tl.float64)
            floor = _threshold(
                logits, floor, ceiling, wanted, peak, inverse, vocab_size, True, block
            )
        if top_p < 1.0:
            whole = _amount_above(logits, floor, floor, peak, inverse, vocab_size, False, block)
            wanted = top_p * whole
            floor = _threshold(
                logits, floor, ceiling, wanted, peak, inverse, vocab_size, False, block
            )
        least = tl.full([], float("-inf"), tl.float64)
        if floor > lowest:
            bits = floor.to(tl.int32)
            bits = bits ^ ((bits >> 31) & _INT32_BITS)
            least = bits.to(tl.float32, bitcast=True).to(tl.float64) / temperature
        relative = peak.to(tl.float64) / temperature + log_min_p
        tl.store(leasts + row, tl.maximum(least, relative))


@triton.jit
def _shifted_right(bits, count: tl.constexpr):
    return (bits.to(tl.uint64, bitcast=True) >> count).to(tl.int64, bitcast=True)


@triton.jit
def _gumbel_noise(key, tokens):
    """As ``noise.gumbel_noise``, which explains it."""
    bits = tokens.to(tl.int64) * _GOLDEN + key
    bits = (bits ^ _shifted_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted_right(bits, 27)) * _MIX_2
    bits = bits ^ _shifted_right(bits, 31)
    uniform = (_shifted_right(bits, 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit(do_not_specialize_on_alignment=["temperatures", "keys", "leasts"])
def _draw_kernel(
    logits, temperatures, keys, leasts, bests, tokens, vocab_size, num_chunks, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    mask = columns < vocab_size
    temperature = tl.load(temperatures + row)
    x = tl.load(logits + row * vocab_size + columns, mask=mask, other=float("-inf"))
    x = x.to(tl.float64)
    if temperature > 0.0:
        x = x / temperature
        least = tl.load(leasts + row)
        kept = mask & (x >= least)
        x = tl.where(kept, x, float("-inf"))
        # Noise is the dearest part; most of a vocabulary is not kept.
        if tl.max(kept.to(tl.int32), 0) > 0:
            x = tl.where(kept, x + _gumbel_noise(tl.load(keys + row), columns), float("-inf"))
    best = tl.max(x, 0)
    place = row * num_chunks + tl.program_id(1)
    token = tl.min(tl.where(x == best, columns, vocab_size - 1), 0)
    tl.store(bests + place, best)
    tl.store(tokens + place, token.to(tl.int64))
