"""A short part of chaos for every run of the tests, and all of it as a soak."""

from __future__ import annotations

import pytest

from tests.chaos.figures import CLIENTS, Size
from tests.chaos.scenarios import SCENARIOS

SHORT = Size(clients=12, max_tokens=100, repeats=1, engine="echo", seed=11)
LONG = Size(clients=CLIENTS, max_tokens=240, repeats=2, engine="echo", seed=12)


def check(name: str, size: Size) -> None:
    for figure in SCENARIOS[name](size):
        # Times are measured by `python -m tests.chaos`; on a busy machine they prove nothing.
        assert figure.is_right, f"{figure.what}: {figure.measured}, wanted {figure.wanted}"


@pytest.mark.parametrize("name", ["F1", "F9", "F19"])
def test_clients_cannot_tell_a_short_run_with_faults_from_one_without(name: str) -> None:
    check(name, SHORT)


@pytest.mark.soak
@pytest.mark.parametrize("name", SCENARIOS)
def test_clients_cannot_tell_a_long_run_with_faults_from_one_without(name: str) -> None:
    check(name, LONG)
