"""The calls that chaos runs: of every kind, and the same for the same seed."""

from __future__ import annotations

import random
from typing import Any, Final

from tests.chaos.clients import KEYS, Call

_STARTS: Final = (
    "def read_file(path):\n",
    "import os\n\nclass Cache:\n    def __init__(self",
    "for line in ",
    "# Überprüft die Größe · naïve façade 😀\nif size > ",
    "try:\n    value = int(text)\nexcept ValueError:\n",
    'print(f"',
)
_STOPS: Final = (["\n\n"], ["return", "self."], [")"], ["e"])
_FORMS: Final[tuple[dict[str, Any], ...]] = (
    {
        "json": {
            "type": "object",
            "properties": {
                "the name of the function": {"type": "string"},
                "its arguments": {"type": "array", "items": {"enum": ["self", "path", "größe"]}},
            },
            "required": ["the name of the function", "its arguments"],
        }
    },
    {"regex": "[a-z]{3,60}(\\.[a-z]{1,9}){0,5}"},
    {"grammar": 'start: "[" word (", " word)* "]"\nword: /[a-z]{1,9}/ | start'},
)


STRICT_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "größe": {"type": "integer", "minimum": 0, "maximum": 9999},
        "a longer name, with words": {"type": "string", "maxLength": 20},
        "kinds": {"type": "array", "items": {"enum": ["naïve", "façade", "😀🦊"]}, "maxItems": 3},
    },
    "required": ["größe", "a longer name, with words", "kinds"],
    "additionalProperties": False,
}
TOOLS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {"name": name, "strict": True, "parameters": STRICT_SCHEMA | {"title": name}},
    }
    for name in ("look_up", "write_down")
]
_CHAT_FORMS: Final[tuple[dict[str, Any], ...]] = (
    {"response_format": {"type": "json_object"}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "it", "schema": STRICT_SCHEMA, "strict": True},
        }
    },
    {"tools": TOOLS, "tool_choice": "required"},
    {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look_up"}}},
    {"tools": TOOLS, "tool_choice": "auto"},
    {"tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False},
)
_DEADLINE_MS: Final = 900_000
"""So late that nobody misses it, and there all the same."""


def mixed_calls(count: int, *, seed: int, max_tokens: int) -> list[Call]:
    """Greedy and sampled, with stop strings, n = 2, logprobs, penalties, in forms of their own.

    Half of them are chats: their answers begin with thoughts, which a budget may close, and are
    plain, JSON, or calls of tools, forced and not. They come from two tenants, some with deadlines.
    """
    source = random.Random(seed)
    return [_mixed_call(source, max_tokens) for _ in range(count)]


def plain_calls(count: int, *, seed: int, max_tokens: int) -> list[Call]:
    """Completions that run to their full length."""
    source = random.Random(seed)
    return [
        Call(
            "/v1/completions",
            {
                "model": "understudy-demo",
                "stream": True,
                "seed": source.getrandbits(63),
                "prompt": source.choice(_STARTS),
                "max_tokens": max_tokens,
                "ignore_eos": True,
            },
        )
        for _ in range(count)
    ]


def _mixed_call(source: random.Random, max_tokens: int) -> Call:
    body: dict[str, Any] = {
        "model": "understudy-demo",
        "stream": True,
        "seed": source.getrandbits(63),
        "max_tokens": source.randint(max_tokens // 2, max_tokens),
        "stream_options": {"include_usage": source.random() < 0.5},
    }
    prompt = "".join(source.choices(_STARTS, k=source.randint(1, 6)))
    if source.random() < 0.5:
        body["temperature"] = 0
    else:
        body |= {"temperature": source.uniform(0.3, 1.3), "top_p": source.uniform(0.7, 1.0)}
    if source.random() < 0.2:
        body["stop"] = source.choice(_STOPS)
    if source.random() < 0.2:
        body["n"] = 2
    if source.random() < 0.2:
        body["presence_penalty"] = source.uniform(-1, 1)
        body["frequency_penalty"] = source.uniform(-1, 1)
    if source.random() < 0.2:
        body["logit_bias"] = {str(source.randrange(3, 4000)): source.uniform(-5, 5)}
    if source.random() < 0.3:
        body["deadline_ms"] = _DEADLINE_MS
    has_logprobs = source.random() < 0.3
    key = source.choice(KEYS)
    if source.random() < 0.5:
        if has_logprobs:
            body |= {"logprobs": True, "top_logprobs": 2}
        return Call("/v1/chat/completions", body | _chat_fields(source, prompt, max_tokens), key)
    if source.random() < 0.7:
        body["ignore_eos"] = True
    elif source.random() < 0.5:
        body["structured_outputs"] = source.choice(_FORMS)
    if has_logprobs:
        body["logprobs"] = 2
    return Call("/v1/completions", body | {"prompt": prompt}, key)


def _chat_fields(source: random.Random, prompt: str, max_tokens: int) -> dict[str, Any]:
    """What only a chat has: a form of its answer, tools, and a budget for thoughts."""
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if source.random() < 0.7:
        fields["thinking_token_budget"] = source.randint(0, max_tokens // 3)
    if source.random() < 0.7:
        return fields | source.choice(_CHAT_FORMS)
    return fields | {"ignore_eos": True}
