"""Measure the journal: ns and bytes for each token, and how long a large one takes to recover.

Run it with ``python -m understudy.tools.bench.journal``. The load is a full batch in which every
request has the same length and a new one takes the place of each that ends, so that the batch
changes every few steps, as it does in service. Only the journal's own calls are timed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from understudy.protocol.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.storage.disk import OsDisk
from understudy.runtime.storage.image import Image, Retention
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.records import Admit, Assign, Record, Step, frame, pack_admit
from understudy.runtime.storage.segment_writer import SyncPolicy
from understudy.runtime.storage.steps import write_steps

VOCABULARY: Final = 128_000
_STEP_S: Final = 0.02
_TURNS_A_PART: Final = 64
_GROWTH_BYTES_MAX: Final = 1 << 62


class Turn(NamedTuple):
    """What one turn of a supervisor appends."""

    records: list[Record]
    num_tokens: int


class Cost(NamedTuple):
    """What a token cost."""

    ns_mean: float
    ns_best: float
    """In the quickest of many equal parts: nearest to what a quiet core takes."""
    num_bytes: float


def turns(*, batch: int, prompt_tokens: int, output_tokens: int, seed: int) -> Iterator[Turn]:
    """An endless load of full batches; requests end one after the other, evenly spread."""
    source = random.Random(seed)  # noqa: S311 - a load, not a secret
    tokens = [(source.randrange(VOCABULARY),) for _ in range(output_tokens)]
    hashes = [0]
    for token in tokens:
        hashes.append(extend_prefix_hash(hashes[-1], token))
    prompt = tuple(source.randrange(VOCABULARY) for _ in range(prompt_tokens))
    params = SamplingParams(seed=seed, max_tokens=output_tokens)
    running: dict[int, int] = {}
    lasts: dict[int, int] = {}
    stop = int(FinishReason.STOP)
    # The first ones end at different times, and so does everybody after them.
    first_lasts = [(i + 1) * output_tokens // batch - 1 for i in range(batch)]
    while True:
        records: list[Record] = []
        while len(running) < batch:
            request_id = source.getrandbits(63)
            running[request_id] = 0
            lasts[request_id] = first_lasts.pop() if first_lasts else output_tokens - 1
            records.append(Admit(Request(request_id, request_id, prompt, params), "g-0", 0.0))
            records.append(Assign(request_id, 1, "engine-0", 1))
        rows = []
        for request_id, at in list(running.items()):
            finish = stop if at == lasts[request_id] else 0
            rows.append(TokenRow(request_id, 1, at, tokens[at], hashes[at + 1], finish))
            running[request_id] = at + 1
            if finish:
                del running[request_id], lasts[request_id]
        records.append(Step(tuple(rows)))
        yield Turn(records, len(rows))


def measure_encoding(load: Iterator[Turn], *, steps: int) -> Cost:
    """Encode steps, and take them into the image, without a disk; only steps are timed."""
    image = Image(Retention())
    lsn = num_bytes = 0

    def encode(turn: Turn) -> int:
        nonlocal lsn, num_bytes
        *opening, step = turn.records
        for record in opening:
            if isinstance(record, Admit):
                image.admit(record.request.request_id, pack_admit(record), 1)
        assert isinstance(step, Step)
        started = time.perf_counter_ns()
        for body in write_steps(image, step.rows, lsn, 0.0):
            num_bytes += len(frame(body)) + len(body)
        took = time.perf_counter_ns() - started
        lsn += 1
        image.expire(float(lsn))
        return took

    num_tokens, parts = _measure(load, encode, steps)
    return _cost(num_tokens, parts, num_bytes)


def measure_commits(journal: Journal, load: Iterator[Turn], *, steps: int) -> Cost:
    """Append and commit whole turns, admissions and all, on a real disk."""
    now = num_bytes = 0.0

    def commit(turn: Turn) -> int:
        nonlocal now, num_bytes
        now += _STEP_S
        started = time.perf_counter_ns()
        journal.append(turn.records)
        num_bytes += journal.commit(now).num_bytes
        return time.perf_counter_ns() - started

    num_tokens, parts = _measure(load, commit, steps)
    return _cost(num_tokens, parts, num_bytes)


def _measure(
    load: Iterator[Turn], work: Callable[[Turn], int], steps: int
) -> tuple[int, list[float]]:
    """Do the work for so many turns; gives the number of tokens, and ns for each by part."""
    num_tokens = 0
    parts = []
    for _ in range(steps // _TURNS_A_PART):
        took_ns = part_tokens = 0
        for turn in islice(load, _TURNS_A_PART):
            # One at a time: the supervisor, too, has just decoded what it journals.
            took_ns += work(turn)
            part_tokens += turn.num_tokens
        parts.append(took_ns / part_tokens)
        num_tokens += part_tokens
    return num_tokens, parts


def _cost(num_tokens: int, parts: list[float], num_bytes: float) -> Cost:
    return Cost(statistics.fmean(parts), min(parts), num_bytes / num_tokens)


def grow(journal: Journal, load: Iterator[Turn], size_bytes: int) -> int:
    """Write until the journal has a size; gives the number of tokens."""
    num_tokens = 0
    now = 1_000_000.0
    while journal.size_bytes < size_bytes:
        for _ in range(1000):
            turn = next(load)
            now += _STEP_S
            journal.append(turn.records)
            journal.commit(now)
            num_tokens += turn.num_tokens
    journal.close(now)
    return num_tokens


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print a table."""
    shape = {
        "batch": arguments.batch,
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": arguments.output_tokens,
        "seed": 0,
    }
    steps = arguments.steps
    print(f"{'':18}{'ns/token':>10}{'at best':>10}{'bytes/token':>13}")
    _print("encode steps", measure_encoding(turns(**shape), steps=steps))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for policy in SyncPolicy:
            options = JournalOptions(policy=policy, compact_above_bytes=_GROWTH_BYTES_MAX)
            journal = Journal.open(OsDisk(Path(directory) / policy.value), options, 0.0).journal
            # A disk's sync takes milliseconds: fewer of them say as much.
            num_steps = steps if policy is not SyncPolicy.STRICT else max(64, steps // 20)
            _print(
                f"commit, {policy.value}", measure_commits(journal, turns(**shape), steps=num_steps)
            )
            journal.close(1e9)
        _measure_recovery(arguments, shape, Path(directory) / "large")
    print(f"for comparison, an empty turn of a loop takes {_loop_ns():.0f} ns here")
    return 0


def _print(name: str, cost: Cost) -> None:
    print(f"{name:18}{cost.ns_mean:10.0f}{cost.ns_best:10.0f}{cost.num_bytes:13.2f}")


def _loop_ns() -> float:
    best = float("inf")
    for _ in range(100):
        started = time.perf_counter_ns()
        for _ in range(1000):
            pass
        best = min(best, (time.perf_counter_ns() - started) / 1000)
    return best


def _measure_recovery(
    arguments: argparse.Namespace, shape: dict[str, int], directory: Path
) -> None:
    retained = Retention(bytes_max=arguments.retained_mib << 20)
    options = JournalOptions(
        compact_above_bytes=_GROWTH_BYTES_MAX, segments_max=1 << 20, retention=retained
    )
    journal = Journal.open(OsDisk(directory), options, 1_000_000.0).journal
    num_tokens = grow(journal, turns(**shape), arguments.recovery_mib << 20)
    started = time.perf_counter()
    journal, recovery = Journal.open(OsDisk(directory), options, 2_000_000.0)
    took = time.perf_counter() - started
    statistics = recovery.statistics
    print(
        f"recovery {took:.2f} s for {statistics.num_bytes / 2**20:.0f} MiB:"
        f" {statistics.records} records, {num_tokens} tokens,"
        f" {len(recovery.live)} living and {len(recovery.ended)} ended requests held"
    )
    journal.close(2_000_000.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20_000, help="for each policy")
    parser.add_argument("--recovery-mib", type=int, default=1024)
    parser.add_argument("--retained-mib", type=int, default=32, help="of ended requests")
    parser.add_argument("--directory", type=Path, default=None, help="where to write")


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="bench journal", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
