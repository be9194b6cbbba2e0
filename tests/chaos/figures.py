"""What every scenario measures by: figures, sizes, and how a comparison is told."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from types import MappingProxyType
from typing import Final, NamedTuple

from tests.chaos.clients import Call, Comparison

ECHO_RATE: Final = "--echo-tokens-per-s=60"
CLIENTS: Final = 50


class Figure(NamedTuple):
    """A line of the table."""

    name: str
    what: str
    measured: str
    wanted: str
    is_right: bool
    """Whether everything but its times is as wanted."""
    is_in_time: bool = True

    @property
    def is_met(self) -> bool:
        """Whether all of it is as wanted."""
        return self.is_right and self.is_in_time


class Size(NamedTuple):
    """How much of it: the short run shows that it works, the long one measures it."""

    clients: int
    max_tokens: int
    repeats: int
    engine: str
    seed: int
    resumes: int = 50
    """Requests that must have gone on elsewhere before random kills end, and about the number of
    deaths at chosen steps."""
    pause_s: float = 0.0
    """Between two rounds of random kills."""
    minutes: float = 1.0
    """Of the soak."""
    settings: Mapping[str, str] = MappingProxyType({})
    """Of the clusters that run this kind of engine, as the environment names them."""

    @property
    def kind(self) -> str:
        """What engines it is about, for the table."""
        named = ((name.partition("_")[2].lower(), value) for name, value in self.settings.items())
        return ", ".join((self.engine, *(f"{name}={value}" for name, value in named)))


def told(comparison: Comparison) -> str:
    text = (
        f"{comparison.num_failed} failed, {comparison.num_changed} changed,"
        f" {comparison.num_repeated} repeated of {comparison.num_calls};"
        f" added stall p99 {comparison.added_stall_p99_s:.2f} s"
    )
    return text + "".join(f"\n      {problem}" for problem in comparison.problems)


def merge(comparisons: list[Comparison]) -> Comparison:
    return Comparison(
        num_calls=sum(one.num_calls for one in comparisons),
        num_failed=sum(one.num_failed for one in comparisons),
        num_changed=sum(one.num_changed for one in comparisons),
        num_repeated=sum(one.num_repeated for one in comparisons),
        num_joins=sum(one.num_joins for one in comparisons),
        added_stalls_s=tuple(chain.from_iterable(one.added_stalls_s for one in comparisons)),
        problems=tuple(chain.from_iterable(one.problems for one in comparisons))[:3],
    )


def begun(calls: list[Call]) -> int:
    """So many events are told when all streams are under way."""
    return 4 * len(calls)
