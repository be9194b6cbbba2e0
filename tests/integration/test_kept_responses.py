"""Responses in background, with real processes that are killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.cluster import WAIT_MAX_S, Cluster, running_cluster

MODEL: Final = "understudy-demo"
BODY: Final = {"model": MODEL, "input": "tell me", "seed": 7, "max_output_tokens": 300}
_POLL_S: Final = 0.1


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster("--echo-tokens-per-s=150", "--reasoning-parser=qwen3") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> str:
    """What a response says if nothing happens to it."""
    return text_of(ask(cluster, "/v1/responses", BODY))


def ask(cluster: Cluster, path: str, body: Any = None, **headers: str) -> Any:
    """The JSON of an answer; asked again while processes come back."""
    give_up_at = time.monotonic() + WAIT_MAX_S
    data = None if body is None else json.dumps(body).encode()
    while True:
        try:
            request = urllib.request.Request(
                cluster.base_url + path, data, {"Content-Type": "application/json", **headers}
            )
            with urllib.request.urlopen(request, timeout=WAIT_MAX_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            problem = f"{error.code}: {error.read()!r}"
            if error.code != 503:
                raise AssertionError(problem) from error
        except (OSError, AssertionError, IndexError) as error:
            problem = repr(error)
        assert time.monotonic() < give_up_at, problem
        time.sleep(_POLL_S)


def finished(cluster: Cluster, name: str) -> Any:
    """A response, once it is complete."""
    give_up_at = time.monotonic() + WAIT_MAX_S
    while True:
        response = ask(cluster, f"/v1/responses/{name}")
        if response["status"] not in {"queued", "in_progress"}:
            return response
        assert time.monotonic() < give_up_at
        time.sleep(_POLL_S)


def text_of(response: Any) -> str:
    [message] = response["output"]
    return str(message["content"][0]["text"])


def events_of(cluster: Cluster, name: str, query: str = "") -> list[Any]:
    url = f"{cluster.base_url}/v1/responses/{name}?stream=true{query}"
    with urllib.request.urlopen(url, timeout=WAIT_MAX_S) as response:
        lines = response.read().decode().split("\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("victims", [["engine-0", "engine-1"], ["gateway-0"], ["supervisor"]])
def test_a_response_in_background_outlives_whoever_makes_it(
    cluster: Cluster, undisturbed: str, victims: list[str]
) -> None:
    cluster.wait_until_serving(engines=2)
    name = ask(cluster, "/v1/responses", {**BODY, "background": True})["id"]
    while len(undisturbed) > 10 * len(str(ask(cluster, f"/v1/responses/{name}")["output"])):
        time.sleep(_POLL_S)
    pids = cluster.pids()
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    response = finished(cluster, name)
    assert response["status"] == "incomplete", cluster.log
    assert text_of(response) == undisturbed
    cluster.wait_until_serving(engines=2)
    told = events_of(cluster, name)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert told[-1]["response"] == response
    half = len(told) // 2
    assert events_of(cluster, name, f"&starting_after={half}") == told[half + 1 :]


def test_a_cancelled_response_is_done_at_once(cluster: Cluster) -> None:
    cluster.wait_until_serving(engines=2)
    name = ask(cluster, "/v1/responses", {**BODY, "background": True})["id"]
    assert ask(cluster, f"/v1/responses/{name}/cancel", {})["status"] == "cancelled"
    [request] = ask(cluster, f"/v1/requests/{name}")["requests"]
    assert request["finish_reason"] == "cancelled"


def test_what_became_of_a_request_is_told_with_its_measures(cluster: Cluster) -> None:
    cluster.wait_until_serving(engines=2)
    answer = ask(cluster, "/v1/generate", {"prompt": "one two three", "max_tokens": 20})
    [output] = answer["outputs"]
    fared = output["metrics"]
    assert fared["output_tokens"] == len(output["token_ids"])
    assert fared["latency_s"] >= fared["queue_s"] + fared["prefill_s"] >= 0
    assert ask(cluster, "/v1/metrics")["summary"]["requests"] >= 1
