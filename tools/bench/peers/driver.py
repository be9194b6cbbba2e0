"""Runs an engine that is a library: ``python driver.py KIND MODEL THREADS``, in its environment.

Uses nothing of Understudy, whose packages need not be in that environment. Speaks JSON lines:
``{"ready": true}`` once the model is loaded; then for ``{"prompts": [[1, 2]], "output_tokens": 8}``
it answers all prompts at once and says ``{"wall_s": 0.5, "output_tokens": 8}``. It ends with its
input. Greedy, and never before the length asked for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], int]
"""Answers prompts with so many tokens each; gives the number of tokens made."""

CACHE_GB = 2
SEQUENCES_MAX = 64


def openvino(model: str, threads: int) -> Generate:
    """OpenVINO GenAI's continuous batching, with its prefix cache."""
    import numpy as np
    import openvino  # type: ignore[import-not-found]
    import openvino_genai as genai  # type: ignore[import-not-found]

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = SEQUENCES_MAX
    scheduler.enable_prefix_caching = True
    properties = {"INFERENCE_NUM_THREADS": threads}
    pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
    config = genai.GenerationConfig()
    config.do_sample = False
    config.ignore_eos = True

    def generate(prompts: list[list[int]], output_tokens: int) -> int:
        config.max_new_tokens = output_tokens
        handles = [
            pipeline.add_request(number, openvino.Tensor(np.array([ids], np.int64)), config)
            for number, ids in enumerate(prompts)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return sum(len(output.generated_ids) for h in handles for output in h.read_all())

    return generate


def ctranslate2(model: str, threads: int) -> Generate:
    """CTranslate2, which answers a batch as a whole. It knows tokens by their spelling."""
    import ctranslate2 as library  # type: ignore[import-not-found]

    path = Path(model, "vocabulary.json")
    spellings = json.loads(path.read_text(encoding="utf-8"))
    generator = library.Generator(model, device="cpu", intra_threads=threads, compute_type="int8")

    def generate(prompts: list[list[int]], output_tokens: int) -> int:
        results = generator.generate_batch(
            [[spellings[token_id] for token_id in ids] for ids in prompts],
            max_length=output_tokens,
            min_length=output_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return sum(len(result.sequences_ids[0]) for result in results)

    return generate


KINDS: dict[str, Callable[[str, int], Generate]] = {
    "openvino": openvino,
    "ctranslate2": ctranslate2,
}


def main() -> None:
    """Load, then answer line by line."""
    kind, model, threads = sys.argv[1:]
    # Whatever a library prints goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    generate = KINDS[kind](model, int(threads))

    def say(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")

    say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        began_s = time.perf_counter()
        made = generate(asked["prompts"], asked["output_tokens"])
        say({"wall_s": time.perf_counter() - began_s, "output_tokens": made})


if __name__ == "__main__":
    main()
