"""Has the demo model answer a table of JSON schemas at temperature 1, and validates what it says.

    python -m tests.conformance                                   # the table that is written here
    python -m tests.conformance --suite jsonschema-4.26.0.tar.gz  # and the JSON Schema test suite's

An answer that its ``max_tokens`` cut off is counted, and not validated. The suite is read from the
source distribution of ``jsonschema``; of its schemas, those that the library refuses are counted.
Exits with 1 if an answer is invalid.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from tests.conformance.schemas import table
from tests.conformance.words import Schema
from tests.serving import request_of
from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.structured_output import json_grammar
from understudy.protocol.request import FinishReason, Request, SamplingParams
from understudy.runtime.grammar_masks import GrammarMasks
from understudy.runtime.grammars import GrammarError, Grammars, load_vocabulary
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.tokenizer import Tokenizer
from understudy.tools.demo.paths import demo_model_directory

PROMPT: Final = "import json\n\nvalue = json.loads('''"
_DRAFT: Final = "/json/tests/draft2020-12/"
_FORMATS: Final = Draft202012Validator.FORMAT_CHECKER


class Times(NamedTuple):
    """What the steps took, in seconds."""

    steps: list[float]
    masks: GrammarMasks


class Answers(NamedTuple):
    """All answers, and what they took."""

    tokens: Mapping[int, list[int]]
    finishes: Mapping[int, FinishReason]
    times: Times


def main() -> int:
    """Run the tables that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("--suite", type=Path, help="source distribution of jsonschema")
    parser.add_argument("--only-suite", action="store_true")
    parser.add_argument("--seeds", type=int, default=2, help="answers for each schema")
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="answers at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {} if options.only_suite else {"written here": table()}
    if options.suite is not None:
        tables["JSON Schema test suite, draft 2020-12"] = read_suite(options.suite)
    num_invalid = 0
    for name, schemas in tables.items():
        print(f"{name}: {len(schemas)} schemas")
        num_invalid += run(
            schemas,
            num_seeds=options.seeds,
            max_tokens=options.max_tokens,
            batch=options.batch,
        )
    return 1 if num_invalid else 0


def read_suite(path: Path) -> dict[str, Schema]:
    """The suite's schemas that are objects, each once."""
    schemas: dict[str, Schema] = {}
    seen: set[str] = set()
    with tarfile.open(path) as archive:
        for member in archive:
            if _DRAFT not in member.name or not member.name.endswith(".json"):
                continue
            file = archive.extractfile(member)
            assert file is not None
            for group in json.load(file):
                text = json.dumps(group["schema"], sort_keys=True)
                if isinstance(group["schema"], dict) and text not in seen:
                    seen.add(text)
                    place = member.name.partition(_DRAFT)[2].removesuffix(".json")
                    schemas[f"{place}: {group['description']}"] = group["schema"]
    return schemas


def run(schemas: Mapping[str, Schema], *, num_seeds: int, max_tokens: int, batch: int) -> int:
    """Answer a table and print how it went; gives the number of invalid answers."""
    directory = demo_model_directory()
    tokenizer = Tokenizer.from_directory(directory)
    grammars = Grammars(lambda: load_vocabulary(directory))
    texts = dict(_compiled(schemas, grammars))
    print(f"  {len(schemas) - len(texts)} are refused, {len(texts)} are served")
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    names: dict[int, str] = {}
    requests = []
    for number, (name, text) in enumerate(texts.items()):
        for seed in range(num_seeds):
            params = SamplingParams(
                seed=1000 * number + seed,
                max_tokens=max_tokens,
                temperature=1.0,
                grammar=text,
                stop_token_ids=(*grammars.vocabulary.eos_token_ids,),
            )
            names[params.seed] = name
            requests.append(request_of(params.seed, prompt, params))
    answers = answer(requests, grammars, max_num_seqs=batch)
    invalid = unjudged = 0
    for request_id, finish in answers.finishes.items():
        if finish is FinishReason.STOP:
            name = names[request_id]
            text = tokenizer.decode(answers.tokens[request_id])
            try:
                problem = problem_with(text, schemas[name])
            except (re.error, OverflowError):
                unjudged += (
                    1  # a pattern that Python cannot read, or a number that it cannot divide
                )
                continue
            if problem is not None:
                invalid += 1
                print(f"  INVALID {name}: {text!r}: {problem}")
    counts = {reason.name: list(answers.finishes.values()).count(reason) for reason in FinishReason}
    print(
        f"  {len(requests)} answers at temperature 1: {counts['STOP']} complete, of which "
        f"{invalid} are invalid and {unjudged} cannot be judged; "
        f"{counts['LENGTH']} cut off at {max_tokens} tokens; "
        f"{counts['REFUSED']} ended by the library's limits"
    )
    _report(answers.times)
    return invalid + counts["ERROR"]


def answer(requests: list[Request], grammars: Grammars, *, max_num_seqs: int) -> Answers:
    """Serve requests as an engine does, so many at a time."""
    directory, block_size, num_blocks = demo_model_directory(), 16, 1024
    cpu = torch.device("cpu")
    model = load_model(directory, dtype=torch.float32, device=cpu, numerics="exact")
    masks = GrammarMasks(grammars)
    runner = ModelRunner(model, num_blocks=num_blocks, block_size=block_size, grammar_masks=masks)
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=512,
        max_model_len=model.config.max_model_len,
        block_size=block_size,
    )
    manager = KVCacheManager(num_blocks=num_blocks, block_size=block_size)
    scheduler = Scheduler(config, manager)
    for request in requests:
        scheduler.add(Sequence(request, attempt=0))
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    finishes: dict[int, FinishReason] = {}
    steps = []
    while (plan := scheduler.schedule()) is not None:
        begun_at = time.perf_counter()
        draws = runner.execute(plan)
        steps.append(time.perf_counter() - begun_at)
        for row in scheduler.update(plan, draws):
            tokens[row.request_id] += row.tokens
            if row.finish:
                finishes[row.request_id] = FinishReason(row.finish)
    masks.close()
    return Answers(tokens, finishes, Times(steps, masks))


def problem_with(text: str, schema: Schema) -> str | None:
    """What is wrong with an answer, or ``None``."""
    try:
        value: Any = json.loads(text)
        Draft202012Validator(schema, format_checker=_FORMATS).validate(value)
    except ValueError as error:
        return f"no JSON: {error}"
    except ValidationError as error:
        return error.message
    return None


def _compiled(schemas: Mapping[str, Schema], grammars: Grammars) -> Iterator[tuple[str, str]]:
    for name, schema in schemas.items():
        try:
            text = json_grammar(schema, param="schema").text
            matcher = grammars.vocabulary.compile(text)
        except (GrammarError, InvalidRequest):
            continue
        matcher.compute_bitmask()
        if not matcher.is_error():
            yield name, text


def _report(times: Times) -> None:
    masks, total_s, num_steps = times.masks, sum(times.steps), len(times.steps)
    print(
        f"  {num_steps} steps of {1e3 * total_s / num_steps:.2f} ms; {masks.num_masks} masks of "
        f"{1e3 * masks.mask_s / masks.num_masks:.3f} ms on threads beside them; steps waited "
        f"{100 * masks.wait_s / total_s:.2f} % of their time for masks, and went on without "
        f"one {masks.num_waits} times"
    )


if __name__ == "__main__":
    sys.exit(main())
