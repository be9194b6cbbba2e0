"""Other engines and ours on one machine and the same weights.

    python -m understudy.tools.bench.make_model /tmp/half-billion
    python -m understudy.tools.bench.compare --model /tmp/half-billion \
        --peer-venv vllm=/opt/peers/vllm --peer-venv openvino=/opt/peers/openvino \
        --json compare.json --plot compare.svg

Each engine that is found installed runs alone, in turns: one round is every engine once, with every
column. The tables show medians of rounds. Servers listen on loopback, and end with their turn.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from understudy.tools.bench import flags
from understudy.tools.bench.columns import (
    COLUMNS,
    WARM_UP,
    Column,
    Word,
    find_words,
    prompts_of,
    rate,
)
from understudy.tools.bench.comparison import Round, as_object, is_ours, medians, render
from understudy.tools.bench.machine import machine
from understudy.tools.bench.peers.libraries import CTranslate2, OpenVino
from understudy.tools.bench.peers.processes import Environment, Peer, Running
from understudy.tools.bench.peers.servers import LlamaCpp, Transformers, Understudy, Vllm
from understudy.tools.bench.plot import Panel, bar_chart
from understudy.tools.bench.report import report_json
from understudy.tools.bench.servers import ServerFailed, end_in_order_on_sigterm

FAMILIES: Final = ("vllm", "openvino", "ctranslate2", "llama-cpp", "transformers")
ROUNDS_MAX: Final = 100
THREADS_MAX: Final = 1024
_ABSOLUTE: Final = re.compile(r"/(?:[^/=]+/)*([^/=]+)")
_FIRST: Final = WARM_UP._replace(name="first", concurrency=1, num_requests=1, output=1)


class Contender(NamedTuple):
    """An engine that takes part."""

    peer: Peer
    version: str
    model: Path
    """Prepared for it."""


def all_peers(venvs: Mapping[str, Path]) -> list[Peer]:
    """Ours first, then every variant of every other."""

    def environment(family: str) -> Environment:
        venv = venvs.get(family)
        return Environment(Path(sys.executable) if venv is None else venv / "bin" / "python")

    return [
        Understudy("understudy", "none"),
        Understudy("understudy-int8", "int8"),
        Vllm("vllm-bf16", environment("vllm"), "bf16"),
        Vllm("vllm-int8", environment("vllm"), "int8"),
        OpenVino("openvino-f16", environment("openvino"), "f16"),
        OpenVino("openvino-int8", environment("openvino"), "int8"),
        CTranslate2("ctranslate2-int8", environment("ctranslate2")),
        LlamaCpp("llama-bf16", environment("llama-cpp"), "bf16"),
        LlamaCpp("llama-q8_0", environment("llama-cpp"), "q8_0"),
        Transformers("transformers-bf16", environment("transformers")),
    ]


def take_part(peers: Sequence[Peer], model: Path, converted: Path) -> list[Contender]:
    """Those that are installed and can read the model; says of each other one why not."""
    contenders: list[Contender] = []
    for peer in peers:
        version = peer.version()
        if version is None:
            _say(f"{peer.name}: not installed")
            continue
        try:
            contenders.append(Contender(peer, version, peer.prepare(model, converted)))
        except ServerFailed as error:
            _say(f"{peer.name}: its model could not be made: {error}")
        else:
            _say(f"{peer.name}: {version}")
    return contenders


def run_once(
    contender: Contender,
    columns: Sequence[Column],
    words: Sequence[Word],
    *,
    threads: int,
    seed: int,
) -> Round:
    """One engine's turn.

    Raises:
        ServerFailed: It did not come up, or did not answer as asked.
    """

    def ask(engine: Running, column: Column) -> float:
        prompts = prompts_of(column, words, seed=seed)
        answered = engine.ask(prompts, concurrency=column.concurrency, output_tokens=column.output)
        return rate(column, answered)

    with _started(contender, threads, ask) as (engine, start_s):
        ask(engine, WARM_UP)
        rates = {column.name: ask(engine, column) for column in columns}
        memory_gb = engine.memory_bytes() / 1e9
    with _started(contender, threads, ask) as (_, restart_s):
        pass
    return Round(contender.peer.name, rates, start_s, restart_s, memory_gb)


@contextmanager
def _started(
    contender: Contender, threads: int, ask: Callable[[Running, Column], float]
) -> Iterator[tuple[Running, float]]:
    """An engine, and how many seconds it took to its first answer."""
    began_s = time.monotonic()
    with contender.peer.running(contender.model, threads=threads) as engine:
        ask(engine, _FIRST)
        yield engine, time.monotonic() - began_s


def run_rounds(
    contenders: Sequence[Contender],
    num_rounds: int,
    measure: Callable[[Contender, int], Round],
    keep: Callable[[Sequence[Round]], None],
) -> list[Round]:
    """All rounds, interleaved. An engine that failed once takes no further part.

    After each turn ``keep`` is given what there is so far: a comparison takes an hour, and what it
    has measured should outlive its end.
    """
    rounds: list[Round] = []
    failed: set[str] = set()

    def sound() -> list[Round]:
        return [done for done in rounds if done.engine not in failed]

    for number in range(num_rounds):
        for contender in contenders:
            name = contender.peer.name
            if name in failed:
                continue
            try:
                rounds.append(measure(contender, number))
            except ServerFailed as error:
                failed.add(name)
                _say(f"{name}: {error}")
            else:
                shown = ", ".join(f"{c} {value:.1f}" for c, value in rounds[-1].rates.items())
                _say(f"round {number + 1}: {name}: {shown}")
            keep(sound())
    return sound()


def panels(rounds: Sequence[Round], columns: Sequence[Column]) -> list[Panel]:
    """A chart for each column, the fastest on top."""
    lines = medians(rounds)
    found: list[Panel] = []
    for column in columns:
        values = {line.engine: line.rates[column.name] for line in lines}
        ordered = sorted(values.items(), key=lambda item: item[1], reverse=True)
        found.append(Panel(f"{column.title}: {column.counts} tokens/s", dict(ordered)))
    return found


def words_of(model: Path) -> list[Word]:
    """What prompts are made of, by the model's tokenizer."""
    from understudy.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(model)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return find_words(tokenizer.vocab_size, encode, tokenizer.decode)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        prog="python -m understudy.tools.bench.compare", allow_abbrev=False
    )
    made.add_argument("--model", type=Path, required=True, metavar="DIR", help="see make_model")
    made.add_argument(
        "--peers",
        type=flags.several(_one_of("peer", FAMILIES)),
        default=FAMILIES,
        metavar="P,P,...",
        help=f"default: all that are found of {','.join(FAMILIES)}",
    )
    made.add_argument(
        "--peer-venv",
        type=_venv,
        action="append",
        default=[],
        metavar="P=DIR",
        help="the virtual environment of a peer; default: this one",
    )
    made.add_argument(
        "--columns",
        type=flags.several(_one_of("column", [column.name for column in COLUMNS])),
        metavar="C,C,...",
        help=f"default: {','.join(column.name for column in COLUMNS)}",
    )
    made.add_argument("--rounds", type=flags.count(ROUNDS_MAX), default=3, metavar="N", help="(3)")
    made.add_argument(
        "--threads",
        type=flags.count(THREADS_MAX),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="of every engine; default: all cores",
    )
    made.add_argument(
        "--converted",
        type=Path,
        metavar="DIR",
        help="keeps the models in other engines' formats; default: MODEL.converted",
    )
    flags.add_json(made)
    made.add_argument("--plot", type=Path, metavar="FILE", help="write a chart here, as SVG")
    return made


