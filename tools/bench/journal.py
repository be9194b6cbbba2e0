"""Measure the journal: ns and bytes for each token, and how long a large one takes to recover.

Run it with ``python -m understudy.tools.bench.journal``. The load is a full batch in which every
request has the same length and a new one takes the place of each that ends, so that the batch
changes every few steps, as it does in service. Only the journal's own calls are timed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
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
from understudy.runtime.storage.image import Retention
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.records import Admit, Assign, Record, Step
from understudy.runtime.storage.segment_writer import SyncPolicy

VOCABULARY: Final = 128_000
_STEP_S: Final = 0.02
_NS: Final = 1_000_000_000
_ROUNDS: Final = 40
_GROWTH_BYTES_MAX: Final = 1 << 62


class Turn(NamedTuple):
    """What one turn of a supervisor appends."""

    records: list[Record]
    num_tokens: int


class Written(NamedTuple):
    """What writing cost."""

    num_tokens: int
    num_bytes: int
    step_bytes: int
    elapsed_ns: int
    best_ns_per_token: float
    """Of the quickest of many equal parts: the figure of a quiet core."""


def turns(*, batch: int, prompt_tokens: int, output_tokens: int, seed: int) -> Iterator[Turn]:
    """An endless load of full batches; requests begin one after the other, evenly spread."""
    source = random.Random(seed)  # noqa: S311 - a load, not a secret
    tokens = [(source.randrange(VOCABULARY),) for _ in range(output_tokens)]
    hashes = [0]
    for token in tokens:
        hashes.append(extend_prefix_hash(hashes[-1], token))
    prompt = tuple(source.randrange(VOCABULARY) for _ in range(prompt_tokens))
    params = SamplingParams(seed=seed, max_tokens=output_tokens)
    running: dict[int, int] = {}
    last = output_tokens - 1
    step = 0
    while True:
        records: list[Record] = []
        step += 1
        wanted = min(batch, 1 + step * batch // output_tokens)
        while len(running) < wanted:
            request_id = source.getrandbits(63)
            running[request_id] = 0
            records.append(Admit(Request(request_id, request_id, prompt, params), "g-0", 0.0))
            records.append(Assign(request_id, 1, "engine-0", 1))
        stop = int(FinishReason.STOP)
        rows = tuple(
            [
                TokenRow(request_id, 1, at, tokens[at], hashes[at + 1], stop if at == last else 0)
                for request_id, at in running.items()
            ]
        )
        running = {request_id: at + 1 for request_id, at in running.items() if at < last}
        records.append(Step(rows))
        yield Turn(records, len(rows))


def measure_writing(journal: Journal, load: Iterator[Turn], *, steps: int) -> Written:
    """Commit turns and time nothing else. The steps' own bytes are counted apart."""
    num_tokens = num_bytes = step_bytes = elapsed_ns = 0
    best = float("inf")
    now = 0.0
    for _ in range(_ROUNDS):
        chunk = [next(load) for _ in range(steps // _ROUNDS)]
        chunk_tokens = sum(turn.num_tokens for turn in chunk)
        started = time.perf_counter_ns()
        for turn in chunk:
            now += _STEP_S
            journal.append(turn.records)
            written = journal.commit(now).num_bytes
            num_bytes += written
            step_bytes += written if len(turn.records) == 1 else 0
        took = time.perf_counter_ns() - started
        elapsed_ns += took
        num_tokens += chunk_tokens
        best = min(best, took / chunk_tokens)
    return Written(num_tokens, num_bytes, step_bytes, elapsed_ns, best)


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
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for policy in SyncPolicy:
            options = JournalOptions(policy=policy, compact_above_bytes=_GROWTH_BYTES_MAX)
            journal = Journal.open(OsDisk(Path(directory) / policy.value), options, 0.0).journal
            load = turns(**shape)
            for _ in range(arguments.output_tokens):
                journal.append(next(load).records)
            journal.commit(0.0)
            steps = arguments.steps if policy is not SyncPolicy.STRICT else arguments.steps // 20
            written = measure_writing(journal, load, steps=steps)
            journal.close(1e9)
            print(
                f"{policy.value:8} {written.elapsed_ns / written.num_tokens:8.1f} ns/token"
                f" ({written.best_ns_per_token:.1f} at best),"
                f" {written.num_bytes / written.num_tokens:.2f} bytes/token with admissions"
            )
        _measure_recovery(arguments, shape, Path(directory) / "large")
    return 0


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
