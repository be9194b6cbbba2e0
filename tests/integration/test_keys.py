"""Keys and tenants as an operator and their clients see them: real processes."""

from __future__ import annotations

import json
import os
import signal
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.certificates import make_certificate
from tests.cluster import Cluster, run_understudy, running_cluster
from understudy.tools.control import State


class Answer(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


def call(
    cluster: Cluster,
    key: str | None,
    path: str = "/v1/completions",
    **fields: Any,
) -> Answer:
    """Call with a key; fields make it a post of them and a prompt."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    body = json.dumps({"prompt": "hello", **fields}).encode() if fields else None
    request = urllib.request.Request(f"{cluster.base_url}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return Answer(response.status, json.load(response), dict(response.headers))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, json.load(error), dict(error.headers))


def until(cluster: Cluster, key: str, status: int) -> Answer:
    """Call until the answer has this status: a change of the file is seen within a second."""
    answers: list[Answer] = []

    def is_so(_: object) -> bool:
        answers.append(call(cluster, key, max_tokens=1))
        return answers[-1].status == status

    cluster.wait_until(is_so)
    return answers[-1]


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


def make_key(key_file: Path, *words: str) -> str:
    made = run_understudy("keys", "add", *words, f"--key-file={key_file}")
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


@pytest.fixture(scope="module")
def acme(key_file: Path) -> str:
    return make_key(key_file, "acme", "--weight=4")


@pytest.fixture(scope="module")
def cluster(key_file: Path, acme: str) -> Iterator[Cluster]:
    with running_cluster(f"--key-file={key_file}", "--api-key=sk-of-a-flag", engines=1) as running:
        yield running


def test_only_who_has_a_key_is_answered(cluster: Cluster, acme: str) -> None:
    assert call(cluster, None, max_tokens=1).status == 401
    assert call(cluster, "sk-wrong", max_tokens=1).status == 401
    assert call(cluster, acme, max_tokens=1).status == 200
    assert call(cluster, "sk-of-a-flag", max_tokens=1).status == 200
    assert call(cluster, None, "/health").status == 200
    assert call(cluster, None, "/v1/models").status == 401


def test_keys_come_and_go_while_the_node_serves(cluster: Cluster, key_file: Path) -> None:
    key = make_key(key_file, "short-lived")
    until(cluster, key, 200)
    listed = run_understudy("keys", "list", f"--key-file={key_file}").stdout
    assert key not in listed
    [line] = [line for line in listed.splitlines() if "short-lived" in line]
    key_id = line.split()[0]
    assert run_understudy("keys", "revoke", key_id, f"--key-file={key_file}").returncode == 0
    until(cluster, key, 401)
    again = run_understudy("keys", "revoke", key_id, f"--key-file={key_file}")
    assert again.returncode == 2


def test_no_key_is_in_a_command_line_or_in_the_log(cluster: Cluster, acme: str) -> None:
    assert call(cluster, "sk-of-a-flag", max_tokens=1).status == 200
    children = [line for line in cluster.leftovers().values() if "--parent-pid" in line]
    assert children
    for text in (*children, cluster.log):
        assert acme not in text
        assert "sk-of-a-flag" not in text


def test_usage_outlives_a_supervisor_that_is_killed(cluster: Cluster, key_file: Path) -> None:
    key = make_key(key_file, "counted")
    until(cluster, key, 200)
    for _ in range(3):
        assert call(cluster, key, max_tokens=5, ignore_eos=True).status == 200
    before = call(cluster, key, "/v1/usage").body["total"]
    assert before["output_tokens"] >= 15
    pid = cluster.pids()["supervisor"]
    os.kill(pid, signal.SIGKILL)
    cluster.wait_until(lambda report: report.state is State.SERVING)
    after: list[Answer] = []

    def answers(_: object) -> bool:
        after.append(call(cluster, key, "/v1/usage"))
        return after[-1].status == 200

    cluster.wait_until(answers)
    assert after[-1].body["total"] == before
    assert after[-1].body["tenant"] == "counted"


def test_a_tenants_own_limit_is_told_with_the_time_to_wait(
    cluster: Cluster, key_file: Path
) -> None:
    key = make_key(key_file, "slow", "--requests-per-s=0.5")
    until(cluster, key, 200)
    refused = until(cluster, key, 429)
    assert refused.body["error"]["type"] == "rate_limit_error"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 2500
    assert int(refused.headers["Retry-After"]) <= 3


def is_trusted(address: str, chain: Path) -> bool:
    """Whether the server shows this certificate."""
    context = ssl.create_default_context(cafile=str(chain))
    try:
        with urllib.request.urlopen(
            f"https://{address}/live", timeout=60, context=context
        ) as response:
            return bool(response.status == 200)
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLCertVerificationError):
            raise
        return False


def test_a_certificate_is_replaced_by_sighup(tmp_path: Path) -> None:
    files = make_certificate(tmp_path)
    flags = (f"--tls-certificate={files.chain}", f"--tls-key={files.key}")
    with running_cluster(*flags, engines=1) as cluster:
        cluster.wait_until(lambda _: "at https://" in cluster.log)
        address = cluster.reply().gateways[0].address
        assert is_trusted(address, files.chain)
        make_certificate(tmp_path)
        assert not is_trusted(address, files.chain)
        os.kill(cluster.pids()["gateway-0"], signal.SIGHUP)
        cluster.wait_until(lambda _: is_trusted(address, files.chain))


def test_the_configuration_is_shown_without_the_key() -> None:
    shown = run_understudy("config", "show", environment={"UNDERSTUDY_API_KEY": "sk-secret"})
    assert shown.returncode == 0
    assert "api-key" in shown.stdout
    assert "sk-secret" not in shown.stdout + shown.stderr


def test_what_is_wrong_with_the_command_is_said(tmp_path: Path) -> None:
    key_file = f"--key-file={tmp_path / 'k.json'}"
    for words in (("add", "a b", key_file), ("add", "a", "--weight=-1", key_file), ("add", "a")):
        done = run_understudy("keys", *words)
        assert (done.returncode, done.stdout) == (78, "")
        assert done.stderr.startswith("understudy: ")
    assert not (tmp_path / "k.json").exists()
