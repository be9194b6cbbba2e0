"""What a run says to people and to programs."""

from __future__ import annotations

import json

import pytest

from understudy.tools.bench.client import Ending
from understudy.tools.bench.events import CompletionStream, Failure
from understudy.tools.bench.load import Exchange, Measurements
from understudy.tools.bench.report import (
    ServeReport,
    make_report,
    render_report,
    render_table,
    report_json,
    report_object,
)
from understudy.tools.bench.workload import LoadRequest


def exchange(
    *,
    started_at_s: float = 0.0,
    first_s: float = 1.0,
    gaps_s: list[float] | None = None,
    ended_at_s: float = 4.0,
    failure: Failure | None = None,
    lateness_s: float | None = None,
) -> Exchange:
    stream = CompletionStream()
    stream.first_token_at_s = first_s
    stream.gaps_s = [1.0, 2.0] if gaps_s is None else gaps_s
    stream.last_token_at_s = first_s + sum(stream.gaps_s)
    stream.arrivals = len(stream.gaps_s) + 1
    stream.num_prompt_tokens, stream.num_completion_tokens = 10, 4
    ending = Ending(ended_at_s, failure)
    return Exchange(LoadRequest(0, b"{}", 4), started_at_s, lateness_s, stream, ending)


def report(*exchanges: Exchange) -> ServeReport:
    measurements = Measurements()
    for one in exchanges:
        measurements.record(one)
    return make_report({"model": "m", "seed": 0}, measurements, client_cpu_s=80e-6)


def test_the_figures_are_computed_as_defined() -> None:
    figures = report_object(
        report(exchange(), exchange(started_at_s=0.5, first_s=1.0, ended_at_s=5.0))
    )
    assert figures["wall_s"] == 5.0
    assert figures["requests"] == {"sent": 2, "completed": 2, "failed": 0, "per_s": 0.4}
    assert figures["tokens"] == {
        "prompt": 20,
        "prompt_per_s": 4.0,
        "output": 8,
        "output_per_s": 1.6,
        "per_arrival": pytest.approx(8 / 6),
    }
    latencies = figures["latencies"]
    assert latencies["ttft_s"]["mean"] == 0.75
    assert latencies["itl_s"]["count"] == 4
    assert latencies["itl_s"]["p50"] == 1.5
    assert latencies["tpot_s"]["max"] == 1.0
    assert latencies["e2e_s"]["max"] == 4.5
    assert "lateness_s" not in latencies
    assert figures["client_cpu_us_per_token"] == pytest.approx(10.0)


def test_a_failed_request_counts_by_its_kind_and_for_nothing_else() -> None:
    figures = report_object(
        report(
            exchange(),
            exchange(failure=Failure("stream_cut", "first"), ended_at_s=9.0),
            exchange(failure=Failure("stream_cut", "second")),
            exchange(failure=Failure("http_503", "busy")),
        )
    )
    assert figures["requests"]["sent"] == 4
    assert figures["requests"]["completed"] == 1
    assert figures["requests"]["failed"] == 3
    assert figures["errors"] == {"stream_cut": 2, "http_503": 1}
    assert figures["error_examples"] == {"stream_cut": "first", "http_503": "busy"}
    assert figures["tokens"]["output"] == 4
    assert figures["latencies"]["e2e_s"]["count"] == 1
    assert figures["wall_s"] == 9.0


def test_an_open_loop_reports_how_late_it_was() -> None:
    figures = report_object(report(exchange(lateness_s=0.25)))
    assert figures["latencies"]["lateness_s"]["max"] == 0.25


def test_without_usage_the_prompt_tokens_are_unknown() -> None:
    one = exchange()
    one.stream.num_prompt_tokens = None
    figures = report(one)
    assert report_object(figures)["tokens"]["prompt"] is None
    assert "unknown tokens/s in" in render_report(figures)


def test_a_run_in_which_nothing_was_measured_still_renders() -> None:
    empty = report()
    assert json.loads(report_json(report_object(empty)))["latencies"]["ttft_s"] is None
    text = render_report(empty)
    assert "0 sent, 0 completed, 0 failed" in text
    assert "TTFT     -" in text


def test_the_table_shows_milliseconds_rates_and_errors() -> None:
    text = render_report(report(exchange(), exchange(failure=Failure("http_503", "busy"))))
    assert "model m  seed 0" in text
    assert "2 sent, 1 completed, 1 failed in 4.00 s" in text
    assert "1.0 tokens/s out, 2.5 tokens/s in" in text
    ttft = next(line for line in text.splitlines() if line.startswith("TTFT"))
    assert ttft.split()[1] == "1,000.00"
    assert "http_503      1" in text
    assert text.endswith("first http_503: busy")


def test_columns_line_up() -> None:
    table = render_table(("name", "n"), [("a", "1"), ("longer", "1,000")])
    assert table.splitlines() == ["name        n", "a           1", "longer  1,000"]


def test_json_is_strict_and_ends_with_a_newline() -> None:
    assert report_json({"a": 1}) == '{\n  "a": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        report_json({"a": float("nan")})
