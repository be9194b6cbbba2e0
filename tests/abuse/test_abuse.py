"""A short part of the abuse for every run of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.abuse.__main__ import told
from tests.abuse.cases import Cases
from tests.abuse.requests import Abuse
from tests.abuse.stage import Stage, on_stage

SEED = 20
CASES = 400


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with on_stage() as stage:
        yield stage


def test_nothing_that_is_sent_hurts_anybody(stage: Stage) -> None:
    cases = Cases(stage.document(), SEED)
    outcome = Abuse(stage, cases, connections=4).run(range(CASES), seed=SEED)
    report = told(outcome, f"python -m tests.abuse --seed {SEED}")
    assert not outcome.findings, report
    assert not outcome.problems, report
    assert outcome.statuses[400] > CASES / 2
    assert outcome.statuses[200] > 0
    assert outcome.num_beside > 0


def test_a_case_is_the_same_whenever_it_is_drawn(stage: Stage) -> None:
    document = stage.document()
    once, again = Cases(document, SEED), Cases(document, SEED)
    numbers = [*range(300)]
    first = [once.case(number) for number in numbers]
    assert first == [again.case(number) for number in reversed(numbers)][::-1]
    assert len({case.kind for case in first}) == 12
    paths = {path.partition("{")[0] for path in document["paths"]}
    targets = "\n".join(once.case(number).target for number in range(3000))
    assert not [path for path in paths if path not in targets]
