"""The command line as an operator meets it: what it prints, where, and its exit statuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, clean_environment, empty_cluster, run_understudy, running_cluster
from understudy.tools.control import State


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One cluster for the tests that only look at it."""
    with running_cluster() as running:
        yield running


@pytest.fixture
def nothing() -> Iterator[Cluster]:
    """A run directory in which nothing runs."""
    with empty_cluster() as empty:
        yield empty


def test_help_starts_with_an_example_and_goes_to_stdout() -> None:
    for words in ((), ("start",), ("status",), ("engine",), ("config", "show"), ("bench", "serve")):
        done = run_understudy(*words, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith("example: understudy ")
        assert done.stderr == ""


@pytest.mark.parametrize("command", ["start", "stop", "status", "engine", "supervisor", "gateway"])
def test_no_command_shows_more_than_a_dozen_flags(command: str) -> None:
    flags = [
        line for line in run_understudy(command, "--help").stdout.splitlines() if "  --" in line
    ]
    assert 0 < len(flags) <= 12


def test_version_is_the_packages() -> None:
    done = run_understudy("--version")
    assert (done.returncode, done.stdout) == (0, "understudy 0.1.0\n")


@pytest.mark.parametrize(
    "words", [(), ("strat",), ("start", "--prot", "1"), ("status", "--jso"), ("config",)]
)
def test_wrong_usage_ends_with_2_and_says_so_on_stderr(words: tuple[str, ...]) -> None:
    done = run_understudy(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: understudy" in done.stderr


def test_all_configuration_errors_are_told_at_once_with_78(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("prot = 1\nblock-size = 0\n")
    done = run_understudy(
        *("start", "--config", str(file), "--port", "x", "--model", str(tmp_path)),
        environment={"UNDERSTUDY_DTYPE": "int3"},
    )
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines() == [
        f"understudy: {file}: unknown key 'prot'; did you mean port?",
        f"understudy: {file}: block-size: expected 1 to 1024, got 0",
        "understudy: UNDERSTUDY_DTYPE: expected one of auto, float32, bfloat16, got 'int3'",
        "understudy: --port: expected a whole number, got 'x'",
        f"understudy: {tmp_path}: not a model directory: no config.json",
    ]


def test_config_check_tells_what_start_would_tell(tmp_path: Path) -> None:
    assert run_understudy("config", "check").returncode == 0
    done = run_understudy("config", "check", "--model", str(tmp_path))
    assert done.returncode == 78
    assert done.stderr == f"understudy: {tmp_path}: not a model directory: no config.json\n"


def test_config_show_gives_a_file_that_gives_the_same_again(tmp_path: Path) -> None:
    first = run_understudy("config", "show", "--port", "77", "--kv-cache-memory", "1GiB")
    assert first.returncode == 0
    assert "\nport = 77\n" in first.stdout
    assert "\nkv-cache-memory = 1073741824\n" in first.stdout
    file = tmp_path / "config.toml"
    file.write_text(first.stdout)
    again = run_understudy("config", "show", "--config", str(file))
    assert again.stdout == first.stdout


def test_config_show_says_where_each_value_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("host = '::1'\n")
    done = run_understudy(
        *("config", "show", "--origin", "--config", str(file), "--port", "77"),
        environment={"UNDERSTUDY_QUEUE_MAX": "5"},
    )
    origins = {
        line.split()[0]: line.rpartition("# ")[2]
        for line in done.stdout.splitlines()
        if not line.startswith("#")
    }
    assert origins["host"] == str(file)
    assert origins["port"] == "flag"
    assert origins["queue-max"] == "UNDERSTUDY_QUEUE_MAX"
    assert origins["block-size"] == "default"


def test_status_of_a_serving_cluster_is_a_table_and_0(cluster: Cluster) -> None:
    done = cluster.run("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("understudy-demo: serving, up ")
    lines = [line.split() for line in done.stdout.splitlines()]
    for name, pid in cluster.pids().items():
        if name != "supervisor":
            assert any(line[:1] == [name] and str(pid) in line for line in lines)


def test_status_as_json_is_for_programs(cluster: Cluster) -> None:
    done = cluster.run("status", "--json")
    body = json.loads(done.stdout)
    assert done.returncode == 0
    assert body["state"] == "serving"
    assert [engine["name"] for engine in body["engines"]] == ["engine-0", "engine-1"]
    assert [engine["state"] for engine in body["engines"]] == ["serving", "serving"]
    assert body["gateways"][0]["address"].startswith("127.0.0.1:")


def test_the_word_engine_is_in_the_command_line_of_an_engine(cluster: Cluster) -> None:
    pids = cluster.pids()
    for name in ("engine-0", "engine-1"):
        words = Path(f"/proc/{pids[name]}/cmdline").read_bytes().split(b"\0")
        assert b"engine" in words
        assert f"--name={name}".encode() in words


def test_a_supervisor_that_does_not_answer_makes_status_unknown(nothing: Cluster) -> None:
    nothing.start("supervisor")
    nothing.wait_until(lambda report: report.reply is not None)
    os.kill(nothing.launcher.pid, signal.SIGSTOP)
    try:
        done = nothing.run("status")
        assert done.returncode == 4
        assert done.stderr == "unknown: the supervisor does not answer\n"
        assert json.loads(nothing.run("status", "--json").stdout)["state"] == "unknown"
    finally:
        os.kill(nothing.launcher.pid, signal.SIGCONT)


def test_status_and_stop_where_nothing_runs_say_so_with_3(nothing: Cluster) -> None:
    done = nothing.run("status")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"not running: nothing runs in {nothing.run_dir}\n"
    done = nothing.run("stop")
    assert done.returncode == 3
    assert done.stderr == f"not running: no launcher in {nothing.run_dir}\n"


def test_a_mistake_in_the_configuration_does_not_hide_how_the_cluster_is(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"prot = 1\nrun-dir = '{tmp_path}/run'\n")
    done = run_understudy("status", "--config", str(file))
    assert done.returncode == 3
    assert f"nothing runs in {tmp_path}/run" in done.stderr


def test_actors_started_one_by_one_make_a_cluster(nothing: Cluster) -> None:
    nothing.start("supervisor")
    degraded = nothing.wait_until(lambda report: report.reply is not None)
    assert degraded.state is State.DEGRADED
    assert degraded.reason == "no engine has joined, no gateway has joined"
    assert nothing.run("status").returncode == 1
    nothing.start("engine", "--engine=echo", "--name=engine-7")
    nothing.start("gateway", "--port=0")
    nothing.wait_until_serving(engines=1)
    assert nothing.engine("engine-7").state == "serving"


def test_a_second_supervisor_in_a_run_directory_is_refused_in_one_line(nothing: Cluster) -> None:
    nothing.start("supervisor")
    nothing.wait_until(lambda report: report.reply is not None)
    done = nothing.run("supervisor")
    assert done.returncode == 69
    assert done.stderr == (
        f"a supervisor already runs in {nothing.run_dir} (process {nothing.launcher.pid})\n"
    )
    assert nothing.report().reply is not None


@pytest.mark.parametrize("role", ["supervisor", "engine", "gateway"])
def test_an_actor_alone_ends_with_0_when_it_is_told_to_stop(nothing: Cluster, role: str) -> None:
    flags = {"engine": ["--engine=echo"], "gateway": ["--port=0"]}.get(role, [])
    nothing.start("supervisor")
    nothing.wait_until(lambda report: report.reply is not None)
    if role == "supervisor":
        nothing.launcher.send_signal(signal.SIGTERM)
        assert nothing.wait_for_end() == 0
        return
    nothing.start(role, *flags)
    joined = nothing.wait_until(
        lambda report: (
            report.reply is not None
            and bool(report.reply.engines if role == "engine" else report.reply.gateways)
        )
    )
    assert joined.reply is not None
    process = nothing.processes[1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_detached_start_comes_back_when_ready_and_stop_ends_it(nothing: Cluster) -> None:
    done = nothing.run("start", "--engine=echo", "--port=0", "--detach")
    assert done.returncode == 0, done.stderr
    address = nothing.reply().gateways[0].address
    assert done.stderr == (
        f"understudy is ready: 1 engine serves understudy-demo at http://{address}/v1\n"
        f"to stop it: understudy stop --run-dir {nothing.run_dir}\n"
    )
    assert (nothing.run_dir / "understudy.log").stat().st_mode & 0o777 == 0o600
    assert nothing.run("stop").returncode == 0
    assert nothing.report().state is State.NOT_RUNNING
    assert not nothing.leftovers()


def test_detached_start_gives_the_failures_line_and_status(nothing: Cluster) -> None:
    done = nothing.run("start", "--engine=echo", "--port=0", "--host=203.0.113.1", "--detach")
    assert done.returncode == 78
    assert done.stderr.startswith("cannot listen on 203.0.113.1:0: ")
    assert len(done.stderr.splitlines()) == 1
    assert not nothing.leftovers()


ECHO = {"UNDERSTUDY_ENGINE": "echo", "UNDERSTUDY_ECHO_TOKENS_PER_S": "200"}


def test_demo_kills_the_engine_in_the_middle_and_ends_with_the_same_bytes() -> None:
    done = run_understudy("demo", environment=ECHO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^── kill -9 \d+: that was engine-[01], ", done.stdout, re.MULTILINE)
    assert re.search(r"^── engine-[01] goes on, \d+ ms later$", done.stdout, re.MULTILINE)
    hashes = re.findall(r"^SHA-256, .*: +([0-9a-f]{64})$", done.stdout, re.MULTILINE)
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
    assert "\n── The same bytes. engine-" in done.stdout
    assert "\033" not in done.stdout


def test_demo_that_stays_says_what_to_try_and_ends_with_0_when_interrupted() -> None:
    command = [sys.executable, "-m", "understudy.tools.cli", "demo", "--stay"]
    with subprocess.Popen(
        command, env=clean_environment() | ECHO, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("To stop:"):
            lines.append(demo.stdout.readline())
            assert lines[-1], lines
        run_dir = Path(lines[-1].split("--run-dir ")[1].strip())
        said = "".join(lines)
        (url,) = set(re.findall(r"http://[\w.:]+/v1", said))
        with urllib.request.urlopen(f"{url}/models", timeout=60) as response:
            assert json.load(response)["data"][0]["id"] == "understudy-demo"
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
    assert not run_dir.exists()
