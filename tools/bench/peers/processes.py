"""What every engine of a comparison has in common: its environment, its process, its answers."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Protocol

import msgspec

from understudy.tools.bench.client import Client, Target
from understudy.tools.bench.columns import Answered, Prompt
from understudy.tools.bench.events import CompletionStream
from understudy.tools.bench.servers import ServerFailed, family_memory_bytes, stop_family
from understudy.tools.bench.workload import PATHS

START_TIMEOUT_S: Final = 600.0
ANSWER_TIMEOUT_S: Final = 600.0
CONVERSION_TIMEOUT_S: Final = 3600.0
_PROBE_TIMEOUT_S: Final = 60.0
_SAID_BYTES_MAX: Final = 2000
_VERSION_PROGRAM: Final = (
    "import sys, importlib.metadata as metadata\n"
    "for name in sys.argv[1:]:\n"
    "    try: print(name, metadata.version(name)); break\n"
    "    except metadata.PackageNotFoundError: pass\n"
)


class Running(Protocol):
    """An engine that answers."""

    def ask(self, prompts: Sequence[Prompt], *, concurrency: int, output_tokens: int) -> Answered:
        """Have prompts answered, so many at a time.

        Raises:
            ServerFailed: One was not answered with as many tokens.
        """
        ...

    def memory_bytes(self) -> int:
        """Memory of all its processes now."""
        ...


class Peer(Protocol):
    """An engine to compare with, in one variant."""

    @property
    def name(self) -> str:
        """What its row is called."""
        ...

    @property
    def family(self) -> str:
        """What ``--peers`` and ``--peer-venv`` call it."""
        ...

    def version(self) -> str | None:
        """Its package and version; None if it is not installed."""
        ...

    def prepare(self, model: Path, converted: Path) -> Path:
        """Make of a model directory what it reads, in a directory for converted models.

        Raises:
            ServerFailed: That did not work.
        """
        ...

    def command(self, model: Path, *, port: int, threads: int) -> Sequence[str]:
        """What starts it on a prepared model; a port of 0 stands for the one to come."""
        ...

    def running(self, model: Path, *, threads: int) -> contextlib.AbstractContextManager[Running]:
        """Run it on a prepared model for as long as the context lasts.

        Raises:
            ServerFailed: It did not come up.
        """
        ...


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a peer's packages are."""

    python: Path

    @property
    def scripts(self) -> Path:
        """The folder of its commands."""
        return self.python.parent

    def version_of(self, *packages: str) -> str | None:
        """The first of these that is installed, with its version."""
        if not self.python.exists():
            return None
        command = [str(self.python), "-P", "-c", _VERSION_PROGRAM, *packages]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PROBE_TIMEOUT_S
        )
        return done.stdout.strip() or None


def convert(target: Path, command: Sequence[str], environment: Mapping[str, str]) -> Path:
    """Make a converted model, unless it is there: it appears under its name once it is whole.

    ``{}`` in the command is where to write it.

    Raises:
        ServerFailed: The command failed.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="part-") as scratch:
        part = Path(scratch) / target.name
        words = [word.format(part) for word in command]
        try:
            done = subprocess.run(
                words,
                capture_output=True,
                check=False,
                timeout=CONVERSION_TIMEOUT_S,
                env={**os.environ, **environment},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServerFailed(f"{' '.join(words)}: {error}") from error
        if done.returncode != 0:
            said = (done.stdout + done.stderr)[-_SAID_BYTES_MAX:].decode("utf-8", "replace")
            raise ServerFailed(f"{' '.join(words)} ended with {done.returncode}\n{said}")
        part.rename(target)
    return target


def environment_of(threads: int) -> dict[str, str]:
    """Variables for every engine: so many threads, and no look beyond this machine."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Dialect(NamedTuple):
    """How a server's ``/v1/completions`` differs from OpenAI's."""

    model: str
    extra: Mapping[str, Any]
    """More fields of the body."""
    takes_text: bool = False
    """Prompts have to be text."""
    says_done: bool = True
    """A stream ends with ``[DONE]``."""
    keeps_alive: bool = True
    """After a stream its connection serves further requests."""
    ready_path: str = "/v1/models"
    """What it answers with 200 once it is ready."""


