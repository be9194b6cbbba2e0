"""``understudy bench serve``: load a server with streams, and say how it bore it.

Imports the heavy parts only when it runs, since the command line loads this module for its flags.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, Final

from understudy.tools.bench import flags
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
    from understudy.tools.bench.workload import Workload

DEFAULT_BASE_URL: Final = "http://127.0.0.1:8000"
DEFAULT_CONCURRENCY: Final = 16
DEFAULT_NUM_REQUESTS: Final = 200
DEFAULT_DURATION_S: Final = 600.0
REQUEST_TIMEOUT_S: Final = 300.0
PREFLIGHT_TIMEOUT_S: Final = 10.0

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 69


class Unreachable(Exception):
    """The server cannot be reached or does not say which model it serves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``understudy bench serve``."""
    parser.description = "Load a server with streaming requests and measure it."
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", default=DEFAULT_BASE_URL, metavar="URL", help="default: %(default)s"
    )
    server.add_argument("--model", help="default: the first that the server lists")
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    server.add_argument("--endpoint", choices=tuple(PATHS), default="completions")
    load = parser.add_argument_group("load")
    pace = load.add_mutually_exclusive_group()
    pace.add_argument(
        "--concurrency",
        type=flags.count(CONCURRENCY_MAX),
        metavar="N",
        help=f"closed loop: N requests at a time (default: {DEFAULT_CONCURRENCY})",
    )
    pace.add_argument(
        "--rate",
        type=flags.positive(RATE_MAX),
        metavar="R",
        help="open loop: R requests/s, arriving as a Poisson process",
    )
    load.add_argument(
        "--num-requests",
        type=flags.count(REQUESTS_MAX),
        metavar="N",
        help=f"stop after N (default: {DEFAULT_NUM_REQUESTS}, or no limit with --duration)",
    )
    load.add_argument(
        "--duration",
        type=flags.positive(DURATION_S_MAX),
        metavar="S",
        help="send nothing new after S seconds; what is under way may end (default: 600)",
    )
    shape = parser.add_argument_group("requests")
    shape.add_argument(
        "--prompt-length",
        type=flags.length,
        default=LengthRange(128, 128),
        metavar="N[-M]",
        help="tokens, or words with --endpoint chat (default: %(default)s)",
    )
    shape.add_argument(
        "--output-length",
        type=flags.length,
        default=LengthRange(128, 128),
        metavar="N[-M]",
        help="tokens asked for (default: %(default)s)",
    )
    shape.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="the first N of the prompt are the same in all (default: 0)",
    )
    shape.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=argparse.SUPPRESS,
    )
    shape.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.epilog = (
        "And --seed N (0), --no-ignore-eos: answers may end before the length asked for."
    )
    flags.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the load and report: 0, or 1 if any request failed, 2 on usage, 69 without a server."""
    problem = usage_problem(arguments)
    if problem is not None:
        return _complain(problem, EXIT_USAGE)
    # Heavy imports wait until a load is really to be run.
    import uvloop

    from understudy.tools.bench.client import Target
    from understudy.tools.bench.report import (
        render_report,
        report_json,
        report_object,
    )

    try:
        target = Target.parse(arguments.base_url)
    except ValueError as error:
        return _complain(f"--base-url: {error}", EXIT_USAGE)
    try:
        listed = first_model(target, arguments.api_key)
        model = arguments.model or listed
        if model is None:
            raise Unreachable(f"{arguments.base_url} lists no model: name one with --model")
        report = uvloop.run(measure(arguments, target, model))
    except (Unreachable, OSError) as error:
        return _complain(f"cannot reach {arguments.base_url}: {error}", EXIT_UNAVAILABLE)
    sys.stdout.write(render_report(report) + "\n")
    if arguments.json is not None:
        try:
            arguments.json.write_text(report_json(report_object(report)), encoding="utf-8")
        except OSError as error:
            return _complain(f"--json: {error}", EXIT_FAILED)
    return EXIT_FAILED if report.requests_failed else 0


