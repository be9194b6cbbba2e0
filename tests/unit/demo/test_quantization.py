"""What quantisation costs, measured on the model as engines serve it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from tests.unit.model.native.kernels import needs_native
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.native import library
from understudy.tools.demo import quantization
from understudy.tools.demo.checkpoint import read_checkpoint
from understudy.tools.demo.corpus import Corpus
from understudy.tools.demo.evaluation import held_out_loss
from understudy.tools.demo.paths import draft_model_directory


def test_the_served_model_has_the_loss_of_the_trained_network(corpus: Corpus) -> None:
    directory = draft_model_directory()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = [file.text for file in corpus.held_out]
    model = load_model(directory, dtype=torch.float32, device=torch.device("cpu"), numerics="fast")
    measured = quantization.measure(model, tokenizer, texts)
    expected = held_out_loss(read_checkpoint(directory), tokenizer, texts)
    assert measured.nats_per_token == pytest.approx(expected.nats_per_token, abs=1e-3)
    assert measured.bits_per_byte == pytest.approx(expected.bits_per_byte, abs=1e-3)


@needs_native
def test_the_table_has_a_line_for_each_form(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantization, "read_corpus", lambda: corpus)
    quantization.main(["--model", str(draft_model_directory()), "--files", "1"])
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.startswith("weights")
    forms = [tuple(line.split()[:2]) for line in lines]
    assert forms == [
        *(("float32", "float32"), ("int8", "float32"), ("int4", "float32")),
        *(("float32", "int8"), ("int8", "int8")),
    ]
    losses = [float(line.split()[2]) for line in lines]
    assert losses == pytest.approx([losses[0]] * 5, abs=0.2)


def test_a_form_that_the_machine_has_no_kernels_for_is_left_out(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "_library", lambda: None)
    monkeypatch.setattr(quantization, "read_corpus", lambda: corpus)
    monkeypatch.setattr(quantization, "FORMS", (("none", "auto"), ("none", "int8")))
    quantization.main(["--model", str(draft_model_directory()), "--files", "1"])
    _, plain, narrow = capsys.readouterr().out.splitlines()
    assert plain.split()[:2] == ["float32", "float32"]
    assert narrow.startswith("float32  int8     --kv-cache-dtype int8 needs")
