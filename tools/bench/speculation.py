"""What guessing brings: ``python -m understudy.tools.bench.speculation``.

The same requests on the same machine, in turns: without drafts, with what stood there before looked
up, and with the bundled draft model besides, its drafts as long as pays or always of one length.
All servers are up at once and are asked one after another, so that a machine whose pace changes
from minute to minute does as much to each of them. Prompts are pieces of Python sources that the
bundled models were not trained on, each asked once, for an answer that was given before would be
looked up. Each number of streams is a closed loop; answers are greedy, and all ways have to give
the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import aiohttp

from understudy.tools.bench.client import Target
from understudy.tools.bench.machine import machine
from understudy.tools.bench.report import render_table
from understudy.tools.bench.servers import Server, ServerFailed, cluster
from understudy.tools.demo.corpus import read_corpus
from understudy.tools.demo.paths import draft_model_directory

MODEL: Final = "understudy-demo"
STREAMS: Final = (1, 2, 4, 8, 16, 32)
REQUESTS_EACH: Final = 16
"""At each number of streams; twice as many as there are streams, if that is more."""
PROMPT_CHARACTERS: Final = 500
OUTPUT_TOKENS: Final = 128
ADAPTIVE: Final = "draft model"


class Way(NamedTuple):
    """A way to guess."""

    name: str
    config: Mapping[str, Any] | None


def ways(draft: Path) -> list[Way]:
    """Off, and what is compared with it."""
    model: dict[str, Any] = {"model": str(draft)}
    fixed = [
        Way(f"depth {depth}", {**model, "num_speculative_tokens": depth, "adaptive": False})
        for depth in (3, 7)
    ]
    return [Way("off", None), Way("lookup", {"method": "ngram"}), Way(ADAPTIVE, model), *fixed]


def prompts() -> Iterator[str]:
    """Pieces of sources that no model was trained on; two overlap by half at most."""
    held_out = [file.text for file in read_corpus().held_out]
    for offset in range(0, max(map(len, held_out)), PROMPT_CHARACTERS // 2):
        for text in held_out:
            if offset + PROMPT_CHARACTERS < len(text):
                yield text[offset : offset + PROMPT_CHARACTERS]


class Measured(NamedTuple):
    """One number of streams, one way."""

    tokens_per_s: float
    texts: list[str]


async def measure(target: Target, texts: Sequence[str], streams: int) -> Measured:
    """Ask for all answers, so many at a time.

    Raises:
        ServerFailed: a request failed.
    """
    answers: dict[int, str] = {}
    waiting = iter(enumerate(texts))
    num_tokens = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal num_tokens
        for number, prompt in waiting:
            body = {
                "model": MODEL,
                "prompt": prompt,
                "max_tokens": OUTPUT_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            }
            async with session.post("/v1/completions", json=body) as response:
                answer = await response.json()
            if response.status != 200:
                raise ServerFailed(f"status {response.status}: {answer}")
            answers[number] = answer["choices"][0]["text"]
            num_tokens += answer["usage"]["completion_tokens"]

    connector = aiohttp.TCPConnector(limit=streams)
    base = f"http://{target.authority}"
    async with aiohttp.ClientSession(base, connector=connector) as session:
        begun_at = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(streams)))
        passed = time.perf_counter() - begun_at
    return Measured(num_tokens / passed, [answers[number] for number in sorted(answers)])


Round: TypeAlias = dict[str, dict[int, float]]
"""Output tokens a second, by way and number of streams."""


def run_rounds(
    chosen: Sequence[Way], streams: Sequence[int], flags: Sequence[str], num_rounds: int
) -> list[Round]:
    """Measure every way in turns, so many times.

    Raises:
        ServerFailed: a server did not come up, a request failed, or two ways told two texts.
    """
    rounds: list[Round] = []
    pieces = prompts()
    with contextlib.ExitStack() as running:
        servers = {way.name: running.enter_context(_server(way, flags)) for way in chosen}
        warm_up = list(itertools.islice(pieces, 4))
        for server in servers.values():
            asyncio.run(measure(server.target, warm_up, 2))
        for number in range(num_rounds):
            rates: Round = {way.name: {} for way in chosen}
            for count in streams:
                print(f"round {number + 1}: {count} streams", file=sys.stderr)
                num_texts = max(REQUESTS_EACH, 2 * count)
                texts = list(itertools.islice(pieces, num_texts))
                if len(texts) < num_texts:
                    raise ServerFailed("the standard library has too few held-out sources")
                told = {}
                for name in itertools.islice(
                    itertools.cycle(servers), number, number + len(servers)
                ):
                    measured = asyncio.run(measure(servers[name].target, texts, count))
                    rates[name][count] = measured.tokens_per_s
                    told[name] = measured.texts
                if any(answers != told["off"] for answers in told.values()):
                    raise ServerFailed(f"not all told the same text with {count} streams")
            rounds.append(rates)
    return rounds


def _server(way: Way, flags: Sequence[str]) -> contextlib.AbstractContextManager[Server]:
    speculation = () if way.config is None else ("--speculative-config", json.dumps(way.config))
    return cluster(way.name, num_engines=1, flags=(*flags, *speculation))


def summarise(rounds: Sequence[Round]) -> Round:
    """Medians over the rounds."""
    return {
        name: {
            count: statistics.median(each[name][count] for each in rounds)
            for count in rounds[0][name]
        }
        for name in rounds[0]
    }


def shortfall(rounds: Sequence[Round], streams: int) -> float:
    """By how much the adaptive depth is slower than the best of off and the fixed ones.

    For each of them the median over the rounds of the ratio within a round.
    """
    others = [name for name in rounds[0] if name not in {ADAPTIVE, "lookup"}]
    ratios = [
        statistics.median(each[ADAPTIVE][streams] / each[name][streams] for each in rounds)
        for name in others
    ]
    return 1 - min(ratios)


def main() -> int:
    """Measure and print; 1 if a server failed or a text changed."""
    parser = argparse.ArgumentParser(prog="python -m understudy.tools.bench.speculation")
    parser.add_argument("--draft", type=Path, default=draft_model_directory(), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS), metavar="N")
    parser.add_argument("--threads", type=int, default=1, help="of the engine (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here as well")
    arguments = parser.parse_args()
    chosen = ways(arguments.draft)
    flags = (f"--threads={arguments.threads}",)
    try:
        rounds = run_rounds(chosen, arguments.streams, flags, arguments.rounds)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    medians = summarise(rounds)
    rows = [
        [
            str(count),
            *(f"{rates[count]:.0f}" for rates in medians.values()),
            f"{medians[ADAPTIVE][count] / medians['off'][count]:.2f}",
            f"{shortfall(rounds, count):.1%}",
        ]
        for count in arguments.streams
    ]
    print("tokens/s")
    print(render_table(["streams", *medians, "draft model : off", "behind the best"], rows))
    if arguments.json is not None:
        found = {"machine": machine(), "threads": arguments.threads, "rounds": rounds}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
