"""What quantisation costs: ``python -m understudy.tools.demo.quantization``.

Serves the bundled model, or any other, as engines do, with its weights as they are and in each form
that they can be given at load, on the files that training has not seen. Prints the loss of each,
and how often the likeliest token is the one that the weights as they are find.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.quantization_config import KVCacheDtype, Quantization
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling import sequence as scheduling
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.tools.demo.corpus import read_corpus
from understudy.tools.demo.evaluation import windows
from understudy.tools.demo.paths import demo_model_directory

FORMS: Final[tuple[tuple[Quantization, KVCacheDtype], ...]] = (
    ("none", "auto"),
    ("int8", "auto"),
    ("int4", "auto"),
    ("none", "int8"),
    ("int8", "int8"),
)
"""Of weights, and of keys and values."""
_NAMES: Final = {"none": "float32", "auto": "float32"}
WINDOW_TOKENS: Final = 1024
BLOCK_TOKENS: Final = 16


class Quality(NamedTuple):
    """Of one form of a model, on one set of texts."""

    nats_per_token: float
    bits_per_byte: float
    likeliest: Tensor
    """The token that it finds likeliest at each position."""


def measure(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str]) -> Quality:
    """The mean loss of a served model over `texts`, each cut into windows of its own."""
    length = min(WINDOW_TOKENS, model.config.max_model_len)
    blocks = -(-length // BLOCK_TOKENS)
    runner = ModelRunner(model, num_blocks=blocks, block_size=BLOCK_TOKENS)
    nats = 0.0
    likeliest: list[Tensor] = []
    for batch in windows(tokenizer, texts, length=length):
        tokens = tuple(batch.inputs[0].tolist())
        sequence = scheduling.Sequence(
            Request(0, 0, tokens, SamplingParams(seed=0, max_tokens=1)), attempt=0
        )
        sequence.block_table = list(range(blocks))
        plan = StepPlan(0, (ScheduledSequence(sequence, len(tokens)),))
        with torch.inference_mode():
            logits = model.logits(runner.hidden_states(plan))
            loss = functional.cross_entropy(logits, batch.targets[0], reduction="sum")
            nats += loss.item()
            likeliest.append(logits.argmax(-1))
    tokens_total = sum(len(found) for found in likeliest)
    byte_count = sum(len(text.encode()) for text in texts)
    return Quality(nats / tokens_total, nats / math.log(2) / byte_count, torch.cat(likeliest))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure each form, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=demo_model_directory(), metavar="DIR")
    parser.add_argument("--files", type=int, default=None, metavar="N", help="default: all")
    chosen = parser.parse_args(arguments)
    texts = [file.text for file in read_corpus().held_out[: chosen.files]]
    tokenizer = Tokenizer.from_file(str(chosen.model / "tokenizer.json"))
    print("weights  cache    nats/token  bits/byte  likeliest token is the same")
    reference: Tensor | None = None
    for form, kv_form in FORMS:
        named = f"{_NAMES.get(form, form):<7}  {_NAMES.get(kv_form, kv_form):<7}"
        try:
            model = load_model(
                chosen.model,
                dtype=torch.float32,
                device=torch.device("cpu"),
                numerics="fast",
                quantization=form,
                kv_cache_dtype=kv_form,
            )
        except ConfigurationError as error:
            print(f"{named}  {error}")
            continue
        quality = measure(model, tokenizer, texts)
        reference = quality.likeliest if reference is None else reference
        same = (quality.likeliest == reference).double().mean().item()
        print(
            f"{named}  {quality.nats_per_token:10.4f}  {quality.bits_per_byte:9.4f}  {same:27.2%}"
        )


if __name__ == "__main__":
    main()
