from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.unit.storage.story import LONG, Story
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.storage.disk import OsDisk
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.segments import segment_name
from understudy.tools import journal as tool


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def directory(tmp_path: Path, story: Story) -> Path:
    """A journal of a few small segments."""
    options = JournalOptions(retention=LONG, segment_bytes=1500)
    journal = Journal.open(OsDisk(tmp_path), options, 0.0).journal
    for turn in range(12):
        journal.append(story.opening(1))
        journal.append([story.step(story.live), story.step(story.live[:3], count=2)])
        if turn > 6:
            journal.append([story.step(story.live[:1], finishing=story.live[:1])])
        journal.append([story.reserve(100)])
        journal.commit(turn * 0.5)
    journal.append([story.end(story.live[0])])
    journal.close(9.0)
    return tmp_path


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    arguments = parser.parse_args([str(word) for word in words])
    status: int = arguments.run(arguments)
    return status


def test_a_sound_journal_is_verified(
    directory: Path, story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", directory) == 0

    out = capsys.readouterr().out
    assert f"living requests  {len(story.live)}\n" in out
    assert f"ended requests   {len(story.known) - len(story.live)}\n" in out
    assert "damaged places   0\n" in out


def test_damage_is_named_and_is_a_failure(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory / segment_name(2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = {path: path.read_bytes() for path in directory.iterdir()}

    assert run("verify", directory) == 1

    assert "segment-000000000002.log: after byte" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_every_record_is_shown_without_what_was_said(directory: Path, story: Story) -> None:
    lines = list(tool.show(directory))

    assert len(lines) == tool.verify(directory).statistics.records
    text = "\n".join(lines)
    for request_id in story.known:
        assert str(request_id) in text
    assert "[" not in text


def test_tokens_are_shown_when_asked_for(directory: Path, story: Story) -> None:
    text = "\n".join(tool.show(directory, with_tokens=True))

    for known in story.known.values():
        assert str(list(known.admit.request.prompt)) in text
        assert all(str(token) in text for token in known.output)


def test_one_request_can_be_followed(
    directory: Path, story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(iter(story.known))

    assert run("show", directory, "--request", str(first)) == 0

    lines = capsys.readouterr().out.splitlines()
    kinds = [line.split()[2] for line in lines]
    assert kinds[:2] == ["admit", "assign"]
    assert set(kinds[2:]) == {"step"}
    assert "1 ended" in lines[-1]
    assert len(kinds[2:]) < sum(" step " in line for line in tool.show(directory))


def test_a_torn_end_is_mentioned(directory: Path) -> None:
    with max(directory.glob("*.log")).open("ab") as file:
        file.write(b"abc")

    assert "3 bytes are torn" in list(tool.show(directory))[-1]


def test_a_directory_without_a_journal_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no journal here"):
        run("verify", tmp_path)
    with pytest.raises(ConfigurationError, match="No such file or directory"):
        run("show", tmp_path / "nowhere")
