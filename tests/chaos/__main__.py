"""Run chaos and print the table: ``python -m tests.chaos [F1 F7 …] [--engine model]``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.chaos.figures import CLIENTS, Figure, Size
from tests.chaos.scenarios import SCENARIOS


def main() -> int:
    """Run the scenarios that are asked for; 1 if a figure is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--engine", choices=("echo", "model"), default="echo")
    parser.add_argument(
        "--setting",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the engines of scenarios that --engine chooses for, as in quantization=int8",
    )
    parser.add_argument("--clients", type=int, default=CLIENTS, help=f"streams ({CLIENTS})")
    parser.add_argument("--max-tokens", type=int, default=240, help="tokens of a stream (240)")
    parser.add_argument("--repeats", type=int, default=2, help="how often (2)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and parameters (1)")
    parser.add_argument("--resumes", type=int, default=1000, help="of F4, and deaths of F3 (1000)")
    parser.add_argument("--minutes", type=float, default=20.0, help="of F26 (20)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - SCENARIOS.keys()
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    size = Size(
        arguments.clients,
        arguments.max_tokens,
        arguments.repeats,
        arguments.engine,
        arguments.seed,
        resumes=arguments.resumes,
        pause_s=15.0,
        minutes=arguments.minutes,
        settings=dict(arguments.setting),
    )
    figures: list[Figure] = []
    for name in arguments.names or SCENARIOS:
        began_at = time.monotonic()
        for figure in SCENARIOS[name](size):
            figures.append(figure)
            mark = "met   " if figure.is_met else "MISSED"
            print(f"{figure.name:4} {mark} {figure.what}")
            print(f"     found  {figure.measured}")
            print(f"     wanted {figure.wanted}", flush=True)
        print(f"     ({time.monotonic() - began_at:.0f} s)", flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                [figure._asdict() | {"is_met": figure.is_met} for figure in figures],
                indent=2,
                ensure_ascii=False,
            )
        )
    missed = [figure.name for figure in figures if not figure.is_met]
    print(
        f"{len(figures) - len(missed)} of {len(figures)} figures are met"
        + "".join(f"; {name} is not" for name in missed)
    )
    return 1 if missed else 0


def _setting(text: str) -> tuple[str, str]:
    """A setting's variable of the environment, and its value."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return f"UNDERSTUDY_{name.upper().replace('-', '_')}", value


if __name__ == "__main__":
    sys.exit(main())
