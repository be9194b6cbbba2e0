"""What an operator does to a node that serves, and what its clients notice of it: nothing."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

import pytest

from tests.cluster import Cluster, empty_cluster, member_pids, run_understudy, running_cluster
from tests.load import Load, load, stream
from understudy.tools.control import State

PROMPTS = [f"def function_{index}(argument):" for index in range(10)]
SLOW = "--echo-tokens-per-s=40"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of one test's own, whose streams last for seconds."""
    with running_cluster(SLOW) as running:
        yield running


def ten_streams(cluster: Cluster, max_tokens: int) -> AbstractContextManager[Load]:
    """Ten streams and, all the time, short calls beside them."""
    return load(cluster.base_url, PROMPTS, max_tokens=max_tokens, seed=7)


def wait_for_streams(cluster: Cluster) -> None:
    """Wait until all streams of a load have an engine."""
    cluster.wait_until(
        lambda report: report.reply is not None and report.reply.running >= len(PROMPTS)
    )


def wait_for_successor(cluster: Cluster, pid: int) -> None:
    """Wait until another engine-0 serves than this process."""
    cluster.wait_until(
        lambda report: report.state is State.SERVING and member_pids(report)["engine-0"] != pid
    )


def undisturbed(cluster: Cluster, max_tokens: int) -> list[str]:
    """What the prompts are answered with when nothing happens."""
    with ten_streams(cluster, max_tokens) as calm:
        pass
    assert calm.problems == []
    return [streamed.text for streamed in calm.streams]


def test_draining_an_engine_moves_its_streams_and_no_client_notices(cluster: Cluster) -> None:
    expected = undisturbed(cluster, 120)
    with ten_streams(cluster, 120) as running:
        wait_for_streams(cluster)
        done = cluster.run("drain", "engine-0")
        assert cluster.engine("engine-0").state == "draining"
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines()[-1].startswith("engine-0 rests, after ")
    assert running.problems == []
    assert [streamed.text for streamed in running.streams] == expected
    assert cluster.reply().resumed > 0
    assert cluster.engine("engine-0").outstanding == 0


def test_a_drain_that_lets_finish_moves_nothing(cluster: Cluster) -> None:
    with ten_streams(cluster, 100) as running:
        wait_for_streams(cluster)
        impatient = cluster.run("drain", "engine-0", "--finish", "--timeout=0")
        done = cluster.run("drain", "engine-0", "--finish")
    assert impatient.returncode == 75
    assert impatient.stderr.startswith("engine-0 still has ")
    assert done.returncode == 0
    assert running.problems == []
    assert cluster.reply().resumed == 0


def test_draining_says_what_is_wrong(cluster: Cluster) -> None:
    unknown = cluster.run("drain", "engine-7")
    assert unknown.returncode == 2
    assert unknown.stderr == "no engine 'engine-7' is alive here; there is engine-0, engine-1\n"
    assert cluster.run("drain", "engine-0").returncode == 0
    last = cluster.run("drain", "engine-1")
    assert last.stderr.startswith("no other engine serves: ")


@pytest.mark.parametrize("words", [("drain", "engine-0"), ("restart", "--rolling")])
def test_nothing_can_be_changed_where_nothing_runs(words: tuple[str, ...]) -> None:
    with empty_cluster() as nothing:
        done = nothing.run(*words)
    assert done.returncode == 69
    assert "not running" in done.stderr


def test_every_process_is_replaced_and_no_client_notices(cluster: Cluster) -> None:
    expected = undisturbed(cluster, 300)
    pids, address = cluster.pids(), cluster.base_url
    with ten_streams(cluster, 300) as running:
        wait_for_streams(cluster)
        done = cluster.run("restart", "--rolling")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "every process was replaced"
    assert running.problems == []
    assert [streamed.text for streamed in running.streams] == expected
    assert set(cluster.pids().values()).isdisjoint(pids.values())
    assert cluster.base_url == address
    assert cluster.report().state is State.SERVING
    assert cluster.launcher.poll() is None


def test_an_only_engine_is_replaced_and_no_client_notices() -> None:
    with running_cluster(SLOW, engines=1) as cluster:
        with ten_streams(cluster, 200) as running:
            wait_for_streams(cluster)
            assert cluster.run("restart", "--rolling").returncode == 0
        assert running.problems == []


@pytest.mark.soak
def test_a_node_can_be_replaced_again_and_again_without_being_taken_for_broken(
    cluster: Cluster,
) -> None:
    for _ in range(2):
        done = cluster.run("restart", "--rolling")
        assert done.returncode == 0, done.stderr
    cluster.launcher.send_signal(signal.SIGTERM)
    assert cluster.wait_for_end() == 0


def test_a_second_restart_is_refused_while_the_first_is_under_way(cluster: Cluster) -> None:
    first = threading.Thread(target=cluster.run, args=("restart", "--rolling"))
    first.start()
    cluster.wait_until(lambda _: '"rolling restart"' in cluster.log)
    second = cluster.run("restart", "--rolling")
    first.join()
    assert second.returncode == 75
    assert second.stderr == "a restart is under way already\n"


def test_connections_wait_and_are_not_refused_while_a_gateway_is_dead(cluster: Cluster) -> None:
    address = urlsplit(cluster.base_url)
    pid = cluster.pids()["gateway-0"]
    os.kill(pid, signal.SIGKILL)
    for _ in range(5):
        socket.create_connection((address.hostname, address.port)).close()
    answered = stream(f"http://{address.netloc}", "hello", max_tokens=4)
    assert answered.problem == ""
    assert member_pids(cluster.report())["gateway-0"] != pid


def test_an_engine_that_stays_down_is_shown_as_broken_also_by_a_new_supervisor(
    cluster: Cluster,
) -> None:
    for death in range(4):
        pid = cluster.engine("engine-0").pid
        os.kill(pid, signal.SIGKILL)
        if death < 3:
            wait_for_successor(cluster, pid)
    cluster.wait_until(lambda report: "engine-0 is broken" in report.reason)
    os.kill(cluster.pids()["supervisor"], signal.SIGKILL)
    cluster.wait_until(lambda report: "engine-0 is broken" in report.reason)
    assert "broken" in cluster.run("status").stdout
    assert cluster.run("restart", "--rolling").returncode == 0
    assert cluster.report().state is State.SERVING


def test_the_journal_of_a_node_that_serves_can_be_read(cluster: Cluster) -> None:
    answered = stream(cluster.base_url, "hello", max_tokens=4)
    assert answered.problem == ""
    directory = str(cluster.run_dir / "state" / "journal")
    verified = run_understudy("journal", "verify", directory)
    assert verified.returncode == 0, verified.stderr
    assert "ended requests   1\n" in verified.stdout
    shown = run_understudy("journal", "show", directory)
    assert shown.returncode == 0
    assert shown.stdout
    nowhere = run_understudy("journal", "verify", str(cluster.run_dir))
    assert nowhere.returncode == 78
    assert nowhere.stderr == f"understudy: {cluster.run_dir}: there is no journal here\n"
