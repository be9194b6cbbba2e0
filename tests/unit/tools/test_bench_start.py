"""What ``understudy bench start`` makes of its starts, and how it looks at the page cache."""

from __future__ import annotations

from pathlib import Path

from understudy.tools.bench.start import (
    HEADINGS,
    Start,
    drop_from_cache,
    medians,
    resident_share,
    table_rows,
)

STARTS = (
    Start("warm", 1.0, 2.0, 3.0),
    Start("cold", 0.0, 4.0, 5.0),
    Start("warm", 1.0, 1.0, 9.0),
    Start("cold", None, 4.5, 5.5),
    Start("warm", 0.9, 3.0, 4.0),
)


def test_each_kind_of_start_has_its_medians() -> None:
    found = medians(STARTS)
    assert list(found) == ["warm", "cold"]
    assert found["warm"] == {
        "starts": 3,
        "resident": 1.0,
        "ready_s": 2.0,
        "first_token_s": 4.0,
        "first_token_s_max": 9.0,
    }
    assert found["cold"]["resident"] == 0.0


def test_a_row_has_a_cell_for_each_heading() -> None:
    rows = table_rows(STARTS)
    assert rows[0] == ("warm", "3", "100%", "2.00", "4.00", "9.00")
    assert len(rows[0]) == len(HEADINGS)
    assert table_rows([Start("cold", None, 1.0, 1.0)])[0][2] == "-"


def test_a_file_that_was_just_written_is_in_the_cache_and_dropping_harms_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 1024)
    share = resident_share([path])
    # Not every file system can say.
    assert share is None or 0.0 <= share <= 1.0
    drop_from_cache(path)
    assert path.read_bytes() == bytes(range(256)) * 1024


def test_no_files_have_no_share() -> None:
    assert resident_share([]) is None
