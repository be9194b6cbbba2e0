"""Cost tables are measured once for a model and a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.runtime.model.cost_cache import remembered_costs
from understudy.runtime.scheduling.speculation import CostTable


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    return tmp_path


class Measuring:
    """Counts how often somebody measures."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> tuple[CostTable, ...]:
        self.count += 1
        return CostTable([(1, 0.5), (8, 0.75)]), CostTable([(1, 0.25)])


def points(name: str, measure: Measuring) -> list[list[tuple[int, float]]]:
    return [table.points for table in remembered_costs(name, measure)]


def test_what_was_measured_is_found_again_under_its_name_alone() -> None:
    measure = Measuring()
    first = points("model on machine", measure)
    assert points("model on machine", measure) == first == [[(1, 0.5), (8, 0.75)], [(1, 0.25)]]
    assert measure.count == 1
    points("another", measure)
    assert measure.count == 2


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", "[1]", "[[]]", "[[[1]]]", "[[[0, 1.0]]]", "[[[1, -1.0]]]"),
        *('[[["x", 1.0]]]', "[[[1, 1e999]]]", "[[[1, NaN]]]", "null", "[null]"),
    ],
)
def test_what_is_no_table_is_measured_anew(cache: Path, text: str) -> None:
    measure = Measuring()
    points("name", measure)
    (path,) = cache.iterdir()
    path.write_text(text)
    assert points("name", measure) == points("name", measure)
    assert measure.count == 2


def test_what_others_may_write_is_measured_anew(cache: Path) -> None:
    measure = Measuring()
    points("name", measure)
    (path,) = cache.iterdir()
    path.chmod(0o666)
    points("name", measure)
    assert measure.count == 2
    assert path.stat().st_mode & 0o777 == 0o600


def test_where_nothing_can_be_kept_each_start_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "file" / "below"))
    measure = Measuring()
    assert points("name", measure) == points("name", measure)
    assert measure.count == 2
