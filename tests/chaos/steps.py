"""Death at every step of one request: in each chunk of its prompt, and behind each of its tokens.

Each request is made so that its tokens cut what must not be cut: characters of several bytes, a
stop string, a key of JSON, a call of a tool, the mark that closes the thoughts. Its engine is
killed from inside, so that it is that very step: before the step, after it but before anybody hears
of it, and a moment after it was told. Behind the last token, that is after the end, before it is
delivered. No launcher starts engines anew: it would give up on one that dies so often.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

from tests.chaos.clients import Call, Comparison, Outcome, compare, run_calls
from tests.chaos.figures import Figure, Size, merge, told
from tests.chaos.stage import PARSERS, Stage, sabotaged_environment, write_keys
from tests.chaos.workload import STRICT_SCHEMA, TOOLS
from tests.cluster import Cluster, empty_cluster

CHUNK: Final = 32
"""Tokens of a step, so that prompts take several."""
_ENGINES: Final = 2
_WHENS: Final = ("before", "after", "told")
_PROMPT: Final = "# Überprüft die Größe\ndef check(path, size):\n    return size > 0\n\n" * 4
_DRAWN: Final = {"model": "understudy-demo", "stream": True, "temperature": 0.9, "top_p": 0.95}
_WITH_USAGE: Final = {"stream_options": {"include_usage": True}}


class _Case(NamedTuple):
    name: str
    call: Call
    is_shown: str
    """What the undisturbed answer must hold, so that the case is the one that is meant."""


def _cases(seed: int) -> list[_Case]:
    shared: dict[str, Any] = {**_DRAWN, **_WITH_USAGE, "seed": seed}
    chat = {**shared, "messages": [{"role": "user", "content": _PROMPT}]}
    regex = "Größe 😀🦊 [a-z]{3,9} naïve STOP-HERE and [a-z]{9,99}"
    schema = {"name": "it", "schema": STRICT_SCHEMA, "strict": True}
    form = {"response_format": {"type": "json_schema", "json_schema": schema}}
    forced = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    return [
        _Case(
            "characters of several bytes, and a stop string",
            Call(
                "/v1/completions",
                shared
                | {"prompt": _PROMPT, "max_tokens": 60, "stop": ["STOP-HERE"], "logprobs": 2}
                | {"structured_outputs": {"regex": regex}},
            ),
            "😀🦊",
        ),
        _Case(
            "thoughts that are closed, and keys of JSON",
            Call("/v1/chat/completions", chat | form | _thinking(5) | {"max_tokens": 90}),
            '"größe"',
        ),
        _Case(
            "a call of a tool",
            Call("/v1/chat/completions", chat | forced | _thinking(2) | {"max_tokens": 100}),
            "(",
        ),
        _Case(
            "two answers, cut at their length",
            Call("/v1/chat/completions", chat | {"n": 2, "max_tokens": 20, "ignore_eos": True}),
            "",
        ),
    ]


def _thinking(budget: int) -> dict[str, int]:
    return {"thinking_token_budget": budget}


def f3_every_step(size: Size) -> list[Figure]:
    """Kill the engine of one request at each of its steps, or at as many as are asked for."""
    figures = []
    with _company(size) as company:
        for case in _cases(size.seed):
            [golden] = company.stage.golden([case.call])
            if size.engine == "model":  # the echo follows no grammar
                assert any(
                    case.is_shown in text for texts in golden.told[:3] for text in texts.values()
                ), golden.told
            steps = _steps(golden)
            stride = max(1, -(-len(steps) * len(_cases(size.seed)) // size.resumes))
            chosen = sorted({*steps[::stride], steps[0], steps[-1]})
            before = company.num_deaths
            found = merge(
                [
                    company.killed_at(case.call, golden, step, when=_WHENS[number % 3])
                    for number, step in enumerate(chosen)
                ]
            )
            figures.append(
                Figure(
                    "F3",
                    f"killed at {company.num_deaths - before} of the {len(steps)} steps of a"
                    f" request ({case.name}; {size.kind})",
                    f"{told(found)}; {found.num_joins} joined again",
                    "all golden",
                    found.is_golden and found.num_joins == 0,
                )
            )
    return figures


def _steps(golden: Outcome) -> list[int]:
    """How many tokens are computed when each step of an answer begins."""
    usage = golden.told[3]
    num_prompt = usage["prompt_tokens"]
    num_choices = max(1, len(golden.told[0]))
    num_output = usage["completion_tokens"] // num_choices
    return [*range(0, num_prompt, CHUNK), *range(num_prompt, num_prompt + num_output - 1)]


class _Company:
    """Actors that the test has started one by one, and starts again."""

    def __init__(self, cluster: Cluster, fault_dir: Path, size: Size) -> None:
        self.stage = Stage(cluster, fault_dir)
        self._size = size
        self.num_deaths = 0
        self._numbers = itertools.count()
        cluster.start("supervisor")
        cluster.start(
            "gateway",
            *("--name=gateway-0", "--port=0", *PARSERS),
            f"--key-file={write_keys(fault_dir)}",
        )
        for _ in range(_ENGINES):
            self._start_engine()
        self.stage.wait_until_whole(_ENGINES)

    def killed_at(self, call: Call, golden: Outcome, step: int, *, when: str) -> Comparison:
        """The call with the death of its engine at a step of it, beside the call without."""
        stage = self.stage
        stage.sabotage("engines", f"die {when} {step}")
        # Of a salt of its own, so that no prefix is there from the time before.
        salted = call._replace(body=call.body | {"cache_salt": f"{when} {step}"})
        comparison = compare([golden], run_calls(stage.cluster.base_url, [salted]))
        if (stage.fault_dir / "engines").exists():
            # With drafts a last step may begin further back: the answer was complete before it.
            assert self._size.settings, f"nobody died {when} {step}"
            stage.mend("engines")
            return comparison
        self.num_deaths += 1
        self._start_engine()
        stage.wait_until_whole(_ENGINES)
        return comparison

    def _start_engine(self) -> None:
        """Start an engine by a name that no engine has had."""
        self.stage.cluster.start(
            "engine",
            f"--name=engine-{next(self._numbers)}",
            f"--engine={self._size.engine}",
            f"--max-num-batched-tokens={CHUNK}",
            environment={
                **self._size.settings,
                **sabotaged_environment(self.stage.fault_dir),
            },
        )


@contextmanager
def _company(size: Size) -> Iterator[_Company]:
    with TemporaryDirectory() as directory, empty_cluster() as cluster:
        yield _Company(cluster, Path(directory), size)
