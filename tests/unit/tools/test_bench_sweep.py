"""The loads of ``understudy bench sweep``, and its table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy.tools.bench.servers import Server, bare_server
from understudy.tools.bench.sweep import (
    DEFAULT_CONCURRENCIES,
    Point,
    add_arguments,
    headings,
    points,
    run,
    table_row,
)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with bare_server("bare", tokens_per_s=0.0) as running:
        yield running


def test_a_load_is_a_concurrency_or_a_rate() -> None:
    assert points(parse("--concurrency=4,1")) == [Point(4, None), Point(1, None)]
    assert points(parse("--rate=0.5,20")) == [Point(None, 0.5), Point(None, 20.0)]
    assert points(parse()) == [Point(number, None) for number in DEFAULT_CONCURRENCIES]
    assert [Point(4, None).name, Point(None, 0.5).name] == ["4", "0.5/s"]


def test_both_at_once_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--concurrency=1", "--rate=1")
    assert "not allowed with" in capsys.readouterr().err


def test_a_row_has_a_cell_for_each_heading() -> None:
    summary = {"p50": 0.001, "p99": 0.5}
    figures = {
        "requests": {"completed": 1234, "failed": 1},
        "tokens": {"output_per_s": 98.76},
        "latencies": {"ttft_s": summary, "itl_s": None, "e2e_s": summary},
    }
    row = table_row(Point(2, None), figures)
    assert list(row) == ["2", "1,234", "1", "98.8", "1.0", "500.0", "-", "-", "1.0", "500.0"]
    assert len(row) == len(headings())


def test_every_load_gets_its_row(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.json"
    words = ("--concurrency=1,2", "--duration=0.02", "--output-length=2", f"--json={path}")
    assert run(parse(f"--base-url=http://{server.target.authority}", *words)) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["load", "1", "2"]
    figures = json.loads(path.read_text(encoding="utf-8"))["points"]
    assert [point["load"]["concurrency"] for point in figures] == [1, 2]
    assert [point["settings"]["seed"] for point in figures] == [0, 1]


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("--base-url=nowhere", 2),
        ("--shared-prefix=129", 2),
        ("--json=/no/such/directory/file", 2),
        ("--base-url=http://127.0.0.1:1", 69),
    ],
)
def test_what_cannot_be_has_its_exit_status(
    word: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(parse(word)) == status
    assert capsys.readouterr().err.startswith("understudy bench sweep: ")
