"""What the clients of a simulation ask: requests of all kinds, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

from tests.simulation.invariants import HIDDEN_SIZE, VOCAB_SIZE
from understudy.protocol.request import Pooling, PoolingKind, Request, SamplingParams


def draw_requests(seed: int, count: int) -> list[Request]:
    """Long and short, greedy and sampled, in groups, with stop tokens, penalties, priorities."""
    draw = random.Random(seed)
    requests: list[Request] = []
    for number in range(1, count + 1):
        prompt = tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 60)))
        group_id = number
        if requests and draw.random() < 0.2:
            group_id, prompt = requests[-1].group_id, requests[-1].prompt
        params = SamplingParams(
            seed=draw.getrandbits(64),
            max_tokens=draw.randint(1, 50),
            min_tokens=draw.choice([0, 0, 5]),
            temperature=draw.choice([0.0, 0.7, 1.0]),
            top_k=draw.choice([0, 0, 20]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
            presence_penalty=draw.choice([0.0, 0.5]),
            frequency_penalty=draw.choice([0.0, -0.5]),
            logit_bias=draw.choice([(), ((3, -1.5), (7, 2.0))]),
            stop_token_ids=tuple(range(draw.choice([0, 0, 10, 40]))),
            logprobs=draw.choice([None, None, 0, 3]),
        )
        priority = draw.choice([0, 0, 0, -1, 5])
        requests.append(Request(number, group_id, prompt, params, priority))
    return requests


def with_vectors(seed: int, requests: Iterable[Request]) -> list[Request]:
    """The same, but some of them ask for vectors in the place of answers."""
    draw = random.Random(~seed)
    made = []
    for request in requests:
        if draw.random() < 0.2:
            kind = draw.choice([PoolingKind.LAST, PoolingKind.MEAN])
            pooling = Pooling(kind, draw.choice([0, 0, HIDDEN_SIZE // 2]))
            params = SamplingParams(seed=0, max_tokens=1)
            request = replace(request, params=params, pooling=pooling)
        made.append(request)
    return made
