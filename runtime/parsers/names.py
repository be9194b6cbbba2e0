"""The names under which an operator asks for parsers. Knows nothing else: the CLI reads it."""

from __future__ import annotations

from typing import Final

TOOL_PARSERS: Final = ("hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder")
REASONING_PARSERS: Final = ("deepseek_r1", "mistral", "qwen3")
