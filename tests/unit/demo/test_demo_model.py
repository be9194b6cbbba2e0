"""The bundled model and its draft: loadable anywhere, small, and plausible at Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy.tools.demo.checkpoint import read_checkpoint
from understudy.tools.demo.corpus import Message
from understudy.tools.demo.evaluation import agreement, completion, held_out_loss
from understudy.tools.demo.paths import demo_model_directory, draft_model_directory
from understudy.tools.demo.vocabulary import ASSISTANT_TURN, END_OF_TEXT_ID, render_conversation

DIRECTORIES = [demo_model_directory(), draft_model_directory()]
UNSEEN = '''\
def count_words(path, encoding="utf-8"):
    """Return how often each word occurs in a file."""
    counts = {}
    with open(path, encoding=encoding) as file:
        for line in file:
            for word in line.split():
                counts[word] = counts.get(word, 0) + 1
    return counts


class Stack:
    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()
'''


def tokenizer_in(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("directory", "bytes_max"),
    [(demo_model_directory(), 12_000_000), (draft_model_directory(), 2_000_000)],
)
def test_weights_are_as_small_as_promised(directory: Path, bytes_max: int) -> None:
    assert (directory / "model.safetensors").stat().st_size <= bytes_max


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_transformers_loads_it_and_computes_the_same_logits(directory: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reference_tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer_in(directory).encode(UNSEEN).ids
    assert reference_tokenizer(UNSEEN).input_ids == tokens
    assert reference_tokenizer.eos_token_id == END_OF_TEXT_ID
    batch = torch.tensor([tokens])
    with torch.no_grad():
        found, expected = read_checkpoint(directory)(batch), reference(batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_both_models_read_the_same_tokens() -> None:
    model, draft = DIRECTORIES
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (draft / name).read_bytes()


def test_a_chat_is_rendered_as_it_was_in_training() -> None:
    turns = (Message("user", "Write a function that reads a file"),)
    rendered = AutoTokenizer.from_pretrained(demo_model_directory()).apply_chat_template(
        [turn._asdict() for turn in turns], tokenize=False, add_generation_prompt=True
    )
    assert rendered == render_conversation(turns) + ASSISTANT_TURN


def test_unseen_code_is_no_surprise_and_the_draft_often_says_the_same() -> None:
    model, draft = (read_checkpoint(directory) for directory in DIRECTORIES)
    tokenizer = tokenizer_in(demo_model_directory())
    assert held_out_loss(model, tokenizer, [UNSEEN]).nats_per_token < 3
    assert agreement(model, draft, tokenizer, [UNSEEN]) > 0.4


def test_a_chat_answer_is_a_documented_definition_and_ends() -> None:
    network = read_checkpoint(demo_model_directory())
    tokenizer = tokenizer_in(demo_model_directory())
    turns = (Message("user", "Return the sum of two numbers."),)
    answer = completion(
        network,
        tokenizer,
        render_conversation(turns) + ASSISTANT_TURN,
        tokens_max=300,
        temperature=0.1,
        seed=1,
    )
    assert answer.startswith(("def ", "class "))
    assert '"""' in answer
    assert len(tokenizer.encode(answer).ids) < 300


def test_the_report_tells_of_the_weights_that_are_here() -> None:
    report = json.loads((demo_model_directory().parent / "training.json").read_text())
    for part, directory in zip(("model", "draft"), DIRECTORIES, strict=True):
        assert report[part]["parameters"] == read_checkpoint(directory).num_parameters()
        assert report[part]["wall_s"] > 0
    assert report["model"]["nats_per_token"] < report["draft"]["nats_per_token"]


def test_asking_for_the_directories_loads_no_torch() -> None:
    script = (
        "import sys; from understudy.tools.demo.paths import demo_model_directory;"
        "demo_model_directory(); print('torch' in sys.modules)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "deploy" / "editable")}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout == "False\n"