def main() -> int:
    """Compare; 1 if any engine failed or none takes part, 2 on usage."""
    made = parser()
    arguments = made.parse_args()
    model = arguments.model.absolute()
    if not (model / "config.json").is_file():
        made.error(f"--model: {model} is no model directory")
    if (problem := flags.json_problem(arguments.json)) is not None:
        made.error(problem)
    converted = (arguments.converted or model.with_name(f"{model.name}.converted")).absolute()
    chosen = arguments.columns or [column.name for column in COLUMNS]
    columns = [column for column in COLUMNS if column.name in chosen]
    peers = [
        peer
        for peer in all_peers(dict(arguments.peer_venv))
        if is_ours(peer.name) or peer.family in arguments.peers
    ]
    end_in_order_on_sigterm()
    contenders = take_part(peers, model, converted)
    words = words_of(model)

    def measure(contender: Contender, number: int) -> Round:
        return run_once(contender, columns, words, threads=arguments.threads, seed=number)

    settings = settings_object(contenders, model, arguments.threads)

    def keep(rounds: Sequence[Round]) -> None:
        if rounds and arguments.json is not None:
            part = arguments.json.with_suffix(".part")
            part.write_text(report_json(as_object(rounds, columns, settings)), "utf-8")
            part.replace(arguments.json)

    rounds = run_rounds(contenders, arguments.rounds, measure, keep)
    if not rounds:
        return 1
    sys.stdout.write(render(medians(rounds), columns) + "\n")
    if arguments.plot is not None:
        ours = [contender.peer.name for contender in contenders if is_ours(contender.peer.name)]
        arguments.plot.write_text(bar_chart(panels(rounds, columns), highlighted=ours), "utf-8")
    return 0 if len({done.engine for done in rounds}) == len(contenders) else 1


def settings_object(contenders: Sequence[Contender], model: Path, threads: int) -> dict[str, Any]:
    """What a reader needs to repeat the comparison. Paths are shortened to their last parts."""
    return {
        "machine": machine(),
        "model": model.name,
        "threads": threads,
        "versions": {contender.peer.name: contender.version for contender in contenders},
        "commands": {
            contender.peer.name: shown_command(
                contender.peer.command(contender.model, port=0, threads=threads)
            )
            for contender in contenders
        },
    }


def shown_command(words: Sequence[str]) -> str:
    """A command without the folders that its files happen to lie in here."""
    return " ".join(_ABSOLUTE.sub(r"\1", word) for word in words)


def _one_of(kind: str, names: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind} of {', '.join(names)}")
        return text

    return read


def _venv(text: str) -> tuple[str, Path]:
    family, equals, directory = text.partition("=")
    if family not in FAMILIES or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not PEER=DIR, of {', '.join(FAMILIES)}")
    path = Path(directory).expanduser().absolute()
    if not (path / "bin" / "python").exists():
        raise argparse.ArgumentTypeError(f"{path} is no virtual environment")
    return family, path


def _say(words: str) -> None:
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
