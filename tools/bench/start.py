"""``understudy bench start``: from the start of a process to readiness and to the first token.

Each start is a whole node in a run directory of its own, on loopback. *Warm* starts find the
model's files in the page cache. Before a *cold* one they are dropped from it, as far as a user can:
posix_fadvise(2) drops pages that nobody has mapped. What is left is looked for with reads that may
not wait (preadv2(2)), and told as ``resident``. Python and its libraries stay where they are.

Imports the heavy parts only when it runs, since the command line loads this module for its flags.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from understudy.tools.bench import flags

if TYPE_CHECKING:
    from understudy.tools.bench.client import Target

STARTS_MAX: Final = 1_000
START_TIMEOUT_S: Final = 600.0
REQUEST_TIMEOUT_S: Final = 300.0
CACHES: Final = ("warm", "cold")
_SETTINGS: Final = {
    "model": "directory of the model; default: the bundled one",
    "dtype": "format of weights",
    "quantization": "none, int8 or int4",
    "numerics": "exact or fast",
    "device": "auto, cpu or cuda",
    "threads": "of an engine; default: its share",
    "data_parallel_size": "number of engines (1)",
    "kv_cache_memory": "KV cache of each engine, as 2GiB",
}
_PROBES_PER_FILE: Final = 64
_PAGE_BYTES: Final = 4096
_PROMPT: Final = tuple(range(100, 116))
_EXIT_FAILED: Final = 1
_EXIT_USAGE: Final = 2


class Start(NamedTuple):
    """One start, in seconds from the start of the process."""

    cache: str
    resident: float | None
    """The share of the model's bytes in the page cache before; None where the system tells not."""
    ready_s: float
    first_token_s: float
    """The request goes out once the node is ready."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``understudy bench start``."""
    parser.description = "Start a node again and again, and measure how long it takes."
    for name, words in _SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="X", help=words)
    parser.add_argument(
        "--num-starts",
        type=flags.count(STARTS_MAX),
        default=3,
        metavar="N",
        help="of each kind (default: 3)",
    )
    parser.add_argument(
        "--cache",
        choices=(*CACHES, "both"),
        default="both",
        help="whether the model's files are in the page cache (default: both, in turns)",
    )
    flags.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Start and measure: 0, 1 if a node did not come up, 2 on usage, 78 on configuration."""
    problem = flags.json_problem(arguments.json)
    if problem is not None:
        return _complain(problem, _EXIT_USAGE)
    from understudy.tools.bench.report import render_table, report_json
    from understudy.tools.bench.servers import ServerFailed, end_in_order_on_sigterm
    from understudy.tools.configuration import settle_with_model

    given = {name: getattr(arguments, name) for name in _SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    # Mistakes are told once and at once, and not in the words of a node that did not come up.
    model = settle_with_model(given).values["model"]
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    caches = CACHES if arguments.cache == "both" else (arguments.cache,)
    starts: list[Start] = []
    end_in_order_on_sigterm()
    try:
        for _ in range(arguments.num_starts):
            for cache in caches:
                starts.append(_start_once(cache, model, words))
                sys.stderr.write(f"{cache}: ready after {starts[-1].ready_s:.2f} s\n")
    except (ServerFailed, OSError) as error:
        return _complain(str(error), _EXIT_FAILED)
    sys.stdout.write(render_table(HEADINGS, table_rows(starts)) + "\n")
    if arguments.json is not None:
        figures = {
            "settings": {"model": model.name, **{k: v for k, v in given.items() if k != "model"}},
            "medians": medians(starts),
            "starts": [start._asdict() for start in starts],
        }
        try:
            arguments.json.write_text(report_json(figures), encoding="utf-8")
        except OSError as error:
            return _complain(f"--json: {error}", _EXIT_FAILED)
    return 0


HEADINGS: Final = ("page cache", "starts", "resident", "ready s", "first token s", "slowest s")


def medians(starts: Sequence[Start]) -> dict[str, Mapping[str, Any]]:
    """The figures of each kind of start, in the order in which they first came."""
    found: dict[str, Mapping[str, Any]] = {}
    for cache in dict.fromkeys(start.cache for start in starts):
        of_kind = [start for start in starts if start.cache == cache]
        known = [start.resident for start in of_kind if start.resident is not None]
        found[cache] = {
            "starts": len(of_kind),
            "resident": statistics.median(known) if known else None,
            "ready_s": statistics.median(start.ready_s for start in of_kind),
            "first_token_s": statistics.median(start.first_token_s for start in of_kind),
            "first_token_s_max": max(start.first_token_s for start in of_kind),
        }
    return found


def table_rows(starts: Sequence[Start]) -> list[Sequence[str]]:
    """A row for each kind of start."""
    return [
        (
            cache,
            f"{figures['starts']}",
            "-" if figures["resident"] is None else f"{figures['resident']:.0%}",
            f"{figures['ready_s']:.2f}",
            f"{figures['first_token_s']:.2f}",
            f"{figures['first_token_s_max']:.2f}",
        )
        for cache, figures in medians(starts).items()
    ]


def _start_once(cache: str, model: Path, words: Sequence[str]) -> Start:
    """One node, to its first token and no further.

    Raises:
        ServerFailed: It did not come up, or did not answer.
    """
    import asyncio
    import time

    from understudy.tools.bench.servers import started_node

    files = [path for path in sorted(model.iterdir()) if path.is_file()]
    for path in files:
        if cache == "cold":
            drop_from_cache(path)
        else:
            # Read in chunks, so that a large model does not need its size in memory twice.
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
    resident = resident_share(files)
    began_s = time.monotonic()
    with started_node(words, timeout_s=START_TIMEOUT_S) as node:
        ready_at_s = time.monotonic()
        first_at_s = asyncio.run(_first_token_at_s(node.target))
    return Start(cache, resident, ready_at_s - began_s, first_at_s - began_s)


async def _first_token_at_s(target: Target) -> float:
    """Ask for one token; when it came, on the monotonic clock."""
    import msgspec

    from understudy.tools.bench.client import Client
    from understudy.tools.bench.events import CompletionStream
    from understudy.tools.bench.serve import first_model
    from understudy.tools.bench.servers import ServerFailed
    from understudy.tools.bench.workload import PATHS

    body = {"model": first_model(target, None), "prompt": _PROMPT, "max_tokens": 1, "stream": True}
    client = Client(target, PATHS["completions"], connections_max=1, timeout_s=REQUEST_TIMEOUT_S)
    stream = CompletionStream()
    try:
        ending = await client.complete(msgspec.json.encode(body), stream, expected_tokens=None)
    finally:
        client.close()
    if ending.failure is not None:
        raise ServerFailed(f"the first request failed: {ending.failure.detail}")
    # A first token that ends the answer at once may bring no text: then the end is what came.
    return stream.first_token_at_s or ending.ended_at_s


def drop_from_cache(path: Path) -> None:
    """Ask the system to forget a file's pages; those that are mapped somewhere stay."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(files: Sequence[Path]) -> float | None:
    """The share of the files' bytes in the page cache, by a sample of the pages of each.

    None where the system or the file system cannot read without waiting.
    """
    num_bytes = 0
    num_resident = 0.0
    for path in files:
        size = path.stat().st_size
        share = _resident_share_of(path, size)
        if share is None:
            return None
        num_bytes += size
        num_resident += share * size
    return num_resident / num_bytes if num_bytes else None


def _resident_share_of(path: Path, size: int) -> float | None:
    num_pages = -(-size // _PAGE_BYTES)
    probes = range(0, num_pages, max(1, num_pages // _PROBES_PER_FILE))
    num_resident = 0
    with path.open("rb") as file:
        for page in probes:
            buffer = bytearray(1)
            try:
                flag = os.RWF_NOWAIT
                num_resident += os.preadv(file.fileno(), [buffer], page * _PAGE_BYTES, flag)
            except BlockingIOError:
                continue
            except (AttributeError, OSError):
                return None
    return num_resident / len(probes) if probes else 1.0


def _complain(problem: str, status: int) -> int:
    sys.stderr.write(f"understudy bench start: {problem}\n")
    return status
