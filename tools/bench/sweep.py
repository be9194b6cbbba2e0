"""``understudy bench sweep``: one load after another against a running server, a row for each.

Imports the heavy parts only when it runs, since the command line loads this module for its flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from understudy.tools.bench import flags, serve
from understudy.tools.bench.workload import (
    CONCURRENCY_MAX,
    DURATION_S_MAX,
    PATHS,
    RATE_MAX,
    REQUESTS_MAX,
    LengthRange,
)

if TYPE_CHECKING:
    from understudy.tools.bench.client import Target
    from understudy.tools.bench.report import ServeReport

DEFAULT_CONCURRENCIES: Final = (1, 2, 4, 8, 16, 32)
DEFAULT_DURATION_S: Final = 10.0
_LATENCIES: Final = ("ttft_s", "itl_s", "e2e_s")
_PERCENTILES: Final = ("p50", "p99")


class Point(NamedTuple):
    """One load of a sweep: one of the two is set."""

    concurrency: int | None
    rate: float | None

    @property
    def name(self) -> str:
        """What a row of the table is called."""
        return f"{self.rate:g}/s" if self.rate is not None else f"{self.concurrency}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``understudy bench sweep``."""
    parser.description = "Put one load after another on a server, and measure each."
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", default=serve.DEFAULT_BASE_URL, metavar="URL", help="default: %(default)s"
    )
    server.add_argument("--model", help="default: the first that the server lists")
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    server.add_argument("--endpoint", choices=tuple(PATHS), default="completions")
    load = parser.add_argument_group("loads")
    pace = load.add_mutually_exclusive_group()
    pace.add_argument(
        "--concurrency",
        type=flags.several(flags.count(CONCURRENCY_MAX)),
        metavar="N,N,...",
        help="closed loops (default: 1,2,4,8,16,32)",
    )
    pace.add_argument(
        "--rate",
        type=flags.several(flags.positive(RATE_MAX)),
        metavar="R,R,...",
        help="open loops, requests/s",
    )
    load.add_argument(
        "--duration",
        type=flags.positive(DURATION_S_MAX),
        default=DEFAULT_DURATION_S,
        metavar="S",
        help="of each load; what is under way then may end (default: 10)",
    )
    shape = parser.add_argument_group("requests")
    for name in ("prompt", "output"):
        shape.add_argument(
            f"--{name}-length",
            type=flags.length,
            default=LengthRange(128, 128),
            metavar="N[-M]",
            help="default: %(default)s",
        )
    shape.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="the first N of the prompt are the same in all of a load (default: 0)",
    )
    flags.add_json(parser)


def points(arguments: argparse.Namespace) -> list[Point]:
    """The loads that the flags name."""
    if arguments.rate is not None:
        return [Point(None, rate) for rate in arguments.rate]
    return [Point(number, None) for number in arguments.concurrency or DEFAULT_CONCURRENCIES]


def run(arguments: argparse.Namespace) -> int:
    """Run the loads: 0, or 1 if any request failed, 2 on usage, 69 without a server."""
    problem = serve.usage_problem(arguments)
    if problem is not None:
        return _complain(problem, serve.EXIT_USAGE)
    from understudy.tools.bench.client import Target
    from understudy.tools.bench.report import render_table, report_json, report_object

    reports: list[tuple[Point, ServeReport]] = []
    try:
        target = Target.parse(arguments.base_url)
    except ValueError as error:
        return _complain(f"--base-url: {error}", serve.EXIT_USAGE)
    try:
        model = arguments.model or serve.first_model(target, arguments.api_key)
        if model is None:
            raise serve.Unreachable(f"{arguments.base_url} lists no model: name one with --model")
        for number, point in enumerate(points(arguments)):
            reports.append((point, _measure(arguments, target, model, point, seed=number)))
            sys.stderr.write(f"{point.name}: {reports[-1][1].requests_completed} requests\n")
    except (serve.Unreachable, OSError) as error:
        return _complain(f"cannot reach {arguments.base_url}: {error}", serve.EXIT_UNAVAILABLE)
    rows = [table_row(point, report_object(report)) for point, report in reports]
    sys.stdout.write(render_table(headings(), rows) + "\n")
    if arguments.json is not None:
        objects = [{"load": point._asdict(), **report_object(r)} for point, r in reports]
        try:
            arguments.json.write_text(report_json({"points": objects}), encoding="utf-8")
        except OSError as error:
            return _complain(f"--json: {error}", serve.EXIT_FAILED)
    return serve.EXIT_FAILED if any(report.requests_failed for _, report in reports) else 0


def _measure(
    arguments: argparse.Namespace, target: Target, model: str, point: Point, *, seed: int
) -> ServeReport:
    """Run one load; each has prompts of its own, or the server's cache would know them."""
    import uvloop

    of_point = {**vars(arguments), **point._asdict(), "seed": seed}
    of_point |= {"ignore_eos": True, "num_requests": REQUESTS_MAX}
    return uvloop.run(serve.measure(argparse.Namespace(**of_point), target, model))


def headings() -> Sequence[str]:
    """Those of the table; latencies in ms."""
    names = [name.removesuffix("_s").upper() for name in _LATENCIES]
    latencies = [f"{name} {percentile}" for name in names for percentile in _PERCENTILES]
    return ("load", "done", "failed", "tokens/s", *latencies)


def table_row(point: Point, figures: Mapping[str, Any]) -> Sequence[str]:
    """One load's row, from its report as JSON values."""
    cells = [point.name, f"{figures['requests']['completed']:,}"]
    cells += [f"{figures['requests']['failed']:,}", f"{figures['tokens']['output_per_s']:,.1f}"]
    for name in _LATENCIES:
        summary = figures["latencies"][name]
        for percentile in _PERCENTILES:
            cells.append("-" if summary is None else f"{summary[percentile] * 1000:,.1f}")
    return cells


def _complain(problem: str, status: int) -> int:
    sys.stderr.write(f"understudy bench sweep: {problem}\n")
    return status
