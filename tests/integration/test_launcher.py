"""The launcher with real processes: what is killed comes back, and nothing outlives it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.cluster import Cluster, empty_cluster, member_pids, running_cluster
from understudy.tools.control import State


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of one test's own."""
    with running_cluster() as running:
        yield running


@pytest.fixture
def nothing() -> Iterator[Cluster]:
    """A run directory in which nothing runs."""
    with empty_cluster() as empty:
        yield empty


def complete(cluster: Cluster, *, max_tokens: int = 4) -> str:
    """The text of one completion."""
    body = {"model": "understudy-demo", "prompt": "hello", "max_tokens": max_tokens}
    request = urllib.request.Request(
        f"{cluster.base_url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = json.load(response)["choices"][0]["text"]
        return text


def wait_for_successor(cluster: Cluster, name: str, pid: int) -> None:
    """Wait until another process plays the part of this one, and all serve."""
    cluster.wait_until(
        lambda report: report.state is State.SERVING and member_pids(report).get(name, pid) != pid
    )


def test_a_killed_engine_is_back_and_serving(cluster: Cluster) -> None:
    pid = cluster.pids()["engine-0"]
    os.kill(pid, signal.SIGKILL)
    wait_for_successor(cluster, "engine-0", pid)
    assert cluster.engine("engine-0").restarts == 1
    assert cluster.engine("engine-1").restarts == 0
    assert complete(cluster)


def test_a_killed_supervisor_is_back_and_everybody_finds_it(cluster: Cluster) -> None:
    pid, members = cluster.pids()["supervisor"], member_pids(cluster.report())
    os.kill(pid, signal.SIGKILL)
    cluster.wait_until(
        lambda report: (
            report.state is State.SERVING
            and member_pids(report) == members
            and cluster.pids()["supervisor"] != pid
        )
    )
    assert complete(cluster)


def test_a_killed_gateway_is_back_at_the_same_address(cluster: Cluster) -> None:
    address, pid = cluster.base_url, cluster.pids()["gateway-0"]
    os.kill(pid, signal.SIGKILL)
    wait_for_successor(cluster, "gateway-0", pid)
    assert cluster.base_url == address
    assert complete(cluster)


def test_no_orphan_is_left_when_the_launcher_is_killed(cluster: Cluster) -> None:
    cluster.launcher.kill()
    cluster.launcher.wait()
    cluster.wait_until_nothing_is_left()


def test_a_node_starts_again_after_its_launcher_was_killed(cluster: Cluster) -> None:
    cluster.launcher.kill()
    cluster.launcher.wait()
    assert (cluster.run_dir / "supervisor.sock").exists()
    done = cluster.run("start", "--engine=echo", "--port=0", "--detach")
    assert done.returncode == 0, done.stderr
    assert cluster.run("stop").returncode == 0


def test_a_second_start_is_refused_in_one_line(cluster: Cluster) -> None:
    done = cluster.run("start", "--engine=echo", "--port=0")
    assert done.returncode == 69
    assert done.stderr == (
        f"understudy already runs in {cluster.run_dir} (process {cluster.launcher.pid}):"
        " stop it, or choose another --run-dir\n"
    )
    assert cluster.report().state is State.SERVING


def test_a_port_in_use_ends_the_start_with_its_line(nothing: Cluster) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = nothing.run("start", "--engine=echo", f"--port={port}")
    assert done.returncode == 78
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"cannot listen on 127.0.0.1:{port}: ")
    assert last.endswith("Address already in use")
    assert not nothing.leftovers()


def test_a_child_that_cannot_start_ends_the_launcher_with_its_status_and_line(
    nothing: Cluster,
) -> None:
    done = nothing.run("start", "--engine=echo", "--port=0", "--max-model-len=1000000")
    assert done.returncode == 78
    assert "1000000" in done.stderr.splitlines()[-1]
    assert not nothing.leftovers()


def test_a_model_directory_that_is_none_is_told_before_anything_starts(
    nothing: Cluster, tmp_path: Path
) -> None:
    done = nothing.run("start", f"--model={tmp_path}")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == f"understudy: {tmp_path}: not a model directory: no config.json\n"


def test_a_run_directory_open_to_others_is_refused_in_one_line(nothing: Cluster) -> None:
    nothing.run_dir.chmod(0o750)
    done = nothing.run("start", "--engine=echo", "--port=0")
    assert done.returncode == 78
    assert done.stderr.startswith(f"run directory {nothing.run_dir}: open to other users")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_everything_and_the_status_is_0(
    cluster: Cluster, number: signal.Signals
) -> None:
    cluster.launcher.send_signal(number)
    assert cluster.wait_for_end() == 0
    assert not cluster.leftovers()


def test_streams_finish_before_a_stop() -> None:
    with running_cluster("--echo-tokens-per-s=50", engines=1) as cluster:
        address = urlsplit(cluster.base_url)
        assert address.hostname is not None
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        with closing(connection):
            body = {"model": "understudy-demo", "prompt": "x", "max_tokens": 100, "stream": True}
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            with connection.getresponse() as response:
                response.readline()
                cluster.launcher.send_signal(signal.SIGTERM)
                rest = response.read()
        assert b'"finish_reason":"length"' in rest, rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert cluster.wait_for_end() == 0


def test_a_second_interrupt_ends_what_does_not_end_by_itself(cluster: Cluster) -> None:
    os.kill(cluster.pids()["gateway-0"], signal.SIGSTOP)
    cluster.launcher.send_signal(signal.SIGINT)
    cluster.wait_until(lambda _: '"stopping"' in cluster.log)
    cluster.launcher.send_signal(signal.SIGINT)
    assert cluster.wait_for_end() == 1
    assert not cluster.leftovers()


def test_an_engine_that_dies_too_often_stays_down_and_the_others_serve(cluster: Cluster) -> None:
    for death in range(4):
        pid = cluster.engine("engine-0").pid
        os.kill(pid, signal.SIGKILL)
        if death < 3:
            wait_for_successor(cluster, "engine-0", pid)
    cluster.wait_until(lambda _: '"process stays down"' in cluster.log)
    assert cluster.report().state is State.DEGRADED
    assert complete(cluster)
    cluster.launcher.send_signal(signal.SIGTERM)
    assert cluster.wait_for_end() == 1


@pytest.mark.soak
def test_engines_that_die_together_again_and_again_are_left_down_and_the_rest_serves() -> None:
    with running_cluster(engines=3) as cluster:
        for wave in range(3):
            pids = member_pids(cluster.report())
            for name in ("engine-0", "engine-1"):
                os.kill(pids[name], signal.SIGKILL)
            if wave < 2:
                for name in ("engine-0", "engine-1"):
                    wait_for_successor(cluster, name, pids[name])
        cluster.wait_until(lambda report: "engine-0 is broken, engine-1 is broken" in report.reason)
        assert "most engines died together again and again" in cluster.log
        assert complete(cluster)
        done = cluster.run("restart", "--rolling")
        assert done.returncode == 0, done.stderr
        assert cluster.report().state is State.SERVING
