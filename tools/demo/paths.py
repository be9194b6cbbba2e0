"""Where the bundled demo model and its draft model lie. Knows paths only; never imports torch."""

from __future__ import annotations

from pathlib import Path


def demo_model_directory() -> Path:
    """The Hugging Face directory of the bundled model, in a checkout and in an installed wheel."""
    return Path(__file__).parent / "model"


def draft_model_directory() -> Path:
    """The directory of the small model with the same tokenizer that drafts for the bundled one."""
    return Path(__file__).parent / "draft"
