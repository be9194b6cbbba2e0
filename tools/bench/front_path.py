"""What Understudy's own path costs: gateway, ZeroMQ, supervisor, ZeroMQ, echo engine, and back.

    python -m understudy.tools.bench.front_path --json tools/bench/results/front_path.json

measures in one run, in turns, a bare aiohttp server (bare_server.py) and ``understudy start
--engine echo`` with one and with two engines, under the same load from the same client. Shown are
medians over the rounds. The README says how each figure is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

import uvloop

from understudy.tools.bench.client import Client
from understudy.tools.bench.load import Exchange, Measurements, run_closed_loop
from understudy.tools.bench.report import make_report, render_table, report_json
from understudy.tools.bench.serve import EXIT_UNAVAILABLE, Unreachable, first_model
from understudy.tools.bench.servers import (
    ROLES,
    Server,
    ServerFailed,
    bare_server,
    echo_cluster,
)
from understudy.tools.bench.statistics import Samples
from understudy.tools.bench.workload import PATHS, LengthRange, RequestBudget, Workload

STREAMS: Final = 64
PACED_TOKENS_PER_S: Final = 50.0
PROMPT_LENGTH: Final = 16
ROUNDS: Final = 3
ROUNDS_MAX: Final = 20
TIMEOUT_S: Final = 30.0
BARE: Final = "bare aiohttp"

Figures = dict[str, float]
"""The figures of one measurement, or their medians, by name with the unit last."""


class Load(NamedTuple):
    """One kind of load."""

    name: str
    title: str
    concurrency: int
    output_length: int
    duration_s: float
    tokens_per_s: float
    """The pace of each stream that the servers keep; 0 is as fast as they can."""


SATURATED: Final = Load("saturated", f"{STREAMS} streams, as fast as it goes", STREAMS, 256, 4.0, 0)
LONE: Final = Load("lone", "requests of one token, one at a time", 1, 1, 0.5, 0)
PACED: Final = Load(
    "paced",
    f"{STREAMS} streams, {PACED_TOKENS_PER_S:g} tokens/s each",
    STREAMS,
    100,
    3.0,
    PACED_TOKENS_PER_S,
)


class Delays:
    """How long each token took from the end of the engine step that made it to the client.

    Both the echo engine and the bare server end their steps at whole multiples of the step's
    length on the machine's monotonic clock, which the client reads too. A token that takes more
    than a whole step counts as if it took that much less.
    """

    def __init__(self, step_s: float) -> None:
        self.samples = Samples()
        self._step_s = step_s

    def record(self, exchange: Exchange) -> None:
        """Take the arrivals of one answer."""
        stream = exchange.stream
        if stream.first_token_at_s is None or exchange.ending.failure is not None:
            return
        at_s = stream.first_token_at_s
        self.samples.add(at_s % self._step_s)
        for gap_s in stream.gaps_s:
            at_s += gap_s
            self.samples.add(at_s % self._step_s)


async def measure(server: Server, load: Load, *, model: str, seed: int) -> Figures:
    """Put a load on a server once.

    Raises:
        ServerFailed: A request failed: figures of a faulty run are worth nothing.
        OSError: The server cannot be reached.
    """
    workload = Workload(
        model=model,
        endpoint="completions",
        prompt_length=LengthRange(PROMPT_LENGTH, PROMPT_LENGTH),
        output_length=LengthRange(load.output_length, load.output_length),
        seed=seed,
    )
    measurements = Measurements()
    delays = Delays(1.0 / load.tokens_per_s) if load.tokens_per_s else None

    def record(exchange: Exchange) -> None:
        measurements.record(exchange)
        if delays is not None:
            delays.record(exchange)

    client = Client(
        server.target,
        PATHS[workload.endpoint],
        connections_max=load.concurrency,
        timeout_s=TIMEOUT_S,
    )
    budget = RequestBudget(num_requests=100_000, duration_s=load.duration_s)
    server_cpu = server.cpu_s_by_role()
    client_cpu_s = time.process_time()
    try:
        await run_closed_loop(client, workload, budget, record, concurrency=load.concurrency)
    finally:
        client.close()
    cpu_s = {role: s - server_cpu.get(role, 0.0) for role, s in server.cpu_s_by_role().items()}
    cpu_s["client"] = time.process_time() - client_cpu_s
    if measurements.errors:
        raise ServerFailed(f"{server.name}: {measurements.error_examples}")
    return _figures(measurements, delays, cpu_s)


def _figures(
    measurements: Measurements, delays: Delays | None, cpu_s: Mapping[str, float]
) -> Figures:
    report = make_report({}, measurements, client_cpu_s=cpu_s["client"])
    figures: Figures = {
        "tokens_per_s": report.per_second(report.output_tokens),
        "tokens_per_arrival": report.tokens_per_arrival or 0.0,
    }
    summaries = {"ttft": report.latencies["ttft_s"], "itl": report.latencies["itl_s"]}
    summaries["delay"] = delays.samples.summary() if delays else None
    for name, summary in summaries.items():
        if summary is not None:
            figures[f"{name}_p50_ms"] = summary.p50 * 1e3
            figures[f"{name}_p99_ms"] = summary.p99 * 1e3
    for role, used_s in cpu_s.items():
        figures[f"{role}_cpu_us_per_token"] = used_s * 1e6 / report.output_tokens
    return figures


def medians(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure over the rounds; a figure that a round lacks counts as 0 there."""
    names = dict.fromkeys(name for figures in rounds for name in figures)
    return {name: statistics.median(f.get(name, 0.0) for f in rounds) for name in names}


