"""No secret of a call is in a log, in what is measured, with another tenant, or in a core."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.abuse.connection import Answer, Connection
from tests.abuse.secrets import SecretCall, Secrets, calls
from tests.abuse.stage import Stage, on_stage

LOUD: Final = Path(__file__).with_name("loud")
_ID: Final = re.compile(rb'"((?:resp|msg)_[0-9a-f]{16}|(?:cmpl|chatcmpl)-[0-9a-f]{16})"')


class Told(NamedTuple):
    """A cluster that has heard all secrets, and what it answered."""

    stage: Stage
    secrets: Secrets
    answers: list[Answer]


def sent(call: SecretCall, key: str) -> bytes:
    lines = [f"{call.method} {call.path} HTTP/1.1", "Host: localhost"]
    names = {name.lower() for name, _ in call.headers}
    if call.body is not None:
        lines.append(f"Content-Length: {len(call.body)}")
        if "content-type" not in names:
            lines.append("Content-Type: application/json")
    if call.has_key:
        lines.append(f"Authorization: Bearer {key}")
    lines += [f"{name}: {value}" for name, value in call.headers]
    return "\r\n".join([*lines, "", ""]).encode() + (call.body or b"")


def ask(stage: Stage, call: SecretCall, key: str) -> Answer:
    async def once() -> Answer | None:
        connection = Connection(stage.host, stage.port)
        answer = await connection.call(sent(call, key), is_head=False, patience_s=60)
        await connection.close()
        return answer

    answer = asyncio.run(once())
    assert answer is not None, call
    return answer


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    path = os.pathsep.join((str(LOUD), os.environ.get("PYTHONPATH", "")))
    environment = {"LOUD_LOGS": "1", "PYTHONPATH": path}
    with on_stage(engine="model", environment=environment) as stage:
        secrets = Secrets()
        answers = []
        for call in calls(secrets):
            answers.append(ask(stage, call, stage.hostile_key))
            assert answers[-1].status == call.status, (call, answers[-1])
        secrets.by_place |= {"a key": stage.hostile_key.lower()}
        yield Told(stage, secrets, answers)


def test_secrets_were_told_and_came_back(told: Told) -> None:
    assert len(told.secrets.by_place) >= 100
    outputs = [place for place in told.secrets.by_place if place.startswith("output of")]
    back = told.secrets.found_in(b"\n".join(answer.body for answer in told.answers))
    assert set(outputs) <= set(back)
    assert told.stage.cluster.log.count("everything is logged") >= 5


def test_no_other_tenant_sees_any(told: Told) -> None:
    stage = told.stage
    names = {name.decode() for answer in told.answers for name in _ID.findall(answer.body)}
    assert len(names) > 5
    document = stage.document()
    paths = {"/metrics"}
    for path, methods in document["paths"].items():
        if "get" in methods:
            paths |= {path.replace("{id}", name).replace("{model}", "x") for name in names}
    for path in sorted(paths):
        for query in ("", "?stream=true"):
            call = SecretCall(path + query, method="GET")
            answer = ask(stage, call, stage.golden_key)
            assert not told.secrets.found_in(answer.body), path
            assert not told.secrets.found_in(str(answer.headers)), path


def test_none_is_in_what_an_operator_sees(told: Told) -> None:
    cluster = told.stage.cluster
    for words in (("status", "--json"), ("status",)):
        shown = cluster.run(*words)
        assert shown.stdout
        assert not told.secrets.found_in(shown.stdout + shown.stderr)
    assert not told.secrets.found_in("\n".join(cluster.leftovers().values()))
    for path in cluster.run_dir.rglob("*"):
        is_kept = cluster.run_dir / "state" in path.parents
        if path.is_file() and is_kept:
            assert path.stat().st_mode & 0o077 == 0, path
        elif path.is_file():
            assert not told.secrets.found_in(path.read_bytes()), path
    assert (cluster.run_dir / "state").stat().st_mode & 0o077 == 0


def test_a_crash_leaves_no_core_and_the_log_holds_none(told: Told) -> None:
    cluster = told.stage.cluster
    for name, pid in cluster.pids().items():
        limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
        [core] = [line.split() for line in limits.splitlines() if "core file" in line]
        assert core[4:6] in (["1", "1"], ["0", "0"]), (name, core)
    victim = cluster.pids()["engine-0"]
    os.kill(victim, signal.SIGSEGV)
    cluster.wait_until(
        lambda report: (
            report.reply is not None
            and not any(
                (engine.pid, engine.state) == (victim, "serving") for engine in report.reply.engines
            )
        )
    )
    assert not [path for path in Path.cwd().glob("core*") if path.is_file()]
    assert cluster.log.count("\n") > 20
    assert not told.secrets.found_in(cluster.log)
