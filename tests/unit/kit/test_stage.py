"""Step cards: what an engine was at when it ended. Killing: the right process or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from understudy.protocol.request import Request, SamplingParams, fingerprint
from understudy.runtime.kit.probe import ProcProbe
from understudy.runtime.kit.stage import CARD_REQUESTS_MAX, FileStepCard, NodeStage, card_path
from understudy.runtime.storage.convicts import ConvictDirectory

NAME, IDENTITY = "engine-0", "engine-0.17"


@pytest.fixture
def stage(tmp_path: Path) -> NodeStage:
    return NodeStage(tmp_path, ProcProbe(), ConvictDirectory(tmp_path / "quarantine"))


@pytest.fixture
def card(tmp_path: Path) -> FileStepCard:
    return FileStepCard(card_path(tmp_path, NAME), IDENTITY)


def test_a_card_names_the_requests_of_the_step_under_way(
    stage: NodeStage, card: FileStepCard
) -> None:
    assert stage.fatal_step(NAME, IDENTITY) == frozenset()
    card.enter([5, 2**63 - 1])
    assert stage.fatal_step(NAME, IDENTITY) == {5, 2**63 - 1}
    card.leave()
    assert stage.fatal_step(NAME, IDENTITY) == frozenset()
    card.enter([6])
    assert stage.fatal_step(NAME, IDENTITY) == {6}


def test_what_was_written_is_there_after_kill_9(stage: NodeStage, tmp_path: Path) -> None:
    program = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from understudy.runtime.kit.stage import FileStepCard\n"
        f"card = FileStepCard(Path({str(card_path(tmp_path, NAME))!r}), {IDENTITY!r})\n"
        "card.enter([7, 8])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert stage.fatal_step(NAME, IDENTITY) == {7, 8}


def test_the_card_of_another_incarnation_says_nothing(stage: NodeStage, tmp_path: Path) -> None:
    old = FileStepCard(card_path(tmp_path, NAME), "engine-0.16")
    old.enter([1])
    FileStepCard(card_path(tmp_path, NAME), IDENTITY).enter([2])
    old.enter([3])
    assert stage.fatal_step(NAME, "engine-0.16") == frozenset()
    assert stage.fatal_step(NAME, IDENTITY) == {2}


def test_no_card_and_no_card_at_all_are_no_step(stage: NodeStage, tmp_path: Path) -> None:
    assert stage.fatal_step("engine-9", "engine-9.1") == frozenset()
    card_path(tmp_path, "engine-9").write_bytes(b"\0" * 10)
    assert stage.fatal_step("engine-9", "engine-9.1") == frozenset()


def test_a_card_takes_no_more_than_it_has_room_for(stage: NodeStage, card: FileStepCard) -> None:
    card.enter(list(range(CARD_REQUESTS_MAX + 10)))
    assert stage.fatal_step(NAME, IDENTITY) == set(range(CARD_REQUESTS_MAX))


def test_only_the_process_that_is_meant_is_killed(stage: NodeStage) -> None:
    words = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        started = ProcProbe().start_time(process.pid)
        stage.kill(process.pid, started + 1)
        stage.kill(process.pid, 0)
        assert process.poll() is None
        stage.kill(process.pid, started)
        assert process.wait() == -9
    stage.kill(process.pid, started)


def test_what_is_quarantined_is_kept(stage: NodeStage, tmp_path: Path) -> None:
    request = Request(1, 1, (1, 2), SamplingParams(seed=1, max_tokens=2))
    stage.keep_convict(request)
    kept = ConvictDirectory(tmp_path / "quarantine").fingerprints()
    assert kept == [fingerprint(request)]
