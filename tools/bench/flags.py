"""Readers for the benchmarks' flags. Pure, and cheap to import: the command line loads this.

Each raises what argparse turns into a usage error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from understudy.tools.bench.workload import LengthRange

N = TypeVar("N", int, float)
T = TypeVar("T")

LIST_ITEMS_MAX: Final = 64


class Number(Generic[N]):
    """Reads a flag's number within limits."""

    def __init__(self, description: str, kind: Callable[[str], N], low: float, high: float) -> None:
        self._description = description
        self._kind: Callable[[str], N] = kind
        self._low = low
        self._high = high

    def __call__(self, text: str) -> N:
        """The number, or a usage error."""
        problem = argparse.ArgumentTypeError(f"{text!r} is not {self._description}")
        try:
            value = self._kind(text)
        except ValueError:
            raise problem from None
        # Written so that a NaN is refused as well.
        if not self._low <= value <= self._high:
            raise problem
        return value


def count(limit: int) -> Number[int]:
    """A whole number from 1."""
    return Number(f"a whole number from 1 to {limit}", int, 1, limit)


def positive(limit: float) -> Number[float]:
    """A number above 0."""
    return Number(f"a number above 0, at most {limit:g}", float, sys.float_info.min, limit)


def length(text: str) -> LengthRange:
    """``128`` or ``64-256``."""
    try:
        return LengthRange.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def several(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """``1,2,4``: items in the order given, none twice."""

    def read_all(text: str) -> tuple[T, ...]:
        items = tuple(read(word.strip()) for word in text.split(","))
        if len(items) > LIST_ITEMS_MAX:
            raise argparse.ArgumentTypeError(f"{len(items)} items; at most {LIST_ITEMS_MAX}")
        if len(set(items)) < len(items):
            raise argparse.ArgumentTypeError(f"{text!r} names something twice")
        return items

    return read_all


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")


def json_problem(path: Path | None) -> str | None:
    """What is wrong with ``--json``, before anything is measured for it."""
    if path is not None and not path.absolute().parent.is_dir():
        return f"--json: no directory {path.parent}"
    return None
