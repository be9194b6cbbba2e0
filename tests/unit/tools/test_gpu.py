"""What the GPU's tools say without a card, and how they keep what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.runner import _Latest
from understudy.runtime.model.transformer import Transformer
from understudy.tools.gpu import bench, check
from understudy.tools.gpu.check import Finding
from understudy.tools.gpu.engine_checks import compare_overlap
from understudy.tools.gpu.shapes import LLAMA_3_8B, QWEN_2_5_05B, QWEN_2_5_7B, random_model

ROOT = Path(__file__).parents[3]
H200 = bench.Card(bytes_per_s=4.3e12, operations_per_s=790e12)


@pytest.mark.parametrize("main", [check.main, bench.main])
def test_without_a_card_they_say_so(
    main: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main() == 69  # type: ignore[operator]
    assert "no GPU" in capsys.readouterr().err


def test_they_start_from_a_checkout_that_is_not_installed() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu_check", "--help"],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert "example: python tools/gpu_check" in done.stdout


def test_a_check_that_breaks_is_a_bad_one_and_keeps_what_it_found() -> None:
    def broken(_: torch.device) -> Iterator[Finding]:
        yield Finding("one", 0.5, 1.0)
        yield Finding("nothing", float("nan"), 1.0)
        raise RuntimeError("no more")

    rows = check._run("some", broken, torch.device("cpu"))
    assert [row["ok"] for row in rows] == [True, False, False]
    assert rows[-1]["error"] == "RuntimeError: no more"


def test_rows_are_written_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    path = tmp_path / "rows.json"
    report = bench.Report(path, 1000.0)
    report.try_to("good", lambda: {"device_ms": 1.23456})
    assert json.loads(path.read_text()) == [{"row": "good", "device_ms": 1.23456}]

    def out_of_memory() -> bench.Row:
        raise torch.OutOfMemoryError("too much")

    report.try_to("bad", out_of_memory)
    late = bench.Report(path, 0.0)
    late.try_to("late", out_of_memory)
    assert report.rows[1]["error"] == "OutOfMemoryError: too much"
    assert json.loads(path.read_text()) == [{"row": "late", "skipped": "no time left"}]
    assert "row=good  device_ms=1.235" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "tokens", "context", "form", "floor_ms"),
    [
        (LLAMA_3_8B, 1, 1024, bench.Form(), 3.52),
        (LLAMA_3_8B, 128, 1024, bench.Form(), 7.49),
        (LLAMA_3_8B, 256, 1024, bench.Form(), 12.9),
        (LLAMA_3_8B, 1, 1024, bench.Form("int8"), 1.78),
        (LLAMA_3_8B, 128, 1024, bench.Form("int8"), 5.74),
        (LLAMA_3_8B, 128, 1024, bench.Form("int8", torch.int8), 3.79),
        (QWEN_2_5_7B, 1, 1024, bench.Form(), 3.30),
        (QWEN_2_5_7B, 128, 1024, bench.Form(), 5.04),
        (QWEN_2_5_05B, 1, 1024, bench.Form(), 0.23),
    ],
)
def test_floors_are_those_that_were_worked_out_by_hand(
    config: ModelConfig, tokens: int, context: int, form: bench.Form, floor_ms: float
) -> None:
    found = bench._floor_ms(config, H200, form, tokens=tokens, sampled=tokens, context=context)
    assert found == pytest.approx(floor_ms, rel=0.03)


@pytest.mark.parametrize(("length", "floor_ms"), [(2048, 37.6), (8192, 167.0)])
def test_floors_of_prompts(length: int, floor_ms: float) -> None:
    found = bench._floor_ms(
        LLAMA_3_8B, H200, bench.Form(), tokens=length, sampled=1, context=length
    )
    assert found == pytest.approx(floor_ms, rel=0.03)


TINY = replace(QWEN_2_5_05B, num_layers=2, hidden_size=28, intermediate_size=36, vocab_size=150)


def tiny_model() -> Transformer:
    return random_model(TINY, torch.device("cpu"), numerics="exact")


def test_the_check_of_overlapping_steps_holds_without_a_card_as_well() -> None:
    found = compare_overlap("here", tiny_model(), count=12)
    assert found == Finding("here", 0, 0)


def test_the_check_of_overlapping_steps_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = _Latest.tokens
    monkeypatch.setattr(_Latest, "tokens", lambda *given: tokens(*given) ^ 1)
    assert compare_overlap("here", tiny_model(), count=12).found > 3


def test_the_whole_run_and_steps_of_the_benchmark_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_RUN_SEQUENCES", 5)
    monkeypatch.setattr(bench, "_RUN_TOKENS", (3, 20))
    monkeypatch.setattr(bench, "_warm_up", lambda model, runner: None)
    row = bench._run(tiny_model())
    assert row["tokens_per_s"] > 0
    assert row["ahead_share"] == 0, "not here"
    monkeypatch.setattr(bench, "_CONTEXT", 40)
    monkeypatch.setattr(bench, "_median_ms", bench._wall_ms)
    row = bench._decode(tiny_model(), H200, 4, bench.Form())
    assert row["overlapped_ms"] > 0
    assert row["step_ms"] > 0