class HttpServer:
    """A server that speaks OpenAI's protocol."""

    def __init__(self, name: str, target: Target, pid: int, dialect: Dialect) -> None:
        self._name = name
        self._target = target
        self._pid = pid
        self._dialect = dialect

    def memory_bytes(self) -> int:
        """Memory of all its processes now."""
        return family_memory_bytes(self._pid)

    def ask(self, prompts: Sequence[Prompt], *, concurrency: int, output_tokens: int) -> Answered:
        """Have prompts answered: see ``Running``."""
        return asyncio.run(self._ask(prompts, concurrency, output_tokens))

    async def _ask(
        self, prompts: Sequence[Prompt], concurrency: int, output_tokens: int
    ) -> Answered:
        bodies = [completion_body(self._dialect, prompt, output_tokens) for prompt in prompts]
        client = Client(
            self._target,
            PATHS["completions"],
            connections_max=concurrency,
            timeout_s=ANSWER_TIMEOUT_S,
            keeps_alive=self._dialect.keeps_alive,
        )
        waiting = iter(bodies)
        streams: list[CompletionStream] = []

        async def ask_again_and_again() -> None:
            for body in waiting:
                stream = CompletionStream()
                ending = await client.complete(body, stream, expected_tokens=output_tokens)
                is_whole = ending.failure is None or (
                    not self._dialect.says_done
                    and ending.failure.kind == "stream_cut"
                    and stream.finish_reason is not None
                )
                if not is_whole or stream.num_tokens != output_tokens:
                    found = f"{stream.num_tokens} tokens, {stream.finish_reason}"
                    raise ServerFailed(f"{self._name}: {ending.failure or found}")
                streams.append(stream)

        try:
            await client.connect(concurrency)
            began_s = time.monotonic()
            await asyncio.gather(*(ask_again_and_again() for _ in range(concurrency)))
            wall_s = time.monotonic() - began_s
        except OSError as error:
            raise ServerFailed(f"{self._name}: {error}") from error
        finally:
            client.close()
        prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        told = [stream.num_prompt_tokens for stream in streams]
        if None not in told and sum(filter(None, told)) != prompt_tokens:
            raise ServerFailed(f"{self._name} counts prompts of {told} tokens, not {prompt_tokens}")
        return Answered(wall_s, prompt_tokens, sum(stream.num_tokens for stream in streams))


def completion_body(dialect: Dialect, prompt: Prompt, output_tokens: int) -> bytes:
    """A request's JSON: greedy, streamed, and of an exact length."""
    body: dict[str, Any] = {
        "model": dialect.model,
        "prompt": prompt.text if dialect.takes_text else prompt.token_ids,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "stream": True,
        **dialect.extra,
    }
    return msgspec.json.encode(body)


@contextlib.contextmanager
def http_server(
    name: str, command: Sequence[str], port: int, dialect: Dialect, variables: Mapping[str, str]
) -> Iterator[HttpServer]:
    """Run a server on a port of loopback until the context ends.

    Raises:
        ServerFailed: It did not come up within START_TIMEOUT_S.
    """
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **variables},
        ) as process,
    ):
        try:
            if not _await_ready(process, port, dialect.ready_path):
                raise ServerFailed(f"{name} did not come up")
            target = Target.parse(f"http://127.0.0.1:{port}")
            yield HttpServer(name, target, process.pid, dialect)
        except ServerFailed as error:
            raise ServerFailed(f"{error}: {' '.join(command)}\n{tail_of(output)}") from error
        finally:
            stop_family(process)


def tail_of(output: IO[bytes]) -> str:
    """The last of what a process has written to a file."""
    output.seek(max(0, output.seek(0, os.SEEK_END) - _SAID_BYTES_MAX))
    return output.read().decode("utf-8", "replace")


def _await_ready(process: subprocess.Popen[bytes], port: int, path: str) -> bool:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up_at:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == http.HTTPStatus.OK:
                return True
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    return False
