"""The command ``llm``, with this server in its ``extra-openai-models.yaml``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

MODEL: Final = os.environ["MODEL"]
HOME: Final = Path(tempfile.mkdtemp(prefix="llm-", dir=os.environ["SCRATCH"]))
SETTINGS: Final = f"""\
- model_id: demo
  model_name: {MODEL}
  api_base: {os.environ["SERVER_URL"]}/v1
  api_key_name: none
  supports_schema: true
  supports_tools: true
- model_id: demo-completion
  model_name: {MODEL}
  api_base: {os.environ["SERVER_URL"]}/v1
  api_key_name: none
  completion: true
- model_id: other
  model_name: other
  api_base: {os.environ["SERVER_URL"]}/v1
  api_key_name: none
"""
(HOME / "extra-openai-models.yaml").write_text(SETTINGS, encoding="utf-8")
(HOME / "keys.json").write_text('{"none": "none"}', encoding="utf-8")


def llm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("llm"), *words],
        env={**os.environ, "LLM_USER_PATH": str(HOME)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def say(*words: str) -> str:
    done = llm(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logged() -> Any:
    """What the command has written down of its last call."""
    return json.loads(say("logs", "list", "--json", "--count=1"))[0]


def check_models() -> None:
    assert "demo-completion" in say("models", "list")


def check_plain() -> None:
    text = say("-m", "demo", "--no-stream", "-o", "max_tokens", "8", "Add numbers.")
    assert text.strip()
    assert logged()["output_tokens"] <= 8


def check_streaming_with_usage() -> None:
    options = ("-o", "max_tokens", "24", "-o", "temperature", "0")
    whole = say("-m", "demo", "--no-stream", *options, "Add numbers.")
    assert say("-m", "demo", *options, "Add numbers.") == whole
    assert 1 <= logged()["output_tokens"] <= 24


def check_a_conversation_goes_on() -> None:
    say("-m", "demo", "-o", "max_tokens", "8", "Add numbers.")
    first = logged()
    say("--continue", "-o", "max_tokens", "8", "And then?")
    assert logged()["conversation_id"] == first["conversation_id"]
    assert logged()["input_tokens"] > first["input_tokens"]


def check_completions() -> None:
    assert say("-m", "demo-completion", "-o", "max_tokens", "8", "def add(a, b):\n")


def check_structured_output() -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["method", "function"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    text = say("-m", "demo", "--schema", json.dumps(schema), "-o", "max_tokens", "99", "A function")
    assert json.loads(text)["kind"] in {"method", "function"}


def check_tools_are_offered() -> None:
    function = "def weather(city: str) -> str:\n    'How it is outside.'\n    return 'rain'\n"
    say("-m", "demo", "--functions", function, "-o", "max_tokens", "24", "How is it in Ulm?")
    assert [tool["name"] for tool in logged()["tools"]] == ["weather"]


def check_errors() -> None:
    failed = llm("-m", "other", "Add numbers.")
    assert failed.returncode != 0
    assert "other" in failed.stderr
