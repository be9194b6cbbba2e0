"""GuideLLM: a short benchmark, whose counts are those of the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

SERVER_URL: Final = os.environ["SERVER_URL"]
MODEL: Final = os.environ["MODEL"]
MODEL_DIRECTORY: Final = os.environ["MODEL_DIRECTORY"]
SCRATCH: Final = Path(tempfile.mkdtemp(prefix="guidellm-", dir=os.environ["SCRATCH"]))
NUM_REQUESTS: Final = 12
NUM_TOKENS: Final = 16


def benchmark(profile: str, *, request_format: str) -> Any:
    """The report of one run."""
    output = SCRATCH / f"{request_format.strip('/').replace('/', '-')}.json"
    backend = f"kind=openai_http,target={SERVER_URL},model={MODEL},request_format={request_format}"
    data = f"kind=synthetic_text,prompt_tokens=32,output_tokens={NUM_TOKENS}"
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("guidellm"), "run", "--disable-console"),
            *("--backend", backend, "--profile", profile, "--data", data),
            *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={MODEL_DIRECTORY}"),
            *("--output", f"kind=json,path={output}"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode:
        raise AssertionError((done.stdout + done.stderr)[-2000:])
    return json.loads(output.read_text(encoding="utf-8"))


def is_right(report: Any) -> bool:
    [run] = report["benchmarks"]
    totals = run["metrics"]["request_totals"]
    assert totals["successful"] == NUM_REQUESTS, totals
    assert totals["errored"] == 0, totals
    requests = run["requests"]["successful"]
    assert len(requests) == NUM_REQUESTS
    assert {one["output_tokens"] for one in requests} == {NUM_TOKENS}
    assert all(one["prompt_tokens"] >= 32 for one in requests)
    assert all(one["time_to_first_token_ms"] > 0 for one in requests)
    return True


def check_one_after_the_other() -> None:
    assert is_right(benchmark("kind=synchronous", request_format="/v1/completions"))


def check_several_chats_at_once() -> None:
    profile = "kind=concurrent,streams=4"
    assert is_right(benchmark(profile, request_format="/v1/chat/completions"))


def check_responses_at_once() -> None:
    assert is_right(benchmark("kind=concurrent,streams=4", request_format="/v1/responses"))
