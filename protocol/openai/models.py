"""The list of models, and the version."""

from __future__ import annotations

from typing import Any, Final

OWNER: Final = "understudy"


def model_object(name: str, *, created: int, root: str, max_model_len: int) -> dict[str, Any]:
    """A model, with what vLLM says of it beyond OpenAI's fields.

    Args:
        name: What requests call it.
        created: Seconds since 1970.
        root: What it was loaded from.
        max_model_len: The longest prompt and answer together, in tokens.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": root,
        "parent": None,
        "max_model_len": max_model_len,
    }


def model_list(*models: dict[str, Any]) -> dict[str, Any]:
    """The answer to ``GET /v1/models``."""
    return {"object": "list", "data": list(models)}
