"""From logits to tokens, each row by its own request's parameters.

The order of things, for one row: log-probabilities are taken from the raw logits; penalties, then
logit bias change the logits, and stop tokens and what a grammar does not allow are forbidden;
temperature divides them; top-k, top-p and min-p, in this order, keep a set of the likeliest; Gumbel
noise decides (see ``noise``).

Rows pay only for what their request asks. The vocabulary is never sorted in the common case: a set
of the likeliest is found among some candidates, with proof that nothing outside belongs to it, and
the next wider set of candidates is taken where the proof fails; the last is the whole vocabulary.
A row's token does not depend on the other rows: candidates decide how fast, never what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from understudy.protocol.request import SamplingParams, TokenLogprobs
from understudy.runtime.model.attention import Indices
from understudy.runtime.model.native.library import native_library
from understudy.runtime.model.native.sampling import Draw, Likeliest, likeliest, may_win
from understudy.runtime.model.noise import gumbel_noise, noise_key, signed
from understudy.runtime.model.operations import has_kernels
from understudy.runtime.model.transfer import HostCopy, to_device
from understudy.runtime.scheduling.decision import SampledToken

if TYPE_CHECKING:
    from understudy.runtime.model.kernels.sampling import Draws

_GREEDY_TEMPERATURE: Final = 1e-5
"""Below this, dividing by the temperature would overflow; the result is greedy anyway."""
_NUM_CANDIDATES: Final = (64, 1024)
_SUM_BLOCK: Final = 1024
_MASS_FLOOR: Final = -80.0
_NOISE_ELEMENTS_MAX: Final = 1 << 15
"""Noise drawn at once."""
_NOISE_WIDTH_MIN: Final = 1 << 12


class SamplingRow(NamedTuple):
    """What the sampler needs to know of a sequence."""

    params: SamplingParams
    token_ids: Rows[int]
    """Prompt, then output."""
    num_prompt_tokens: int
    mask: bytes | None = None
    """What its grammar allows: a bit for each token, the lowest of each byte first."""
    num_unknown: int = 0
    """Tokens behind these that are still being drawn. Then nothing that looks at tokens is asked
    of the row."""

    @property
    def position(self) -> int:
        """Index in the output of the token to draw."""
        return len(self.token_ids) + self.num_unknown - self.num_prompt_tokens

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.params.temperature < _GREEDY_TEMPERATURE

    @property
    def is_adjusted(self) -> bool:
        """Whether logits are changed before a token is drawn."""
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or bool(params.logit_bias)
            or bool(params.grammar)
            or (self.position < params.min_tokens and bool(params.stop_token_ids))
        )

    @property
    def is_truncated(self) -> bool:
        """Whether only a set of the likeliest tokens may be drawn."""
        params = self.params
        return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


class Drawn(NamedTuple):
    """What came of some rows of logits."""

    tokens: list[SampledToken]
    is_finite: list[bool]
    """Whether a row's numbers, but for forbidden ones, are finite; else its token means nothing."""


class Drawing:
    """Tokens that a device draws: it can go on with them before they are known here."""

    def __init__(
        self,
        rows: Rows[SamplingRow],
        token_ids: Tensor | list[int],
        is_finite: Tensor,
        raw: Tensor | None,
        *,
        draws: Draws | None = None,
    ) -> None:
        """``raw`` are log-probabilities, of the rows that report them, one below the other."""
        self.token_ids = token_ids
        """``[rows]``, int64, on the device, or known."""
        self.draws = draws
        """Set if ``Sampler.draw_behind`` may draw the next tokens of these rows."""
        self._rows = rows
        self._raw = raw
        self._is_finite = is_finite
        self._copy: HostCopy | None = None
        if isinstance(token_ids, Tensor):
            self._copy = HostCopy(torch.stack((token_ids, is_finite.to(torch.int64))))

    def collect(self) -> Drawn:
        """Wait for the tokens."""
        token_ids, is_finite = self.wait()
        tokens = [SampledToken(token) for token in token_ids]
        if self._raw is None:
            return Drawn(tokens, is_finite)
        reported = [i for i, row in enumerate(self._rows) if row.params.logprobs is not None]
        for index, raw in zip(reported, self._raw, strict=True):
            num_top = self._rows[index].params.logprobs or 0
            logprobs = _token_logprobs(raw, token_ids[index], num_top)
            tokens[index] = SampledToken(token_ids[index], logprobs)
        return Drawn(tokens, is_finite)

    def wait(self) -> tuple[list[int], list[bool]]:
        """Wait for the bare tokens, and whether each row's numbers are finite."""
        if self._copy is not None:
            token_ids, is_finite = self._copy.wait().tolist()
            return token_ids, list(map(bool, is_finite))
        assert isinstance(self.token_ids, list)
        known: list[bool] = self._is_finite.tolist()
        return self.token_ids, known


