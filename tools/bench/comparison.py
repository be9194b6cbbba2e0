"""What the rounds of a comparison come to: medians, ratios, tables. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from understudy.tools.bench.columns import Column
from understudy.tools.bench.report import render_table

OURS: Final = "understudy"


class Round(NamedTuple):
    """What one engine did in one round."""

    engine: str
    rates: Mapping[str, float]
    """Tokens/s by the columns' names."""
    start_s: float
    """From the start of its process to its first answer of one token."""
    restart_s: float
    """The same once more after the last column, when all that it reads was just in use."""
    memory_gb: float
    """Of all its processes, after the last column."""


class Line(NamedTuple):
    """An engine's medians."""

    engine: str
    rates: Mapping[str, float]
    start_s: float
    restart_s: float
    memory_gb: float


def medians(rounds: Sequence[Round]) -> list[Line]:
    """A line for each engine, in the order in which they first came."""
    lines: list[Line] = []
    for engine in dict.fromkeys(done.engine for done in rounds):
        own = [done for done in rounds if done.engine == engine]
        names = dict.fromkeys(name for done in own for name in done.rates)
        rates = {
            name: statistics.median(done.rates[name] for done in own if name in done.rates)
            for name in names
        }
        start_s = statistics.median(done.start_s for done in own)
        restart_s = statistics.median(done.restart_s for done in own)
        memory_gb = statistics.median(done.memory_gb for done in own)
        lines.append(Line(engine, rates, start_s, restart_s, memory_gb))
    return lines


def ratios(lines: Sequence[Line]) -> dict[str, dict[str, dict[str, float]]]:
    """By each engine of ours, by each other one: its rates divided by ours. Above 1 it is faster.

    Starts and memory are ratios too; there, above 1 it takes more.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ours in lines:
        if not is_ours(ours.engine):
            continue
        found[ours.engine] = {
            line.engine: {
                name: mine / _flat(ours)[name]
                for name, mine in _flat(line).items()
                if _flat(ours).get(name)
            }
            for line in lines
            if line.engine != ours.engine
        }
    return found


def is_ours(engine: str) -> bool:
    """Whether this is Understudy, in whatever variant."""
    return engine == OURS or engine.startswith(f"{OURS}-")


def _flat(line: Line) -> dict[str, float]:
    return {
        **line.rates,
        "start": line.start_s,
        "restart": line.restart_s,
        "memory": line.memory_gb,
    }


def render(lines: Sequence[Line], columns: Sequence[Column]) -> str:
    """The table of medians, and one of ratios for each engine of ours."""
    titles = (column.title for column in columns)
    headings = ("tokens/s", *titles, "start s", "restart s", "memory GB")
    rows = [
        (
            line.engine,
            *(_cell(line.rates.get(column.name)) for column in columns),
            f"{line.start_s:.1f}",
            f"{line.restart_s:.1f}",
            f"{line.memory_gb:.1f}",
        )
        for line in lines
    ]
    tables = [render_table(headings, rows)]
    names = [*(column.name for column in columns), "start", "restart", "memory"]
    for ours, by_engine in ratios(lines).items():
        ratio_rows = [
            (engine, *(f"{found[name]:.2f}" if name in found else "-" for name in names))
            for engine, found in by_engine.items()
        ]
        if ratio_rows:
            tables.append(render_table((f"÷ {ours}", *names), ratio_rows))
    return "\n\n".join(tables)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def as_object(
    rounds: Sequence[Round], columns: Sequence[Column], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything as JSON values."""
    lines = medians(rounds)
    return {
        **settings,
        "num_rounds": max(Counter(done.engine for done in rounds).values()),
        "columns": [column._asdict() for column in columns],
        "medians": [line._asdict() for line in lines],
        "ratios": ratios(lines),
        "rounds": [done._asdict() for done in rounds],
    }
