"""Train the bundled demo model and its draft model: `python -m understudy.tools.demo.train`.

Tokenizer, model and draft model come from the standard library's sources on this machine, without
the network. All seeds are fixed, so a second run on the same kind of processor and with the same
releases of Python and torch gives the same files.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from understudy.runtime.log import configure_logging
from understudy.tools.demo.batches import Windows
from understudy.tools.demo.checkpoint import SAMPLING_DEFAULTS, read_checkpoint, write_checkpoint
from understudy.tools.demo.corpus import Corpus, Message, lessons, read_corpus
from understudy.tools.demo.evaluation import agreement, completion, held_out_loss
from understudy.tools.demo.network import NetworkShape
from understudy.tools.demo.paths import demo_model_directory
from understudy.tools.demo.training import (
    DistillationLoss,
    Loss,
    TrainingPlan,
    next_token_loss,
    train,
)
from understudy.tools.demo.vocabulary import (
    ASSISTANT_TURN,
    END_OF_TEXT,
    END_OF_TEXT_ID,
    render_conversation,
    train_tokenizer,
)

WORKERS = 2
PARTS = ("tokenizer", "model", "draft", "report")

SAMPLE_TOKENS_MAX = 120
SAMPLE_PROMPTS = (
    "def read_file(path):\n",
    "import os\n\nclass Cache:\n    def __init__(self",
    "for line in ",
    render_conversation([Message("user", "Write a function that reads a file")]) + ASSISTANT_TURN,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The plans of the two networks; they share vocabulary and context length."""

    model: TrainingPlan
    draft: TrainingPlan

    @property
    def vocab_size(self) -> int:
        """How many tokens the tokenizer has."""
        return self.model.shape.vocab_size

    @property
    def context_length(self) -> int:
        """How many tokens a window has."""
        return self.model.shape.context_length


BUNDLED = Preset(
    model=TrainingPlan(
        shape=NetworkShape(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=640,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            context_length=1024,
        ),
        steps=1700,
        windows_per_step=4,
        matrix_rate=0.025,
        other_rate=0.01,
        warmup_steps=20,
        decay_share=0.42,
        short_share=0.75,
        short_halvings=1,
        seed=1,
    ),
    draft=TrainingPlan(
        shape=NetworkShape(
            vocab_size=4096,
            hidden_size=128,
            intermediate_size=352,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            context_length=1024,
        ),
        steps=1000,
        windows_per_step=2,
        matrix_rate=0.025,
        other_rate=0.01,
        warmup_steps=20,
        decay_share=0.5,
        short_share=0.75,
        short_halvings=1,
        seed=2,
    ),
)


def token_documents(corpus: Corpus, tokenizer: Tokenizer) -> list[list[int]]:
    """The training files and the conversations made from them, as token ids."""
    texts = [file.text for file in corpus.training]
    texts += [
        # The separator between documents ends the last answer, so the text itself must not.
        render_conversation(conversation).removesuffix(END_OF_TEXT)
        for file in corpus.training
        for conversation in lessons(file)
    ]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


class Workshop:
    """One run of training: what is made, in order, and what it cost."""

    def __init__(self, preset: Preset, corpus: Corpus, output: Path) -> None:
        self._preset = preset
        self._corpus = corpus
        self._output = output
        self._model_directory = output / "model"
        self._draft_directory = output / "draft"
        self._report_file = output / "training.json"

    def make_tokenizer(self) -> None:
        """Train the tokenizer."""
        texts = (file.text for file in self._corpus.training)
        tokenizer = train_tokenizer(texts, vocab_size=self._preset.vocab_size)
        self._model_directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(self._model_directory / "tokenizer.json"))

    def make_model(self) -> None:
        """Train the model on the files and conversations."""
        self._make(self._preset.model, self._model_directory, loss=next_token_loss)

    def make_draft(self) -> None:
        """Train the draft model to say what the model says."""
        teacher = read_checkpoint(self._model_directory)
        self._make(self._preset.draft, self._draft_directory, loss=DistillationLoss(teacher))

    def make_report(self) -> None:
        """Measure both models on the files kept from training, and draw samples."""
        tokenizer = self._tokenizer()
        model = read_checkpoint(self._model_directory)
        draft = read_checkpoint(self._draft_directory)
        texts = [file.text for file in self._corpus.held_out]
        self._note("model", asdict(held_out_loss(model, tokenizer, texts)))
        self._note("draft", asdict(held_out_loss(draft, tokenizer, texts)))
        self._note("draft", {"agreement": agreement(model, draft, tokenizer, texts)})
        temperature = SAMPLING_DEFAULTS["temperature"]
        samples: dict[str, object] = {
            prompt: completion(
                model,
                tokenizer,
                prompt,
                tokens_max=SAMPLE_TOKENS_MAX,
                temperature=temperature,
                seed=0,
            )
            for prompt in SAMPLE_PROMPTS
        }
        self._note("samples", samples)

    def run(self, parts: Sequence[str]) -> None:
        """Make `parts`, each with its cost in the report."""
        makers = {
            "tokenizer": self.make_tokenizer,
            "model": self.make_model,
            "draft": self.make_draft,
            "report": self.make_report,
        }
        for part in parts:
            wall_s, cpu_s = time.monotonic(), time.process_time()
            makers[part]()
            cost: dict[str, object] = {
                "wall_s": round(time.monotonic() - wall_s, 1),
                "cpu_s": round(time.process_time() - cpu_s, 1),
            }
            self._note(part, cost)
        self._note("corpus", self._provenance())

    def _make(self, plan: TrainingPlan, directory: Path, *, loss: Loss) -> None:
        tokenizer = self._tokenizer()
        windows = Windows(
            token_documents(self._corpus, tokenizer),
            separator=END_OF_TEXT_ID,
            length=plan.shape.context_length,
            seed=plan.seed,
        )
        progress_file = self._output / f"{directory.name}.progress"
        network = train(
            plan,
            windows,
            loss=loss,
            name=directory.name,
            progress_file=progress_file,
            workers=WORKERS,
        )
        write_checkpoint(network, tokenizer, directory)
        progress_file.unlink(missing_ok=True)
        self._note(directory.name, {"parameters": network.num_parameters()})

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self._model_directory / "tokenizer.json"))

    def _provenance(self) -> dict[str, object]:
        files = (*self._corpus.training, *self._corpus.held_out)
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "workers": WORKERS,
            "files": len(files),
            "files_held_out": len(self._corpus.held_out),
            "bytes": sum(len(file.text.encode()) for file in files),
            "sha256": self._corpus.digest(),
        }

    def _note(self, part: str, facts: dict[str, object]) -> None:
        report = json.loads(self._report_file.read_text()) if self._report_file.exists() else {}
        report[part] = report.get(part, {}) | facts
        self._report_file.write_text(json.dumps(report, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the bundled demo model and its draft.")
    parser.add_argument(
        "--output",
        type=Path,
        default=demo_model_directory().parent,
        help="where model/, draft/ and training.json are written (default: %(default)s)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="make only these; the parts before them must be there (default: all)",
    )
    options = parser.parse_args(arguments)
    configure_logging("training")
    # Workers compute on one core each, and their number leaves the result as it is.
    torch.set_num_threads(1)
    parts = [part for part in PARTS if part in options.parts]
    options.output.mkdir(parents=True, exist_ok=True)
    Workshop(BUNDLED, read_corpus(), options.output).run(parts)


if __name__ == "__main__":
    main()
