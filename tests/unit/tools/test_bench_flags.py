"""What the benchmarks' flags take."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from understudy.tools.bench import flags


def test_items_come_in_the_order_given() -> None:
    assert flags.several(flags.count(100))("8, 1,32") == (8, 1, 32)
    assert flags.several(flags.positive(10.0))("0.5") == (0.5,)


@pytest.mark.parametrize(
    "text", ["", "1,", "1,x", "0", "1,1", "101", ",".join(map(str, range(70)))]
)
def test_what_is_no_list_of_numbers_is_a_usage_error(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        flags.several(flags.count(100))(text)


@pytest.mark.parametrize("text", ["nan", "0", "-1", "11", "inf", "x"])
def test_a_number_out_of_its_limits_is_a_usage_error(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number above 0"):
        flags.positive(10.0)(text)


def test_a_file_is_refused_before_anything_is_measured_if_its_directory_is_not_there(
    tmp_path: Path,
) -> None:
    assert flags.json_problem(None) is None
    assert flags.json_problem(Path("figures.json")) is None
    assert flags.json_problem(tmp_path / "figures.json") is None
    assert "no directory" in str(flags.json_problem(tmp_path / "none" / "figures.json"))
