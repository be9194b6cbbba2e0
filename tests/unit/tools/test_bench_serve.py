"""The flags of ``understudy bench serve``, and its exit statuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy.tools.bench.serve import add_arguments, run
from understudy.tools.bench.servers import Server, bare_server
from understudy.tools.cli import main


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with bare_server("bare", tokens_per_s=0.0) as running:
        yield running


def base_url(server: Server) -> str:
    return f"--base-url=http://{server.target.authority}"


def test_a_closed_run_prints_a_table_and_writes_json(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    flags = ("--concurrency=4", "--num-requests=12", "--output-length=3-5", f"--json={path}")
    assert run(parse(base_url(server), *flags, "--prompt-length=7")) == 0
    output = capsys.readouterr()
    assert "12 sent, 12 completed, 0 failed" in output.out
    assert output.err == ""
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["settings"]["model"] == "bare"
    assert figures["tokens"]["prompt"] == 12 * 7
    assert figures["latencies"]["ttft_s"]["count"] == 12


def test_an_open_run_reports_its_lateness(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--rate=500", "--num-requests=5", "--output-length=2", "--model=any")
    assert run(parse(base_url(server), *flags)) == 0
    output = capsys.readouterr().out
    assert "open, 500 requests/s" in output
    assert "late" in output


def test_a_run_ends_with_its_duration(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--duration=0.05", "--concurrency=2", "--output-length=2")
    assert run(parse(base_url(server), *flags)) == 0
    assert "0 failed" in capsys.readouterr().out


def test_a_run_with_a_failed_request_is_no_success(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--endpoint=chat", "--num-requests=1", "--concurrency=1")
    assert run(parse(base_url(server), *flags)) == 1
    assert "http_404" in capsys.readouterr().out


def test_without_a_server_the_status_is_unavailable(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(parse("--base-url=http://127.0.0.1:1")) == 69
    output = capsys.readouterr()
    assert output.out == ""
    assert "cannot reach http://127.0.0.1:1" in output.err


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--shared-prefix=129", "--shared-prefix"),
        ("--api-key=a\nb", "--api-key"),
        ("--base-url=nowhere", "--base-url"),
        ("--json=/no/such/directory/file", "--json"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_anything_is_sent(
    flag: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(parse(flag)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--concurrency=0",),
        ("--concurrency=5000",),
        ("--rate=0",),
        ("--rate=nan",),
        ("--rate=-1",),
        ("--rate=x",),
        ("--duration=inf",),
        ("--num-requests=1.5",),
        ("--prompt-length=9-3",),
        ("--output-length=0",),
        ("--endpoint=embeddings",),
        ("--rate=1", "--concurrency=1"),
    ],
)
def test_values_out_of_their_limits_are_usage_errors(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*flags)
    assert ended.value.code == 2
    assert flags[-1].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["serve", "sweep", "step", "start"])
def test_the_flags_cost_no_heavy_import(name: str) -> None:
    program = (
        f"import sys, understudy.tools.bench.{name}\n"
        "heavy = {'aiohttp', 'uvloop', 'asyncio', 'torch', 'numpy', 'zmq'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)


@pytest.mark.parametrize("name", ["serve", "sweep", "step", "start"])
def test_no_benchmark_shows_more_than_a_dozen_flags(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"example: understudy bench {name} ")
    flags = [line for line in shown.splitlines() if line.startswith("  -") and "--help" not in line]
    assert 0 < len(flags) <= 12
