"""The log probabilities of an output that a journal has kept. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import overload

from understudy.protocol.packed_logprobs import split_logprobs


class KeptLogprobs(Sequence[bytes]):
    """Those of each token, as ``pack_logprobs`` has packed them, taken apart when somebody looks.

    Hardly anybody joins a stream that has ended, and a supervisor that starts anew has thousands.
    """

    def __init__(self, joined: bytes) -> None:
        self._joined = joined

    def __len__(self) -> int:
        return len(self._split)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[bytes, ...]: ...
    def __getitem__(self, index: int | slice) -> bytes | tuple[bytes, ...]:
        return self._split[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._split == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _split(self) -> tuple[bytes, ...]:
        return split_logprobs(self._joined)
