"""The plans of ``understudy bench step``, and its tables."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from understudy.tools.bench.step import add_arguments, child_flags, make_plan, render, run


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def taken(size: int, tokens: int, context: int, median_s: float | None) -> dict[str, Any]:
    return {
        "num_sequences": size,
        "num_tokens_each": tokens,
        "context": context,
        "median_s": median_s,
        "min_s": median_s,
    }


def test_the_child_gets_the_same_arguments() -> None:
    words = ("--model=/a b", "--threads=2", "--batch-sizes=4,2", "--repeats=3", "--json=x.json")
    arguments = parse(*words)
    assert parse(*child_flags(arguments)) == arguments
    assert parse(*child_flags(parse())) == parse()


def test_a_step_computes_what_was_asked_for_in_blocks_of_its_own() -> None:
    plan = make_plan(num_sequences=3, num_tokens_each=1, context=31, block_size=16, vocab_size=50)
    assert plan.num_tokens == 3
    assert [s.sequence.block_table for s in plan.scheduled] == [[0, 1], [2, 3], [4, 5]]
    assert all(scheduled.samples for scheduled in plan.scheduled)
    assert all(max(s.sequence.token_ids) < 50 for s in plan.scheduled)


def test_the_tables_show_what_did_not_fit_as_a_dash() -> None:
    figures = {
        "decode": [
            *(taken(1, 1, 127, 0.01), taken(1, 1, 511, 0.02)),
            *(taken(8, 1, 127, 0.03), taken(8, 1, 511, None)),
        ],
        "prefill": [taken(1, 128, 0, 0.5), taken(1, 4096, 0, None)],
    }
    lines = [line.split() for line in render(figures).splitlines()]
    assert ["128", "512"] in lines
    assert ["1", "10.00", "20.00"] in lines
    assert ["8", "30.00", "-"] in lines
    assert ["128", "500.00", "256.00"] in lines
    assert ["4096", "-", "-"] in lines


def test_a_file_in_no_directory_starts_no_child(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(parse("--json=/no/such/directory/file")) == 2
    assert "--json" in capsys.readouterr().err
