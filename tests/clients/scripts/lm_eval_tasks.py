"""EleutherAI's lm-eval: two small tasks by ``local-completions``, with the server's tokenizer."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

MODEL: Final = os.environ["MODEL"]
SERVER_URL: Final = os.environ["SERVER_URL"]
SCRATCH: Final = Path(tempfile.mkdtemp(prefix="lm-eval-", dir=os.environ["SCRATCH"]))
ROWS: Final = [
    {"question": "def add(a, b):\n    return a", "choices": [" + b", " zebra"], "answer": 0},
    {"question": "for index in", "choices": [" marmalade", " range(10):"], "answer": 1},
    {"question": "import", "choices": [" os", " the sea"], "answer": 0},
]
COMMON: Final = f"""\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {SCRATCH / "rows.jsonl"}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOOSING: Final = (
    "task: choosing\noutput_type: multiple_choice\n"
    + COMMON
    + 'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\ntarget_delimiter: ""\n'
    + "metric_list:\n  - metric: acc\n"
)
WRITING: Final = (
    "task: writing\noutput_type: generate_until\n"
    + COMMON
    + 'doc_to_target: "{{choices[answer]}}"\n'
    + 'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 12\n'
    + "metric_list:\n  - metric: exact_match\n"
)
(SCRATCH / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
(SCRATCH / "choosing.yaml").write_text(CHOOSING, encoding="utf-8")
(SCRATCH / "writing.yaml").write_text(WRITING, encoding="utf-8")


def evaluate(task: str, *, model: str = MODEL) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results of a task, and its samples."""
    output = SCRATCH / task
    arguments = {
        "model": model,
        "base_url": f"{SERVER_URL}/v1/completions",
        "tokenizer_backend": "remote",
        "tokenized_requests": "True",
        "max_length": "512",
        "max_retries": "1",
    }
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("lm_eval"), "run", "--model", "local-completions"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
            *("--tasks", task, "--include_path", str(SCRATCH)),
            *("--output_path", str(output), "--log_samples"),
        ],
        env={**os.environ, "HF_HOME": str(SCRATCH / "cache"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode:
        raise AssertionError(done.stderr[-2000:])
    [results] = output.rglob("results_*.json")
    [samples] = output.rglob("samples_*.jsonl")
    lines = samples.read_text(encoding="utf-8").splitlines()
    scores: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))["results"][task]
    return scores, [json.loads(line) for line in lines]


def complete(**fields: Any) -> Any:
    body = json.dumps({"model": MODEL, **fields}).encode()
    request = urllib.request.Request(
        f"{SERVER_URL}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]


def likelihoods(question: str, choices: list[str]) -> Iterator[float]:
    """How likely each choice is after a question, asked for without lm-eval."""
    for choice in choices:
        answer = complete(prompt=question + choice, max_tokens=0, echo=True, logprobs=1)
        logprobs = answer["logprobs"]
        yield sum(
            logprob
            for logprob, offset in zip(
                logprobs["token_logprobs"], logprobs["text_offset"], strict=True
            )
            if offset >= len(question)
        )


def check_loglikelihood() -> None:
    scores, samples = evaluate("choosing")
    assert len(samples) == len(ROWS)
    num_right = 0
    for sample in samples:
        found = [float(pair[0]) for pair in sample["filtered_resps"]]
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        for one, other in zip(found, likelihoods(question, choices), strict=True):
            assert math.isclose(one, other, abs_tol=1e-3), (question, found, other)
        num_right += found.index(max(found)) == sample["doc"]["answer"]
    assert math.isclose(scores["acc,none"], num_right / len(ROWS), abs_tol=1e-6)


def check_generation_until() -> None:
    _, samples = evaluate("writing")
    assert len(samples) == len(ROWS)
    for sample in samples:
        [[text]] = sample["resps"]
        expected = complete(
            prompt=sample["doc"]["question"], max_tokens=12, temperature=0, stop=["\n"]
        )
        assert text == expected["text"]
        assert "\n" not in text


def check_errors() -> None:
    try:
        evaluate("choosing", model="other")
    except AssertionError as error:
        assert "other" in str(error) or "404" in str(error), error
    else:
        raise AssertionError("a model that is not there was evaluated")
