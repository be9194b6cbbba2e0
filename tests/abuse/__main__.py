"""Abuse a real cluster: ``python -m tests.abuse 100000 [--seed 1]``, or one case, or the bus."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from tests.abuse.bus import at_members, at_supervisor
from tests.abuse.cases import Cases
from tests.abuse.requests import Abuse, Outcome
from tests.abuse.stage import on_stage

REQUESTS: Final = 100_000


def main() -> int:
    """Send what is asked for; 1 if anything was noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.abuse")
    parser.add_argument("count", nargs="?", type=int, default=REQUESTS, help="calls (100000)")
    parser.add_argument("--seed", type=int, default=1, help="another one gives other calls (1)")
    parser.add_argument("--case", type=int, help="send this one alone, and tell all of it")
    parser.add_argument("--only", default="", help="what the paths must contain")
    parser.add_argument("--engine", choices=("echo", "model"), default="echo")
    parser.add_argument("--connections", type=int, default=8, help="at once (8)")
    parser.add_argument("--bus", type=int, metavar="N", help="so many frames at the bus instead")
    parser.add_argument("--log", type=Path, help="keep the cluster's log here")
    given = parser.parse_args()
    if given.bus is not None:
        return abuse_bus(given.bus, seed=given.seed)
    numbers = range(given.count) if given.case is None else [given.case]
    again = f"python -m tests.abuse --seed {given.seed} --engine {given.engine}"
    again += f" --only {given.only}" if given.only else ""
    with on_stage(engine=given.engine) as stage:
        cases = Cases(stage.document(), given.seed, given.only)
        abuse = Abuse(stage, cases, connections=given.connections)
        outcome = abuse.run(numbers, seed=given.seed, is_told=given.case is not None)
        if given.log:
            given.log.write_text(stage.cluster.log)
    print(told(outcome, again))
    return 1 if outcome.findings or outcome.problems else 0


def abuse_bus(count: int, *, seed: int) -> int:
    """Send so many frames to the supervisor, and so many to the others; 1 if it was noticed."""
    rounds = [at_supervisor(count, seed=seed), at_members(count, seed=seed)]
    for one in rounds:
        compared = one.comparison
        print(
            f"{one.num_frames} frames to {one.where}; {compared.num_calls} streams beside: "
            f"{compared.num_failed} failed and {compared.num_changed} changed; "
            f"counted as malformed: {one.dropped}"
        )
        for problem in one.problems:
            print(f"FOUND      {problem}")
    return 0 if all(one.is_right for one in rounds) else 1


def told(outcome: Outcome, again: str) -> str:
    """The figures, and what was noticed."""
    statuses = ", ".join(f"{status}: {n}" for status, n in sorted(outcome.statuses.items()))
    lines = [
        f"{outcome.num_cases} calls in {outcome.took_s:.0f} s; {outcome.num_beside} streams beside",
        f"by status  {statuses}",
        f"by kind    {', '.join(f'{kind}: {n}' for kind, n in outcome.kinds.most_common())}",
    ]
    if outcome.refused_s:
        shares = ", ".join(
            f"p{100 * share:g} {1e3 * outcome.refused_within_s(share):.1f} ms"
            for share in (0.5, 0.99, 0.999, 1.0)
        )
        lines.append(f"refused    {len(outcome.refused_s)} of them with 4xx: {shares}")
    if outcome.slowest is not None:
        kind, number = outcome.slowest.kind, outcome.slowest.number
        lines.append(f"slowest    {kind}: {again} --case {number}")
    for case, problem in outcome.findings:
        lines.append(f"FOUND      {case.kind}, {case.method} {case.target[:80]}: {problem}")
        lines.append(f"           {again} --case {case.number}")
    lines += [f"FOUND      {problem}" for problem in outcome.problems]
    lines.append(f"{len(outcome.findings) + len(outcome.problems)} things were noticed")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
