"""How to speculate, as an operator says it: JSON with the names that other servers use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

Method = Literal["ngram", "draft_model"]

DEPTH_MAX: Final = 16
_DEPTH: Final = {"ngram": 7, "draft_model": 7}


class SpeculativeConfig(NamedTuple):
    """Who guesses, and how far at most."""

    method: Method
    model: Path | None
    """The draft model's directory."""
    num_speculative_tokens: int
    adaptive: bool
    """Whether the depth follows what pays; else it is always the most."""


def parse_speculative_config(text: str) -> SpeculativeConfig:
    """Read ``{"method": "ngram"}`` or ``{"method": "draft_model", "model": DIR}``.

    Optional: ``num_speculative_tokens`` and ``adaptive``.

    Raises:
        ValueError: one line that says what is wrong.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected JSON, got {text[:64]!r}: {error}") from None
    if type(fields) is not dict:
        raise ValueError(f"expected a JSON object, got {text[:64]!r}")
    strays = fields.keys() - SpeculativeConfig._fields
    if strays:
        raise ValueError(f"unknown: {', '.join(sorted(strays))}")
    method = fields.get("method", "draft_model" if "model" in fields else "ngram")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    model = fields.get("model")
    if (method == "draft_model") != isinstance(model, str):
        raise ValueError("draft_model needs model, a directory, and ngram takes none")
    depth = fields.get("num_speculative_tokens", _DEPTH[method])
    if type(depth) is not int or not 1 <= depth <= DEPTH_MAX:
        raise ValueError(f"num_speculative_tokens must be 1 to {DEPTH_MAX}, not {depth!r}")
    adaptive = fields.get("adaptive", True)
    if type(adaptive) is not bool:
        raise ValueError(f"adaptive must be true or false, not {adaptive!r}")
    return SpeculativeConfig(method, None if model is None else Path(model), depth, adaptive)
