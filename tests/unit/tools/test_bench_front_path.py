"""The pure parts of the front-path measurement, and one short measurement of the bare server."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from understudy.tools.bench.client import Ending
from understudy.tools.bench.events import CompletionStream, Failure
from understudy.tools.bench.front_path import (
    BARE,
    LONE,
    PACED,
    SATURATED,
    Delays,
    Figures,
    Load,
    against_bare,
    measure,
    medians,
    render,
    summarise,
)
from understudy.tools.bench.load import Exchange
from understudy.tools.bench.servers import ServerFailed, bare_server, serving_address
from understudy.tools.bench.workload import LoadRequest


def exchange(
    first_s: float | None, gaps_s: list[float], failure: Failure | None = None
) -> Exchange:
    stream = CompletionStream()
    stream.first_token_at_s = first_s
    stream.gaps_s = gaps_s
    return Exchange(LoadRequest(0, b"", 1), 0.0, None, stream, Ending(9.0, failure))


def test_a_delay_is_what_has_passed_since_the_last_step_ended() -> None:
    delays = Delays(0.5)
    delays.record(exchange(10.125, [0.5, 0.625]))
    delays.record(exchange(None, []))
    delays.record(exchange(10.4, [], Failure("stream_cut", "")))
    summary = delays.samples.summary()
    assert summary is not None
    assert summary.count == 3
    assert (summary.p50, summary.max) == (0.125, 0.25)


def test_medians_are_taken_figure_by_figure() -> None:
    rounds: list[Figures] = [{"a": 3.0, "b": 1.0}, {"a": 1.0}, {"a": 2.0, "b": 5.0}]
    assert medians(rounds) == {"a": 2.0, "b": 1.0}


def test_a_server_is_compared_by_ratio_of_rates_and_difference_of_latencies() -> None:
    bare = {"tokens_per_s": 1000.0, "ttft_p50_ms": 1.0}
    figures = {"tokens_per_s": 600.0, "ttft_p50_ms": 1.5, "itl_p50_ms": 9.0}
    assert against_bare(figures, bare) == {"tokens_per_s_ratio": 0.6, "added_ttft_p50_ms": 0.5}


def test_the_summary_renders_and_is_json() -> None:
    figures = {"tokens_per_s": 10.0, "ttft_p50_ms": 2.0, "client_cpu_us_per_token": 3.0}
    results = {
        load.name: {BARE: [figures], "understudy, 1 engine": [figures | {"tokens_per_s": 5.0}]}
        for load in (SATURATED, PACED, LONE)
    }
    summary = summarise(results)
    assert json.loads(json.dumps(summary))["loads"][SATURATED.name][BARE]["rounds"] == [figures]
    text = render(summary)
    assert "understudy, 1 engine" in text
    assert " 0.50 " in text


@pytest.mark.parametrize(
    ("engines", "addresses", "expected"),
    [
        (["serving", "serving"], ["127.0.0.1:1"], "127.0.0.1:1"),
        (["serving", "starting"], ["127.0.0.1:1"], None),
        (["serving", "serving"], [""], None),
        (["serving", "serving"], [], None),
    ],
)
def test_a_cluster_is_up_when_all_engines_serve_and_the_gateway_listens(
    engines: list[str], addresses: list[str], expected: str | None
) -> None:
    status = {
        "engines": [{"state": state} for state in engines],
        "gateways": [{"address": address} for address in addresses],
    }
    assert serving_address(msgspec.json.encode(status), 2) == expected


@pytest.mark.parametrize("status", [b"", b"[]", b"{}", b'{"engines":[{}],"gateways":[]}'])
def test_a_status_that_says_something_else_is_not_up(status: bytes) -> None:
    assert serving_address(status, 1) is None


def test_the_bare_server_streams_in_steps_and_its_processor_time_is_counted() -> None:
    load = Load("short", "short", 4, 5, 0.2, 100.0)
    with bare_server("bare", tokens_per_s=load.tokens_per_s) as server:
        figures = asyncio.run(measure(server, load, model="bare", seed=0))
        assert set(server.cpu_s_by_role()) == {"other"}
    assert figures["tokens_per_s"] > 0.0
    assert 0.0 <= figures["delay_p50_ms"] <= 10.0
    assert figures["other_cpu_us_per_token"] >= 0.0


def test_figures_of_a_run_with_errors_are_refused() -> None:
    load = Load("short", "short", 1, 1, 0.05, 0.0)
    with bare_server("bare", tokens_per_s=0.0) as server:
        faulty = server._replace(target=server.target._replace(path_prefix="/nowhere"))
        with pytest.raises(ServerFailed, match="http_404"):
            asyncio.run(measure(faulty, load, model="bare", seed=0))