def usage_problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with flags that are right each by itself."""
    if not 0 <= arguments.shared_prefix <= arguments.prompt_length.low:
        return "--shared-prefix: it is a part of --prompt-length, so at most its lower end"
    key = arguments.api_key
    if key is not None and not (key.isascii() and key.isprintable()):
        return "--api-key: it holds characters that a header cannot"
    return flags.json_problem(arguments.json)


def _complain(problem: str, status: int) -> int:
    sys.stderr.write(f"understudy bench serve: {problem}\n")
    return status


def first_model(target: Target, api_key: str | None) -> str | None:
    """Ask the server for its models; None where it lists none.

    Raises:
        Unreachable: It answers with something that is no HTTP, or refuses the key.
        OSError: It cannot be reached.
    """
    import http.client

    import msgspec

    kind = http.client.HTTPSConnection if target.is_tls else http.client.HTTPConnection
    connection = kind(target.host, target.port, timeout=PREFLIGHT_TIMEOUT_S)
    try:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        connection.request("GET", f"{target.path_prefix}/v1/models", headers=headers)
        response = connection.getresponse()
        body = response.read()
    except http.client.HTTPException as error:
        raise Unreachable(f"it speaks no HTTP: {error!r}") from error
    finally:
        connection.close()
    if response.status in (401, 403):
        raise Unreachable(f"it answers {response.status}: give a key with --api-key")
    try:
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (msgspec.DecodeError, KeyError, IndexError, TypeError):
        return None


async def measure(arguments: argparse.Namespace, target: Target, model: str) -> ServeReport:
    """Run the load that the flags describe.

    Raises:
        OSError: The server cannot be reached.
    """
    import time

    from understudy.tools.bench.client import Client
    from understudy.tools.bench.load import (
        Measurements,
        run_closed_loop,
        run_open_loop,
    )
    from understudy.tools.bench.report import make_report
    from understudy.tools.bench.workload import (
        RequestBudget,
        Workload,
        poisson_arrivals,
    )

    workload = Workload(
        model=model,
        endpoint=arguments.endpoint,
        prompt_length=arguments.prompt_length,
        output_length=arguments.output_length,
        shared_prefix=arguments.shared_prefix,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )
    default_count = DEFAULT_NUM_REQUESTS if arguments.duration is None else REQUESTS_MAX
    budget = RequestBudget(
        num_requests=arguments.num_requests or default_count,
        duration_s=arguments.duration or DEFAULT_DURATION_S,
    )
    client = Client(
        target,
        PATHS[workload.endpoint],
        api_key=arguments.api_key,
        connections_max=CONCURRENCY_MAX,
        timeout_s=REQUEST_TIMEOUT_S,
    )
    measured = Measurements()
    cpu_began_s = time.process_time()
    try:
        if arguments.rate is None:
            concurrency = arguments.concurrency or DEFAULT_CONCURRENCY
            pace = f"closed, {concurrency} at a time"
            await run_closed_loop(
                client, workload, budget, measured.record, concurrency=concurrency
            )
        else:
            pace = f"open, {arguments.rate:g} requests/s"
            arrivals = poisson_arrivals(rate=arguments.rate, seed=arguments.seed)
            await run_open_loop(client, workload, budget, measured.record, arrivals=arrivals)
    finally:
        client.close()
    settings = {"base_url": arguments.base_url, "loop": pace, **_settings_of(workload)}
    return make_report(settings, measured, client_cpu_s=time.process_time() - cpu_began_s)


def _settings_of(workload: Workload) -> dict[str, Any]:
    return {
        "model": workload.model,
        "endpoint": workload.endpoint,
        "prompt_length": str(workload.prompt_length),
        "output_length": str(workload.output_length),
        "shared_prefix": workload.shared_prefix,
        "ignore_eos": workload.ignore_eos,
        "seed": workload.seed,
    }
