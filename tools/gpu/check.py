"""Proves on a card that the kernels compute what they should, and the same in every batch.

Every kernel against its reference over the shapes of real models; the promise about bits; the
bundled model on the card against itself on the CPU; graphs against the same steps without.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import torch

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_NO_CARD: Final = 69
"""EX_UNAVAILABLE: this machine cannot tell."""


class Finding(NamedTuple):
    """One comparison."""

    what: str
    found: float
    """A relative error, or how many numbers differ."""
    limit: float
    """What ``found`` may be at most."""

    @property
    def is_good(self) -> bool:
        """NaN is not."""
        return self.found <= self.limit


Check = Callable[[torch.device], Iterator[Finding]]


def main() -> int:
    """Run all checks; 0 if all hold, 1 if one does not, 69 without a card."""
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check",
        description="example: python tools/gpu_check --json findings.json",
    )
    parser.add_argument("--json", type=Path, help="write all findings to this file")
    parser.add_argument("--only", default="", help="run the checks whose names contain this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU here; nothing was checked", file=sys.stderr)
        return EXIT_NO_CARD
    from understudy.tools.gpu.engine_checks import ENGINE_CHECKS
    from understudy.tools.gpu.kernel_checks import KERNEL_CHECKS

    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    checks: dict[str, Check] = {**KERNEL_CHECKS, **ENGINE_CHECKS}
    findings: list[dict[str, object]] = []
    for name, check in checks.items():
        if arguments.only in name:
            findings += _run(name, check, device)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(findings, indent=1), encoding="utf-8")
    bad = sum(not finding["ok"] for finding in findings)
    print(f"{len(findings)} findings, {bad} bad")
    return EXIT_FAILED if bad or not findings else EXIT_OK


def _run(name: str, check: Check, device: torch.device) -> list[dict[str, object]]:
    """All findings of a check, as they are printed; a check that breaks is a bad one."""
    rows: list[dict[str, object]] = []
    start = time.perf_counter()

    def add(what: str, found: float, limit: float, *, is_good: bool, error: str = "") -> None:
        seconds = time.perf_counter() - start
        verdict = "ok " if is_good else "BAD"
        line = f"{verdict} {name:<22} {what:<46} {found:10.3g} <= {limit:<8.3g} {seconds:6.1f} s"
        print(line, error, flush=True)
        rows.append(
            {"check": name, "what": what, "found": found, "limit": limit, "ok": is_good}
            | ({"error": error} if error else {})
        )

    try:
        with torch.inference_mode():
            for finding in check(device):
                add(finding.what, finding.found, finding.limit, is_good=finding.is_good)
    except Exception as error:  # noqa: BLE001 - the other checks tell more
        text = f"{type(error).__name__}: {error}".replace("\n", " ")[:500]
        add("broke", float("inf"), 0.0, is_good=False, error=text)
    return rows
