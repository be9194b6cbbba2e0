"""Keys and tenants as an operator and their clients see them: real processes."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cluster import Cluster, run_understudy, running_cluster


class Answer(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


def call(
    cluster: Cluster,
    key: str | None,
    path: str = "/v1/completions",
    *,
    context: ssl.SSLContext | None = None,
    **fields: Any,
) -> Answer:
    """Call with a key; fields make it a post of them and a prompt."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    body = json.dumps({"prompt": "hello", **fields}).encode() if fields else None
    request = urllib.request.Request(f"{cluster.base_url}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as response:
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


def test_what_is_wrong_with_the_command_is_said(tmp_path: Path) -> None:
    key_file = f"--key-file={tmp_path / 'k.json'}"
    for words in (("add", "a b", key_file), ("add", "a", "--weight=-1", key_file), ("add", "a")):
        done = run_understudy("keys", *words)
        assert (done.returncode, done.stdout) == (78, "")
        assert done.stderr.startswith("understudy: ")
    assert not (tmp_path / "k.json").exists()
