"""Engines that come as libraries: OpenVINO GenAI and CTranslate2, in a process of their own.

They are asked through a pipe, a line for a whole column, and take the time themselves: there is no
HTTP in their figures.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from understudy.tools.bench.columns import Answered, Prompt
from understudy.tools.bench.peers.processes import (
    ANSWER_TIMEOUT_S,
    START_TIMEOUT_S,
    Environment,
    Running,
    convert,
    environment_of,
    tail_of,
)
from understudy.tools.bench.servers import (
    ServerFailed,
    SpokenLines,
    family_memory_bytes,
    stop_family,
)

_DRIVER: Final = Path(__file__).with_name("driver.py")


class DrivenLibrary:
    """A driver process that answers."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._name = name
        self._process = process
        self._lines = SpokenLines(process.stdout)

    def await_ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            ServerFailed: The process ended, or the time is over.
        """
        self._read(START_TIMEOUT_S)

    def memory_bytes(self) -> int:
        """Memory of all its processes now."""
        return family_memory_bytes(self._process.pid)

    def ask(self, prompts: Sequence[Prompt], *, concurrency: int, output_tokens: int) -> Answered:
        """Have prompts answered: see ``Running``."""
        wall_s = 0.0
        made = 0
        for first in range(0, len(prompts), concurrency):
            batch = [prompt.token_ids for prompt in prompts[first : first + concurrency]]
            answer = self._exchange({"prompts": batch, "output_tokens": output_tokens})
            wall_s += answer["wall_s"]
            made += answer["output_tokens"]
        if made != len(prompts) * output_tokens:
            asked = f"{len(prompts)} x {output_tokens} tokens"
            raise ServerFailed(f"{self._name}: {made} tokens, {asked} asked for")
        return Answered(wall_s, sum(len(prompt.token_ids) for prompt in prompts), made)

    def _exchange(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(asked) + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ServerFailed(f"{self._name} has ended: {error}") from error
        return self._read(ANSWER_TIMEOUT_S)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        line = self._lines.next(timeout_s=timeout_s)
        if line is None:
            raise ServerFailed(f"{self._name} gave no answer")
        return msgspec.json.decode(line, type=dict[str, Any])


@contextlib.contextmanager
def driven_library(
    name: str, command: Sequence[str], variables: Mapping[str, str]
) -> Iterator[DrivenLibrary]:
    """Run a driver until the context ends.

    Raises:
        ServerFailed: It did not load its model within START_TIMEOUT_S.
    """
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **variables},
        ) as process,
    ):
        try:
            library = DrivenLibrary(name, process)
            library.await_ready()
            yield library
        except ServerFailed as error:
            raise ServerFailed(f"{error}: {' '.join(command)}\n{tail_of(errors)}") from error
        finally:
            stop_family(process)


@dataclass(frozen=True, slots=True)
class OpenVino:
    """OpenVINO GenAI; ``int8`` is weight-only."""

    name: str
    environment: Environment
    weights: Literal["f16", "int8"]
    family: str = "openvino"

    def version(self) -> str | None:
        """The library's version."""
        return self.environment.version_of("openvino-genai")

    def prepare(self, model: Path, converted: Path) -> Path:
        """Export with optimum-intel, which has to be in the peer's environment.

        Sixteen-bit weights are stored as float16, the only such format it exports; what it
        computes in is its own choice, bfloat16 where the processor has it.
        """
        stored = "fp16" if self.weights == "f16" else "int8"
        command = [
            *(str(self.environment.scripts / "optimum-cli"), "export", "openvino"),
            *("--model", str(model), "--task", "text-generation-with-past"),
            *("--weight-format", stored, "{}"),
        ]
        return convert(converted / f"openvino-{stored}", command, {"HF_HUB_OFFLINE": "1"})

    def command(self, model: Path, *, port: int, threads: int) -> Sequence[str]:  # noqa: ARG002
        """No port: it is asked through a pipe."""
        return (
            str(self.environment.python),
            "-P",
            str(_DRIVER),
            "openvino",
            str(model),
            f"{threads}",
        )

    @contextlib.contextmanager
    def running(self, model: Path, *, threads: int) -> Iterator[Running]:
        """Start its driver."""
        command = self.command(model, port=0, threads=threads)
        with driven_library(self.name, command, environment_of(threads)) as library:
            yield library


@dataclass(frozen=True, slots=True)
class CTranslate2:
    """CTranslate2 with 8-bit integers."""

    name: str
    environment: Environment
    family: str = "ctranslate2"

    def version(self) -> str | None:
        """The library's version."""
        return self.environment.version_of("ctranslate2")

    def prepare(self, model: Path, converted: Path) -> Path:
        """Convert; needs transformers and torch in the peer's environment."""
        command = [
            *(str(self.environment.scripts / "ct2-transformers-converter"), "--model", str(model)),
            *("--output_dir", "{}", "--quantization", "int8"),
        ]
        return convert(converted / "ctranslate2-int8", command, {"HF_HUB_OFFLINE": "1"})

    def command(self, model: Path, *, port: int, threads: int) -> Sequence[str]:  # noqa: ARG002
        """No port: it is asked through a pipe."""
        python = str(self.environment.python)
        return (python, "-P", str(_DRIVER), "ctranslate2", str(model), f"{threads}")

    @contextlib.contextmanager
    def running(self, model: Path, *, threads: int) -> Iterator[Running]:
        """Start its driver."""
        command = self.command(model, port=0, threads=threads)
        with driven_library(self.name, command, environment_of(threads)) as library:
            yield library
