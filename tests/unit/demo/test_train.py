"""The whole workshop on a tiny preset: every file is made, and made again the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from understudy.tools.demo.corpus import Corpus
from understudy.tools.demo.train import BUNDLED, PARTS, Preset, Workshop, main

MODEL_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_two_runs_give_the_same_files_and_a_report(
    preset: Preset, corpus: Corpus, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        Workshop(preset, corpus, tmp_path / name).run(PARTS)
    for part in ("model", "draft"):
        first = contents(tmp_path / "first" / part)
        assert set(first) == MODEL_FILES
        assert first == contents(tmp_path / "second" / part)
    assert {path.name for path in (tmp_path / "first").iterdir()} == {
        "model",
        "draft",
        "training.json",
    }
    report = json.loads((tmp_path / "first" / "training.json").read_text())
    assert report["model"]["nats_per_token"] > report["model"]["bits_per_byte"] > 0
    assert 0 <= report["draft"]["agreement"] <= 1
    assert report["corpus"]["sha256"] == corpus.digest()


def test_the_two_bundled_networks_share_vocabulary_and_context() -> None:
    model, draft = BUNDLED.model.shape, BUNDLED.draft.shape
    assert model.vocab_size == draft.vocab_size
    assert model.context_length == draft.context_length


def test_an_unknown_part_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["--parts", "everything"])
    assert exit_status.value.code == 2
    assert "everything" in capsys.readouterr().err
