"""lm-eval's scores with and without the death of engines in the run: equal to the last digit.

Run by hand, by the product's Python; lm-eval has a virtual environment of its own::

    python -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install 'lm-eval[api]' transformers
    python -m tests.clients.lm_eval_equality --lm-eval /tmp/lm-eval/bin/lm_eval

Two tasks from the held-out files of the bundled model's corpus: which of four lines comes next (by
log-likelihood: ``echo`` with ``logprobs``), and the lines that follow (generated). A server of two
engines is asked twice by ``local-completions``. In the second run each engine is killed with
``kill -9`` while it has requests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tests.cluster import WAIT_MAX_S, Cluster, running_cluster
from understudy.protocol.status import EngineStatus
from understudy.tools.demo.corpus import read_corpus
from understudy.tools.demo.paths import demo_model_directory

CHOICE: Final = "next_line"
GENERATE: Final = "following_lines"
_TASKS: Final = {
    CHOICE: """
task: next_line
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    GENERATE: """
task: following_lines
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{following}}"
generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 64, temperature: 0.0}
metric_list:
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
""",
}


def documents(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Beginnings of held-out files with their next lines, and three lines of other files."""
    source = random.Random(seed)
    texts = [file.text for file in read_corpus().held_out]
    found: list[dict[str, Any]] = []
    while len(found) < count:
        lines = source.choice(texts).splitlines(keepends=True)
        place = source.randrange(8, max(9, len(lines) - 8))
        context, following = lines[place - 8 : place], lines[place : place + 4]
        others = [source.choice(source.choice(texts).splitlines(keepends=True)) for _ in range(3)]
        choices = [*others, following[0] if following else ""]
        if not all(line.strip() for line in choices) or not "".join(context).strip():
            continue
        source.shuffle(choices)
        found.append(
            {
                "context": "".join(context),
                "choices": choices,
                "answer": choices.index(following[0]),
                "following": "".join(following),
            }
        )
    return found


def run_lm_eval(
    lm_eval: Path, cluster: Cluster, tasks: Path, output: Path
) -> subprocess.Popen[bytes]:
    """Begin an evaluation of the served model."""
    model = demo_model_directory()
    arguments = (
        f"model=understudy-demo,base_url={cluster.base_url}/v1/completions,tokenizer={model},"
        "tokenizer_backend=huggingface,tokenized_requests=True,num_concurrent=6,max_length=1024,"
        "max_retries=1"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "home")}
    with (tasks / "lm_eval.log").open("ab") as log:
        return subprocess.Popen(
            [
                *(lm_eval, "run", "--model", "local-completions", "--model_args", arguments),
                *("--tasks", f"{CHOICE},{GENERATE}", "--include_path", tasks),
                *("--output_path", output, "--log_samples"),
            ],
            env=os.environ | offline,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def kill_each_engine(cluster: Cluster, evaluation: subprocess.Popen[bytes]) -> int:
    """Kill each engine once while it has requests; gives how often that was possible."""
    killed = 0
    for name in ("engine-0", "engine-1"):
        while evaluation.poll() is None:
            engine = _serving(cluster, name)
            if engine is not None and engine.running:
                os.kill(engine.pid, signal.SIGKILL)
                killed += 1
                print(f"killed {name}, pid {engine.pid}, with {engine.running} running", flush=True)
                break
            time.sleep(0.005)
        while evaluation.poll() is None and _serving(cluster, name) is None:
            time.sleep(0.05)
    return killed


def _serving(cluster: Cluster, name: str) -> EngineStatus | None:
    """An engine, if it serves; on a busy machine an answer may be missing."""
    reply = cluster.report().reply
    engines = () if reply is None else reply.engines
    return next((each for each in engines if (each.name, each.state) == (name, "serving")), None)


def read_scores(output: Path) -> tuple[Any, list[Any]]:
    """The scores, and what each document was answered with, to the last digit."""
    [results] = output.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    samples = []
    for path in sorted(output.rglob("samples_*.jsonl")):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            samples.append((path.name.split("_2")[0], sample["doc_id"], sample["resps"]))
    return scores, sorted(samples, key=repr)


def main() -> int:
    """Evaluate twice and compare; 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients.lm_eval_equality")
    parser.add_argument("--lm-eval", type=Path, required=True, help="lm-eval's command")
    parser.add_argument("--documents", type=int, default=60, help="of each task (60)")
    parser.add_argument("--seed", type=int, default=1, help="of their choice (1)")
    chosen = parser.parse_args()
    found = []
    num_killed = 0
    with tempfile.TemporaryDirectory(prefix="lm-eval-") as directory:
        tasks = Path(directory)
        data = tasks / "documents.jsonl"
        lines = [json.dumps(each) for each in documents(chosen.documents, seed=chosen.seed)]
        data.write_text("\n".join(lines))
        for name, text in _TASKS.items():
            (tasks / f"{name}.yaml").write_text(text.replace("DATA", json.dumps(str(data))))
        with running_cluster(engines=2, engine="model") as cluster:
            for is_disturbed in (False, True):
                output = tasks / f"output-{is_disturbed}"
                evaluation = run_lm_eval(chosen.lm_eval, cluster, tasks, output)
                if is_disturbed:
                    num_killed = kill_each_engine(cluster, evaluation)
                if evaluation.wait(20 * WAIT_MAX_S):
                    print((tasks / "lm_eval.log").read_text()[-4000:], file=sys.stderr)
                    return 1
                scores, samples = read_scores(output)
                found.append((scores, samples))
                print(f"{num_killed} engines killed; {len(samples)} answers; {json.dumps(scores)}")
            reply = cluster.wait_until(lambda report: report.reply is not None).reply
            assert reply is not None
            print(f"{reply.resumed} requests went on elsewhere")
    (scores, samples), (scores_after, samples_after) = found
    num_changed = sum(a != b for a, b in zip(samples, samples_after, strict=True))
    is_equal = scores == scores_after and num_changed == 0
    outcome = "equal" if is_equal else "DIFFERENT"
    print(f"{num_changed} of {len(samples)} answers differ; the scores are {outcome}")
    return 0 if is_equal and num_killed else 1


if __name__ == "__main__":
    sys.exit(main())
