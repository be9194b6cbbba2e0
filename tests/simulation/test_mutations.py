"""Planted bugs can still be planted; whether they are found takes minutes."""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS, Mutation, found_by, problem_with


def test_every_bug_can_still_be_planted() -> None:
    assert len(MUTATIONS) >= 30
    assert [problem for mutation in MUTATIONS if (problem := problem_with(mutation))] == []


@pytest.mark.soak
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_planted_bug_is_found(mutation: Mutation) -> None:
    assert found_by(mutation)
