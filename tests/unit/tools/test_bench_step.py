"""The plans of ``understudy bench step``, and its tables."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import FAMILIES, write_checkpoint
from understudy.runtime.model.checkpoint import Checkpoint
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.quantization_config import Quantization
from understudy.tools.bench.limits import num_weights, weight_bytes
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
        "limits": None,
    }
    lines = [line.split() for line in render(figures).splitlines()]
    assert ["128", "512"] in lines
    assert ["1", "10.00", "20.00"] in lines
    assert ["8", "30.00", "-"] in lines
    assert ["128", "500.00", "256.00"] in lines
    assert ["4096", "-", "-"] in lines


def test_steps_stand_beside_what_the_machine_can_do() -> None:
    figures = {
        "decode": [taken(1, 1, 127, 0.05), taken(1, 1, 511, 0.1)],
        "prefill": [taken(1, 128, 0, 0.5), taken(1, 512, 0, 1.0)],
        "weight_bytes": 1_000_000_000,
        "operations_a_prompt_token": 700_000_000,
        "limits": {
            "read_bytes_per_s": 25e9,
            "float32_flop_per_s": 250e9,
            "bfloat16_flop_per_s": 60e9,
            "int8_op_per_s": 425e9,
        },
    }
    told = render(figures).splitlines()[-3:]
    assert told[0].endswith(
        "reads 25.0 GB/s, multiplies 250 (float32), 60 (bfloat16), 425 (int8) G/s"
    )
    assert told[1].endswith(" 20.0 GB/s, 80%")
    assert " 358 G/s" in told[2]
    quantised = figures | {"weight_bytes": None}
    assert "GB/s, 80%" not in render(quantised)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_step_reads_every_weight_once(tmp_path: Path, quantization: Quantization) -> None:
    directory = write_checkpoint(tmp_path, FAMILIES["llama"])
    config = ModelConfig.from_directory(directory)
    stored = Checkpoint.open(directory).tensors
    in_linears = [name for name in stored if "proj" in name or name == "lm_head.weight"]
    count = sum(math.prod(stored[name].shape) for name in in_linears)
    assert sum(num_weights(config)) == count
    assert num_weights(config)[1] == math.prod(stored["lm_head.weight"].shape)
    num_bytes = weight_bytes(directory, config, quantization)
    assert num_bytes is not None
    if quantization == "int4":
        assert 5 / 8 * count < num_bytes < count
    else:
        each = stored["lm_head.weight"].dtype.itemsize if quantization == "none" else 1
        assert num_bytes == each * count


def test_a_file_in_no_directory_starts_no_child(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(parse("--json=/no/such/directory/file")) == 2
    assert "--json" in capsys.readouterr().err
