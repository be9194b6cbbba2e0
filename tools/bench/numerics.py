"""What exact numerics cost: ``python -m understudy.tools.bench.numerics``.

The same closed load on the same machine, in turns: one engine with ``--numerics exact``, then one
with ``--numerics fast``. The ratio of their goodputs is the price of the same bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Final

from understudy.tools.bench.front_path import Load, measure
from understudy.tools.bench.servers import ServerFailed, cluster

MODEL: Final = "understudy-demo"
CLASSES: Final = ("exact", "fast")
_SEED: Final = 20


def run_rounds(num_rounds: int, load: Load) -> dict[str, list[float]]:
    """Output tokens a second, by class of numerics, of each round.

    Raises:
        ServerFailed: a server did not come up, or a request failed.
    """
    found: dict[str, list[float]] = {numerics: [] for numerics in CLASSES}
    for number in range(num_rounds):
        for numerics in CLASSES:
            print(f"round {number + 1}: {numerics}", file=sys.stderr)
            with cluster(numerics, num_engines=1, flags=(f"--numerics={numerics}",)) as server:
                warm_up = load._replace(duration_s=1.0)
                asyncio.run(measure(server, warm_up, model=MODEL, seed=_SEED))
                figures = asyncio.run(measure(server, load, model=MODEL, seed=_SEED + number))
            found[numerics].append(figures["tokens_per_s"])
    return found


def summarise(found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the cost of exactness: how much longer the same work takes."""
    medians = {numerics: statistics.median(rates) for numerics, rates in found.items()}
    return {
        "tokens_per_s": medians,
        "cost": medians["fast"] / medians["exact"],
        "rounds": found,
    }


def main() -> int:
    """Measure and print; 1 if a server failed."""
    parser = argparse.ArgumentParser(prog="python -m understudy.tools.bench.numerics")
    parser.add_argument("--streams", type=int, default=8, help="at once (8)")
    parser.add_argument("--rounds", type=int, default=3, help="of each class (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here as well")
    arguments = parser.parse_args()
    name = f"{arguments.streams} streams"
    load = Load("numerics", name, arguments.streams, 128, 10.0, 0)
    try:
        summary = summarise(run_rounds(arguments.rounds, load))
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    for numerics, rate in summary["tokens_per_s"].items():
        print(f"{numerics:6} {rate:8.1f} tokens/s at {name}")
    print(f"exact numerics take {summary['cost']:.3f} times as long")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"streams": arguments.streams, **summary}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
