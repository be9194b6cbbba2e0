"""Deadlines as clients meet them: real processes, and an engine that is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster import Cluster, running_cluster
from understudy.tools.control import Report

ENDLESS = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster that takes minutes for what is asked of it here."""
    with running_cluster("--echo-tokens-per-s=20", "--max-num-seqs=1", engines=2) as running:
        yield running


def complete(cluster: Cluster, **headers: str) -> tuple[int, dict[str, Any]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(
        f"{cluster.base_url}/v1/completions",
        json.dumps(ENDLESS).encode(),
        {"Content-Type": "application/json", **named},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_an_answer_ends_at_its_deadline_with_what_there_is(cluster: Cluster) -> None:
    status, answer = complete(cluster, X_Request_Deadline_Ms="900")
    assert status == 200
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "deadline"
    assert 0 < answer["usage"]["completion_tokens"] < 400


def test_a_deadline_that_nothing_can_meet_is_an_error(cluster: Cluster) -> None:
    def are_busy(report: Report) -> bool:
        return report.reply is not None and all(one.running for one in report.reply.engines)

    # An engine that is free may have a first token in time, if it was about to make some.
    with ThreadPoolExecutor() as clients:
        busy = [clients.submit(complete, cluster, X_Request_Deadline_Ms="3000") for _ in range(2)]
        cluster.wait_until(are_busy)
        status, answer = complete(cluster, X_Request_Deadline_Ms="1")
        assert [call.result(timeout=60)[0] for call in busy] == [200, 200]
    assert status == 504
    assert answer["error"]["code"] == "deadline_exceeded"


def test_a_resumed_answer_has_its_deadline_still(cluster: Cluster) -> None:
    def is_running(report: Report) -> bool:
        return report.reply is not None and any(one.running for one in report.reply.engines)

    with ThreadPoolExecutor() as clients:
        calling = clients.submit(complete, cluster, X_Request_Deadline_Ms="3000")
        cluster.wait_until(is_running)
        reply = cluster.reply()
        [busy] = [one for one in reply.engines if one.running]
        os.kill(busy.pid, signal.SIGKILL)
        status, answer = calling.result(timeout=60)
    assert cluster.reply().resumed > reply.resumed
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "deadline"
    assert answer["usage"]["completion_tokens"] > 0
