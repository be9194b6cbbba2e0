"""Quarantined requests on disk: readable by one user, bounded, and harmless when damaged."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from understudy.protocol.request import Request, SamplingParams, fingerprint
from understudy.runtime.storage import convicts
from understudy.runtime.storage.convicts import ConvictDirectory


def request(number: int = 1, *, prompt: tuple[int, ...] = (1, 2), seed: int = 5) -> Request:
    params = SamplingParams(seed=seed, max_tokens=8, stop_token_ids=(2,))
    return Request(number, number, prompt, params, tenant="key-1")


def test_a_fingerprint_tells_what_is_asked_and_by_whom_but_not_the_seed() -> None:
    assert fingerprint(request(1)) == fingerprint(request(2, seed=6))
    assert fingerprint(request(1)) != fingerprint(request(1, prompt=(1, 3)))
    other = Request(1, 1, (1, 2), request().params, tenant="key-2")
    assert fingerprint(request(1)) != fingerprint(other)


def test_what_is_kept_is_found_again_by_another(tmp_path: Path) -> None:
    ConvictDirectory(tmp_path / "q").keep(request(), written_at=100.0)
    directory = ConvictDirectory(tmp_path / "q")
    assert directory.fingerprints() == [fingerprint(request())]
    (convict,) = directory.convicts(now=130.0)
    assert convict.fingerprint == fingerprint(request()).hex()
    assert convict.age_s == 30.0
    assert convict.content["prompt"] == [1, 2]
    assert convict.content["params"]["stop_token_ids"] == [2]
    assert directory.remove(convict.fingerprint)
    assert not directory.remove(convict.fingerprint)
    assert directory.fingerprints() == []


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ConvictDirectory(tmp_path / "q").keep(request(), written_at=0.0)
    finally:
        os.umask(before)
    (path,) = (tmp_path / "q").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_of_too_many_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convicts, "CONVICTS_MAX", 3)
    directory = ConvictDirectory(tmp_path)
    asked = [request(prompt=(number,)) for number in range(5)]
    for number, one in enumerate(asked):
        directory.keep(one, written_at=0.0)
        path = tmp_path / f"{fingerprint(one).hex()}.json"
        os.utime(path, ns=(number, number))
    assert directory.fingerprints() == [fingerprint(one) for one in asked[2:]]


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"written_at": "x"}', "\udcff"])
def test_a_damaged_file_is_left_out(tmp_path: Path, content: str) -> None:
    directory = ConvictDirectory(tmp_path)
    directory.keep(request(), written_at=0.0)
    (tmp_path / ("0" * 64 + ".json")).write_bytes(content.encode(errors="surrogateescape"))
    (tmp_path / "notes.json").write_text("{}")
    assert len(directory.convicts(now=0.0)) == 1
    assert len(directory.fingerprints()) == 2


def test_a_disk_that_does_not_take_it_is_borne(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    directory = ConvictDirectory(tmp_path / "file")
    directory.keep(request(), written_at=0.0)
    assert directory.convicts(now=0.0) == []
