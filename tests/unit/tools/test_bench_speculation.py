from __future__ import annotations

from pathlib import Path

import pytest

from understudy.tools.bench.speculation import (
    PROMPT_CHARACTERS,
    prompts,
    shortfall,
    summarise,
    ways,
)
from understudy.tools.demo.corpus import read_corpus


def test_prompts_are_pieces_of_what_was_held_out() -> None:
    pieces = list(prompts())
    held_out = [file.text for file in read_corpus().held_out]
    assert len(set(pieces)) == len(pieces) > 500
    assert all(len(piece) == PROMPT_CHARACTERS for piece in pieces)
    assert all(any(piece in text for text in held_out) for piece in pieces)


def test_one_way_is_without_drafts_and_the_others_are_configurations(tmp_path: Path) -> None:
    configs = {way.name: way.config for way in ways(tmp_path)}
    assert configs.pop("off") is None
    assert configs.pop("lookup") == {"method": "ngram"}
    assert all(config is not None and config["model"] for config in configs.values())


def test_the_adaptive_depth_is_held_against_the_best_of_off_and_fixed_ones() -> None:
    rounds = [
        {
            "off": {1: 100.0 + number},
            "lookup": {1: 900.0},
            "draft model": {1: 190.0},
            "depth 3": {1: 200.0},
            "depth 7": {1: 150.0},
        }
        for number in (0, 7, 2)
    ]
    medians = summarise(rounds)
    assert medians["off"] == {1: 102.0}
    assert shortfall(rounds, 1) == pytest.approx(0.05)