Results = dict[str, dict[str, list[Figures]]]
"""Every round's figures, by load and server."""


def run_rounds(num_rounds: int) -> Results:
    """Measure everything, the servers in turns within each round.

    Raises:
        ServerFailed: A server did not come up, or a request failed.
        OSError: A server cannot be reached.
    """
    results: Results = {}
    for tokens_per_s, loads in ((0.0, (SATURATED, LONE)), (PACED_TOKENS_PER_S, (PACED,))):
        with contextlib.ExitStack() as running:
            servers = [running.enter_context(bare_server(BARE, tokens_per_s=tokens_per_s))]
            for count, name in ((1, "understudy, 1 engine"), (2, "understudy, 2 engines")):
                cluster = echo_cluster(name, num_engines=count, tokens_per_s=tokens_per_s)
                servers.append(running.enter_context(cluster))
            for number in range(num_rounds):
                for load in loads:
                    for server in servers:
                        sys.stderr.write(f"round {number + 1}: {load.title}: {server.name}\n")
                        model = first_model(server.target, None) or ""
                        figures = uvloop.run(measure(server, load, model=model, seed=number))
                        by_server = results.setdefault(load.name, {})
                        by_server.setdefault(server.name, []).append(figures)
    return results


def summarise(results: Results) -> dict[str, Any]:
    """The results as JSON values: medians, what they are against the bare server, all rounds."""
    loads: dict[str, Any] = {}
    for load, by_server in results.items():
        bare = medians(by_server[BARE])
        loads[load] = {
            name: {
                "median": medians(rounds),
                "against_bare": against_bare(medians(rounds), bare),
                "rounds": rounds,
            }
            for name, rounds in by_server.items()
        }
    return {
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "aiohttp": metadata.version("aiohttp"),
            "uvloop": metadata.version("uvloop"),
            "pyzmq": metadata.version("pyzmq"),
        },
        "loads": loads,
    }


def against_bare(figures: Figures, bare: Figures) -> Figures:
    """The ratio of throughputs, and each latency less the bare server's."""
    compared = {"tokens_per_s_ratio": figures["tokens_per_s"] / bare["tokens_per_s"]}
    for name, value in figures.items():
        if name.endswith("_ms") and name in bare:
            compared[f"added_{name}"] = value - bare[name]
    return compared


_COLUMNS: Final[Mapping[str, Sequence[tuple[str, str, int]]]] = {
    SATURATED.name: (
        ("tokens/s", "tokens_per_s", 0),
        ("of bare", "tokens_per_s_ratio", 2),
        ("tokens/read", "tokens_per_arrival", 2),
    ),
    LONE.name: (
        ("TTFT p50 ms", "ttft_p50_ms", 2),
        ("added", "added_ttft_p50_ms", 2),
        ("p99", "ttft_p99_ms", 2),
        ("added", "added_ttft_p99_ms", 2),
    ),
    PACED.name: (
        ("delay p50 ms", "delay_p50_ms", 2),
        ("added", "added_delay_p50_ms", 2),
        ("p99", "delay_p99_ms", 2),
        ("added", "added_delay_p99_ms", 2),
        ("ITL p50", "itl_p50_ms", 2),
        ("p99", "itl_p99_ms", 2),
        ("TTFT p50", "ttft_p50_ms", 2),
        ("added", "added_ttft_p50_ms", 2),
        ("tokens/s", "tokens_per_s", 0),
    ),
}
_CPU_COLUMNS: Final = tuple(
    (f"{role} us", f"{role}_cpu_us_per_token", 1) for role in ("client", "other", *ROLES)
)


def render(summary: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    parts: list[str] = []
    for load in (SATURATED, PACED, LONE):
        columns = [*_COLUMNS[load.name], *(() if load is LONE else _CPU_COLUMNS)]
        rows = []
        for name, result in summary["loads"][load.name].items():
            figures = result["median"] | result["against_bare"]
            cells = [
                f"{figures[key]:,.{digits}f}" if key in figures else "-"
                for _, key, digits in columns
            ]
            rows.append((name, *cells))
        parts.append(render_table((load.title, *(heading for heading, _, _ in columns)), rows))
    return "\n\n".join(parts)


def main() -> int:
    """Measure, print the tables, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m understudy.tools.bench.front_path",
        description="Measure Understudy's own path against a bare aiohttp server.",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        choices=range(1, ROUNDS_MAX + 1),
        metavar="N",
        help=f"1 to {ROUNDS_MAX} (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here as well")
    arguments = parser.parse_args()
    try:
        summary = summarise(run_rounds(arguments.rounds))
    except (ServerFailed, Unreachable, OSError) as error:
        sys.stderr.write(f"front_path: {error}\n")
        return EXIT_UNAVAILABLE
    sys.stdout.write(render(summary) + "\n")
    if arguments.json is not None:
        arguments.json.write_text(report_json(summary), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
