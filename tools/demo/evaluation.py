"""How good the trained models are, on files that neither of them has seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from understudy.tools.demo.batches import Batch
from understudy.tools.demo.network import Network
from understudy.tools.demo.training import next_token_loss
from understudy.tools.demo.vocabulary import END_OF_TEXT_ID


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Cross-entropy on unseen files, for each token and for each byte of their text."""

    nats_per_token: float
    bits_per_byte: float


def held_out_loss(network: Network, tokenizer: Tokenizer, texts: Sequence[str]) -> HeldOutLoss:
    """The mean loss of `network` over `texts`, each cut into windows of the context length."""
    nats = 0.0
    tokens = 0
    for batch in windows(tokenizer, texts, length=network.shape.context_length):
        with torch.no_grad():
            nats += next_token_loss(network(batch.inputs), batch).item() * batch.targets.numel()
        tokens += batch.targets.numel()
    byte_count = sum(len(text.encode()) for text in texts)
    return HeldOutLoss(
        nats_per_token=round(nats / tokens, 4),
        bits_per_byte=round(nats / math.log(2) / byte_count, 4),
    )


def agreement(model: Network, draft: Network, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """The share of positions in `texts` where both networks find the same token likeliest."""
    equal = 0
    tokens = 0
    for batch in windows(tokenizer, texts, length=model.shape.context_length):
        with torch.no_grad():
            same: Tensor = model(batch.inputs).argmax(-1) == draft(batch.inputs).argmax(-1)
        equal += int(same.sum())
        tokens += same.numel()
    return round(equal / tokens, 4)


def completion(
    network: Network,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens_max: int,
    temperature: float,
    seed: int,
) -> str:
    """A continuation of `prompt` drawn from `network`, up to its end or to `tokens_max`."""
    tokens = tokenizer.encode(prompt).ids
    length = len(tokens)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens_max):
        context = torch.tensor([tokens[-network.shape.context_length :]])
        with torch.no_grad():
            likelihoods = (network(context)[0, -1] / temperature).softmax(-1)
        token = int(torch.multinomial(likelihoods, 1, generator=generator))
        if token == END_OF_TEXT_ID:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[length:])


def windows(tokenizer: Tokenizer, texts: Sequence[str], *, length: int) -> Iterator[Batch]:
    """Every token of `texts` once as a target; a document begins after an end of text."""
    for encoding in tokenizer.encode_batch(list(texts)):
        stream = torch.tensor([[END_OF_TEXT_ID, *encoding.ids, END_OF_TEXT_ID]])
        for start in range(0, stream.shape[1] - 1, length):
            window = stream[:, start : start + length + 1]
            yield Batch(inputs=window[:, :-1], targets=window[:, 1:])
