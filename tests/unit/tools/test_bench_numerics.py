from __future__ import annotations

import pytest

from understudy.tools.bench.numerics import summarise


def test_the_cost_is_how_much_longer_the_same_work_takes() -> None:
    found = {"exact": [90.0, 100.0, 500.0], "fast": [110.0, 1.0, 120.0]}
    summary = summarise(found)
    assert summary["tokens_per_s"] == {"exact": 100.0, "fast": 110.0}
    assert summary["cost"] == pytest.approx(1.1)
    assert summary["rounds"] is found