class Sampler:
    """Draws tokens. Keeps no state between calls."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._token_ids = torch.arange(vocab_size, device=device)
        self._has_kernels = has_kernels(device)
        self._library = native_library(device, torch.float32)
        bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
        self._mask_octets = torch.where(bits == 1, 0.0, -math.inf)
        """What each octet of a mask adds to its eight tokens."""

    def sample(self, logits: Tensor, rows: Rows[SamplingRow]) -> list[SampledToken]:
        """Draw a token for each row of ``logits`` ``[rows, vocab_size]``, float32.

        The logits may be changed in place.
        """
        return self.draw(logits, rows).collect().tokens

    def draw(self, logits: Tensor, rows: Rows[SamplingRow]) -> Drawing:
        """As ``sample``, but without waiting for a device that has more to do."""
        assert logits.shape == (len(rows), self._vocab_size)
        best = None if self._has_kernels else self._likeliest(logits)
        # A row's maximum is not finite if any of its numbers is NaN or infinite.
        is_finite = (logits.amax(dim=1) if best is None else best.values).isfinite()
        reported = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        raw = logits[reported].log_softmax(dim=1) if reported else None
        for index, row in enumerate(rows):
            self._adjust(logits[index], row)
        self._forbid_masked(logits, rows)
        if best is not None:
            if any(row.is_adjusted or row.mask is not None for row in rows):
                best = self._likeliest(logits)
            return Drawing(rows, self._draw(logits, rows, best.ids), is_finite, raw)
        from understudy.runtime.model.kernels.sampling import draw_tokens

        draws = _draws_of(rows)
        token_ids = draw_tokens(logits, draws)
        # What is not adjusted here will not be later on: tokens are only added.
        can_go_on = raw is None and not any(row.is_adjusted for row in rows)
        return Drawing(rows, token_ids, is_finite, raw, draws=draws if can_go_on else None)

    def draw_behind(self, logits: Tensor, draws: Draws, kept: Indices | None) -> Drawing:
        """As ``draw``, behind tokens drawn so: of the same rows, or of ``kept`` ones of them."""
        from understudy.runtime.model.kernels.sampling import draw_tokens

        draws = draws.next(kept)
        is_finite = logits.amax(dim=1).isfinite()
        return Drawing((), draw_tokens(logits, draws), is_finite, None, draws=draws)

    def _adjust(self, logits: Tensor, row: SamplingRow) -> None:
        """Apply penalties, bias and forbidden tokens to one row, in place."""
        params = row.params
        if params.repetition_penalty != 1.0:
            seen = torch.unique(torch.tensor(row.token_ids, device=self._device))
            values = logits[seen]
            penalty = params.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if row.position > 0 and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
            output = torch.tensor(row.token_ids[row.num_prompt_tokens :], device=self._device)
            made, counts = torch.unique(output, return_counts=True)
            logits[made] -= params.presence_penalty + params.frequency_penalty * counts
        # The gateway checks ids; an id beyond the logits must not reach another row all the same.
        biases = [(i, bias) for i, bias in params.logit_bias if 0 <= i < self._vocab_size]
        if biases:
            ids = to_device(np.array([i for i, _ in biases]), self._device)
            added = np.array([bias for _, bias in biases], dtype=np.float32)
            logits[ids] += to_device(added, self._device)
        # A grammar may allow nothing but the end, and then nothing else can be drawn.
        if row.position < params.min_tokens and row.mask is None:
            forbidden = [i for i in params.stop_token_ids if 0 <= i < self._vocab_size]
            if forbidden:
                logits.index_fill_(0, to_device(np.array(forbidden), self._device), -math.inf)

    def _forbid_masked(self, logits: Tensor, rows: Rows[SamplingRow]) -> None:
        """Forbid what the rows' grammars do not allow, in place; tokens without a bit, too."""
        masks = [(index, row.mask) for index, row in enumerate(rows) if row.mask is not None]
        if not masks:
            return
        # Masks travel as bits, and together; eight tokens at a time become what is added to them.
        width = -(-self._vocab_size // 8)
        packed = np.zeros((len(masks), width), dtype=np.uint8)
        for place, (_, mask) in enumerate(masks):
            packed[place, : len(mask)] = np.frombuffer(mask, dtype=np.uint8)[:width]
        octets = torch.from_numpy(packed).to(self._device).to(torch.int32).view(-1)
        added = self._mask_octets.index_select(0, octets).view(len(masks), -1)
        index = torch.tensor([index for index, _ in masks], device=self._device)
        logits.index_add_(0, index, added[:, : self._vocab_size])

    def _draw(self, logits: Tensor, rows: Rows[SamplingRow], greedy: list[int]) -> list[int]:
        """Draw a token for each row; ``greedy`` has the likeliest of all, which costs no more."""
        tokens = list(greedy)
        truncated = [i for i, row in enumerate(rows) if not row.is_greedy and row.is_truncated]
        full = [i for i, row in enumerate(rows) if not row.is_greedy and not row.is_truncated]
        if full:
            from_all = self._draw_from_all(logits, rows, full)
            for index, token in zip(full, from_all, strict=True):
                tokens[index] = token
        widths = [width for width in _NUM_CANDIDATES if width < self._vocab_size]
        for num_candidates in (*widths, self._vocab_size):
            is_last = num_candidates == self._vocab_size
            some = [i for i in truncated if is_last or rows[i].params.top_k < num_candidates]
            if not some:
                continue
            drawn = self._draw_among(logits, rows, some, num_candidates)
            for index, proven in zip(some, drawn, strict=True):
                if proven is not None:
                    tokens[index] = proven
                    truncated.remove(index)
        return tokens

    def _draw_from_all(self, logits: Tensor, rows: Rows[SamplingRow], some: list[int]) -> list[int]:
        """Draw for some rows from the whole vocabulary, by chunks that stay in the cache."""
        temperatures, keys = self._temperatures(rows, some), self._keys(rows, some)
        if self._library is not None:
            draws = [
                Draw(index, key, rows[index].params.temperature)
                for index, (key,) in zip(some, keys.tolist(), strict=True)
            ]
            contenders = may_win(self._library, logits, draws)
            if contenders is not None:
                return _winners(logits[some], contenders, temperatures, keys)
        chosen = _rows_of(logits, some)
        width = max(_NOISE_ELEMENTS_MAX // len(some), _NOISE_WIDTH_MIN)
        best = torch.full((len(some),), -math.inf, dtype=torch.float64, device=self._device)
        tokens = torch.zeros(len(some), dtype=torch.int64, device=self._device)
        for start in range(0, self._vocab_size, width):
            ids = self._token_ids[start : start + width]
            noisy = chosen[:, start : start + width].to(torch.float64) / temperatures
            values, places = noisy.add_(gumbel_noise(keys, ids)).max(dim=1)
            tokens = torch.where(values > best, places + start, tokens)
            best = torch.maximum(best, values)
        drawn: list[int] = tokens.tolist()
        return drawn

    def _likeliest(self, logits: Tensor) -> Likeliest:
        if self._library is not None:
            return likeliest(self._library, logits)
        return Likeliest(logits.amax(dim=1), logits.argmax(dim=1).tolist())

    def _draw_among(
        self, logits: Tensor, rows: Rows[SamplingRow], some: list[int], num_candidates: int
    ) -> list[int | None]:
        """Draw for truncated rows from their likeliest tokens; None where these may not suffice."""
        params = [rows[index].params for index in some]
        temperatures, chosen = self._temperatures(rows, some), _rows_of(logits, some)
        is_all = num_candidates == self._vocab_size
        likeliest = chosen.sort(dim=1, descending=True) if is_all else chosen.topk(num_candidates)
        ids = likeliest.indices
        values = likeliest.values.to(torch.float64) / temperatures
        masses = (values - values[:, :1]).exp_().cumsum(dim=1)
        # The mass of everything is a pass over the vocabulary; top-k needs that of k tokens.
        needs_whole = any(
            each.top_p < 1.0 and not 0 < each.top_k < self._vocab_size for each in params
        )
        whole = _whole_mass(chosen, temperatures) if needs_whole else masses[:, -1:]
        least = self._least_kept(values, masses, whole, params)
        # Every token of at least this value is kept, so that equal tokens share one fate. What is
        # no candidate is at most the last one: if that one is dropped, so is everything outside.
        kept = values >= least
        drawn = (values + gumbel_noise(self._keys(rows, some), ids)).masked_fill_(~kept, -math.inf)
        tokens = ids.gather(1, drawn.argmax(dim=1, keepdim=True)).squeeze(1).tolist()
        if is_all:
            return list(tokens)
        proven = (~kept[:, -1]).tolist()
        return [token if sure else None for token, sure in zip(tokens, proven, strict=True)]

    def _least_kept(
        self, values: Tensor, masses: Tensor, whole: Tensor, params: list[SamplingParams]
    ) -> Tensor:
        """The lowest kept value of each row, ``[rows, 1]``.

        Args:
            values: Candidates, best first, ``[rows, candidates]``.
            masses: Their cumulative mass, relative to the best one's.
            whole: Mass of the whole vocabulary, ``[rows, 1]``.
            params: One for each row.
        """
        last = values.shape[1] - 1
        top_k = self._column([p.top_k or self._vocab_size for p in params], torch.int64)
        top_p = self._column([p.top_p for p in params])
        min_p = self._column([p.min_p for p in params])
        least = values.gather(1, (top_k - 1).clamp_(max=last))
        least = torch.where(top_k > last, -math.inf, least)
        # Nucleus: the fewest whose mass reaches top_p of what top-k left.
        # A row that is not finite compares with nothing; it must not index with -1.
        num_left = (values >= least).sum(dim=1, keepdim=True).clamp_(min=1)
        mass_left = torch.where(top_k > last, whole, masses.gather(1, num_left - 1))
        num_nucleus = (masses < top_p * mass_left).sum(dim=1, keepdim=True)
        nucleus_least = values.gather(1, num_nucleus.clamp(max=last))
        open_ended = (num_nucleus > last) | (top_p >= 1.0)
        nucleus_least = torch.where(open_ended, -math.inf, nucleus_least)
        relative_least = values[:, :1] + min_p.log()
        return torch.maximum(torch.maximum(least, nucleus_least), relative_least)

    def _temperatures(self, rows: Rows[SamplingRow], some: list[int]) -> Tensor:
        return self._column([rows[index].params.temperature for index in some])

    def _keys(self, rows: Rows[SamplingRow], some: list[int]) -> Tensor:
        keys = [signed(noise_key(rows[i].params.seed, rows[i].position)) for i in some]
        return self._column(keys, torch.int64)

    def _column(self, values: Rows[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device).unsqueeze(1)


def _draws_of(rows: Rows[SamplingRow]) -> Draws:
    from understudy.runtime.model.kernels.sampling import Draw, Draws

    return Draws.of(
        [
            Draw(
                temperature=0.0 if row.is_greedy else row.params.temperature,
                seed=row.params.seed,
                position=row.position,
                top_k=row.params.top_k,
                top_p=row.params.top_p,
                min_p=row.params.min_p,
            )
            for row in rows
        ]
    )


def _winners(
    logits: Tensor, contenders: list[list[int]], temperatures: Tensor, keys: Tensor
) -> list[int]:
    """Of each row's contenders, ascending, the one whose noisy logit is the greatest."""
    width = max(map(len, contenders))
    ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in contenders])
    noisy = logits.gather(1, ids).to(torch.float64) / temperatures + gumbel_noise(keys, ids)
    winners: list[int] = ids.gather(1, noisy.argmax(dim=1, keepdim=True)).squeeze(1).tolist()
    return winners


def _rows_of(logits: Tensor, some: list[int]) -> Tensor:
    return logits if len(some) == len(logits) else logits[some]


def _whole_mass(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Mass of the whole vocabulary relative to the likeliest token's, ``[rows, 1]``, float64.

    Summed by blocks, since torch adds up a lone long row in another order than one of many.
    """
    scaled = (logits - logits.amax(dim=1, keepdim=True)).div_(temperatures.to(torch.float32))
    # Far below, an exponential is a denormal number, which takes a hundred times as long.
    masses = scaled.clamp_(min=_MASS_FLOOR).exp_()
    rows, width = masses.shape
    blocks = F.pad(masses, (0, -width % _SUM_BLOCK)).view(rows, -1, _SUM_BLOCK)
    return blocks.sum(dim=2, dtype=torch.float64).sum(dim=1, keepdim=True)


def _token_logprobs(logprobs: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """The chosen token's log-probability, and the ``num_top`` highest."""
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    top = sorted(
        zip(ids.tolist(), values.tolist(), strict=True), key=lambda each: (-each[1], each[0])
    )
    return TokenLogprobs(logprobs[token].item(), tuple(top))
