"""Abuse over HTTP: many cases at a running gateway, and what is wrong with its answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import uvloop

from tests.abuse.cases import Case, Cases
from tests.abuse.connection import Answer, Connection
from tests.abuse.stage import Beside, Stage

ERROR_BYTES_MAX: Final = 4000
"""An error is no echo."""
FINDINGS_MAX: Final = 50
LONG_S: Final = 10.0
_PROTOCOL_KINDS: Final = frozenset({"header", "transport"})
"""They may be refused before there is a request that could be answered in our form."""


class Finding(NamedTuple):
    """A case with an answer that it should not have."""

    case: Case
    problem: str


class Outcome(NamedTuple):
    """What came of many cases."""

    num_cases: int
    statuses: Counter[int]
    """0: the connection was closed; -1: the client went away before there was an answer."""
    kinds: Counter[str]
    findings: list[Finding]
    refused_s: list[float]
    """How long each refusal took, in order of size."""
    slowest: Case | None
    """The case that was refused latest."""
    problems: list[str]
    """What happened to the cluster, or to those beside."""
    num_beside: int
    took_s: float

    def refused_within_s(self, share: float) -> float:
        """What so large a share of the refusals took at most."""
        return self.refused_s[math.ceil(share * len(self.refused_s)) - 1]


class Abuse:
    """A run of cases against a stage."""

    def __init__(self, stage: Stage, cases: Cases, *, connections: int) -> None:
        self._stage = stage
        self._cases = cases
        self._connections = connections
        self._statuses: Counter[int] = Counter()
        self._kinds: Counter[str] = Counter()
        self._findings: list[Finding] = []
        self._refused_s: list[float] = []
        self._slowest: Case | None = None
        self._slowest_s = 0.0

    def run(self, numbers: Sequence[int], *, seed: int, is_told: bool = False) -> Outcome:
        """Send the cases of these numbers, with streams beside them."""
        began_at = time.monotonic()
        with Beside(self._stage, seed=seed) as beside:
            uvloop.run(self._send_all(numbers, is_told=is_told))
        return Outcome(
            num_cases=len(numbers),
            statuses=self._statuses,
            kinds=self._kinds,
            findings=self._findings,
            refused_s=sorted(self._refused_s),
            slowest=self._slowest,
            problems=[*beside.problems, *self._stage.problems()],
            num_beside=beside.num_streams,
            took_s=time.monotonic() - began_at,
        )

    async def _send_all(self, numbers: Sequence[int], *, is_told: bool) -> None:
        waiting = iter(numbers)
        workers = [self._work(waiting, is_told=is_told) for _ in range(self._connections)]
        await asyncio.gather(*workers)

    async def _work(self, waiting: Iterator[int], *, is_told: bool) -> None:
        connection = Connection(self._stage.host, self._stage.port)
        for number in itertools.takewhile(lambda _: len(self._findings) < FINDINGS_MAX, waiting):
            case = self._cases.case(number)
            sent = case.sent(self._stage.hostile_key)
            is_head = case.method == "HEAD"
            answer = await connection.call(sent, is_head=is_head, patience_s=case.patience_s)
            if is_told:
                print(sent[:3000], answer, sep="\n")
            self._judge(case, answer)
        await connection.close()

    def _judge(self, case: Case, answer: Answer | None) -> None:
        self._kinds[case.kind] += 1
        if answer is None:
            self._statuses[-1] += 1
            if case.patience_s >= LONG_S:
                self._find(case, f"no answer within {case.patience_s:.0f} s")
            return
        self._statuses[answer.status] += 1
        if 400 <= answer.status < 500 and case.is_whole:
            if answer.waited_s > self._slowest_s:
                self._slowest_s = answer.waited_s
                self._slowest = case
            self._refused_s.append(answer.waited_s)
        for problem in problems_of(case, answer):
            self._find(case, problem)

    def _find(self, case: Case, problem: str) -> None:
        self._findings.append(Finding(case, problem))


def problems_of(case: Case, answer: Answer) -> Iterator[str]:
    """What is wrong with an answer."""
    status = answer.status
    if status == 0 and case.is_whole and case.kind not in _PROTOCOL_KINDS:
        yield "closed without an answer"
    if status >= 500 and status not in {503, 504}:
        yield f"{status}: {answer.body[:300]!r}"
    if status in {429, 503} and not {"retry-after", "retry-after-ms"} <= answer.headers.keys():
        yield f"{status} without Retry-After: {answer.body[:300]!r}"
    if case.kind == "key" and status != 401 and case.method != "HEAD":
        yield f"{status} without a key"
    if b"the gateway failed" in answer.body or b'"internal_error"' in answer.body:
        yield f"a fault of ours within {status}: {answer.body[-500:]!r}"
    if status >= 400 and case.kind not in _PROTOCOL_KINDS and case.method != "HEAD":
        yield from _problems_of_error(answer)


def _problems_of_error(answer: Answer) -> Iterator[str]:
    if len(answer.body) > ERROR_BYTES_MAX:
        yield f"an error of {len(answer.body)} bytes"
    try:
        error = json.loads(answer.body)["error"]
        is_error = {"message", "type", "param", "code"} <= error.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        is_error = False
    if not is_error:
        yield f"{answer.status} without an error object: {answer.body[:300]!r}"
