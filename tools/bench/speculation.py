"""What guessing brings: ``python -m understudy.tools.bench.speculation``.

The same requests on the same machine, in turns: without drafts, with what stood there before looked
up, and with the bundled draft model besides, its drafts as long as pays or always of one length.
Prompts are pieces of Python sources that the bundled models were not trained on. Each number of
streams is a closed loop; answers are greedy, and all ways have to give the same.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp

from understudy.tools.bench.client import Target
from understudy.tools.bench.machine import machine
from understudy.tools.bench.report import render_table
from understudy.tools.bench.servers import ServerFailed, cluster
from understudy.tools.demo.corpus import read_corpus
from understudy.tools.demo.paths import draft_model_directory

MODEL: Final = "understudy-demo"
STREAMS: Final = (1, 2, 4, 8, 16, 32)
REQUESTS_EACH: Final = 24
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


def prompts(count: int) -> list[str]:
    """Pieces from the middle of sources that no model was trained on."""
    held_out = [file.text for file in read_corpus().held_out]
    pieces = (
        text[start : start + PROMPT_CHARACTERS]
        for part in (2, 3, 4, 5, 6)
        for text in held_out
        if len(text) > 4 * PROMPT_CHARACTERS
        for start in [len(text) // part]
    )
    found = list(itertools.islice(pieces, count))
    assert len(found) == count, "the standard library has too few held-out sources"
    return found


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


def run_round(
    chosen: Sequence[Way], streams: Iterable[int], flags: Sequence[str]
) -> dict[str, dict[int, float]]:
    """Output tokens a second, by way and number of streams.

    Raises:
        ServerFailed: a server did not come up, a request failed, or two ways told two texts.
    """
    rates: dict[str, dict[int, float]] = {way.name: {} for way in chosen}
    told: dict[int, list[str]] = {}
    for way in chosen:
        print(way.name, file=sys.stderr)
        speculation = () if way.config is None else ("--speculative-config", json.dumps(way.config))
        with cluster(way.name, num_engines=1, flags=(*flags, *speculation)) as server:
            asyncio.run(measure(server.target, prompts(4), 2))
            for count in streams:
                texts = prompts(max(REQUESTS_EACH, 2 * count))
                measured = asyncio.run(measure(server.target, texts, count))
                rates[way.name][count] = measured.tokens_per_s
                if told.setdefault(count, measured.texts) != measured.texts:
                    raise ServerFailed(f"{way.name} with {count} streams told another text")
    return rates


def summarise(rounds: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, dict[int, float]]:
    """Medians over the rounds."""
    return {
        name: {
            count: statistics.median(each[name][count] for each in rounds)
            for count in rounds[0][name]
        }
        for name in rounds[0]
    }


def shortfall(medians: Mapping[str, Mapping[int, float]], streams: int) -> float:
    """By how much the adaptive depth is slower than the best of off and the fixed ones."""
    others = (rates for name, rates in medians.items() if name not in {ADAPTIVE, "lookup"})
    return 1 - medians[ADAPTIVE][streams] / max(rates[streams] for rates in others)


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
        rounds = [run_round(chosen, arguments.streams, flags) for _ in range(arguments.rounds)]
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    medians = summarise(rounds)
    rows = [
        [
            str(count),
            *(f"{rates[count]:.0f}" for rates in medians.values()),
            f"{medians[ADAPTIVE][count] / medians['off'][count]:.2f}",
            f"{shortfall(medians, count):.1%}",
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
