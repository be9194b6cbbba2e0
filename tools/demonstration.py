"""``understudy demo``: kill -9 the engine that makes a text, in view, and see the text go on.

The same request is then made again, undisturbed: the SHA-256 of both texts has to be equal.
Everything runs in a directory and on a port of its own, so that it disturbs nothing. With
``--stay`` it goes on serving, and says what to try.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from understudy.actors.launcher import Ready
from understudy.protocol.errors import Unavailable
from understudy.protocol.messages import StatusReply, StatusRequest
from understudy.runtime.config import launcher_config
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.kit.client import SupervisorClient
from understudy.runtime.settings import SUPERVISOR_SOCKET
from understudy.tools.configuration import settle_with_model
from understudy.tools.start import LOG_FILE, base_url, run_node, send_output_to

PREFERRED_PORT: Final = 8000
PROMPT: Final = "def read_lines(path):\n"
MAX_TOKENS: Final = 180
TEMPERATURE: Final = 0.7
SEED: Final = 5
"""The answer is the same each time: text depends on request and seed alone."""
KILL_AFTER: Final = 60
"""Tokens; the engine is killed at the next end of a line, so that the text stays readable."""
KILL_AFTER_MAX: Final = 100

_ANSWER_WITHIN_S: Final = 60.0
_STATUS_WITHIN_S: Final = 1.0
_ENGINE_COMMENT: Final = b": engine "
_BOLD: Final = "\033[1m"
_PLAIN: Final = "\033[0m"


def demonstrate(*, stays: bool) -> int:
    """Start, show, and stop; or stay until stopped."""
    port = _free_port(PREFERRED_PORT) if stays else 0
    # Under /tmp and not $TMPDIR, which may be too long for the path of a socket.
    run_dir = Path(tempfile.mkdtemp(prefix="understudy-", dir="/tmp"))
    flags = {"run_dir": str(run_dir), "port": str(port), "data_parallel_size": "2"}
    try:
        config = launcher_config(settle_with_model(flags), cores=len(os.sched_getaffinity(0)))
        screen = send_output_to(run_dir / LOG_FILE)
        with screen:
            if stays and port != PREFERRED_PORT:
                screen.write(f"Port {PREFERRED_PORT} is in use; taking port {port} instead.\n")
            screen.write("Starting a supervisor, two engines and a gateway …\n")
            show = _Show(screen, run_dir, stays=stays)
            status = run_node(config, show.begin, tell=lambda line: _write(screen, line))
            show.join()
            if status == ExitStatus.DONE and show.problem is None:
                return ExitStatus.DONE
            _write(screen, show.problem or f"it ended with status {status}")
            _write(screen, _tail(run_dir / LOG_FILE))
            return status or ExitStatus.FAILED
    finally:
        shutil.rmtree(run_dir)


class _Show:
    """What the audience sees, in a thread beside the launcher's loop."""

    def __init__(self, screen: TextIO, run_dir: Path, *, stays: bool) -> None:
        self.problem: str | None = None
        self._screen = screen
        self._run_dir = run_dir
        self._stays = stays
        self._thread: threading.Thread | None = None

    def begin(self, ready: Ready) -> None:
        """Start the show: the cluster serves."""
        self._thread = threading.Thread(target=self._play, args=(ready,), daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the show is over, which it is soon once the cluster has stopped."""
        if self._thread is not None:
            self._thread.join(timeout=_ANSWER_WITHIN_S)

    def _play(self, ready: Ready) -> None:
        try:
            self._perform(ready)
        except (OSError, Unavailable, http.client.HTTPException, ValueError) as error:
            self.problem = f"the show did not go on: {error}"
        if self._stays and self.problem is None:
            _write(self._screen, _what_next(ready, self._run_dir))
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def _perform(self, ready: Ready) -> None:
        """Stream a text, kill its engine on the way, and compare with an undisturbed run."""
        stage = _Stage(self._screen)
        url = base_url(ready.address)
        stage.show(f"{ready.model} is ready at {url}. It goes on from this, with seed {SEED}:\n\n")
        with SupervisorClient(self._run_dir / SUPERVISOR_SOCKET) as client:
            reply = client.request(StatusRequest(), StatusReply, timeout_s=_STATUS_WITHIN_S)
        killed = _killed_run(ready, stage, {engine.name: engine.pid for engine in reply.engines})
        stage.show("\n\n")
        undisturbed = "".join(piece.text for piece in _completion(ready))
        hashes = [_sha256(text) for text in (killed.text, undisturbed)]
        stage.show(f"SHA-256, one engine killed: {hashes[0]}\n")
        stage.show(f"SHA-256, undisturbed:       {hashes[1]}\n\n")
        if hashes[0] != hashes[1]:
            raise ValueError("the two texts differ")
        stage.notice(
            f"The same bytes. {killed.second} took over from {killed.first} at token"
            f" {killed.tokens}; the text stood still for {1e3 * killed.stall_s:.0f} ms."
        )


class _KilledRun(NamedTuple):
    """What was seen of a text whose engine was killed."""

    text: str
    first: str
    second: str
    tokens: int
    """Made by the first engine."""
    stall_s: float
    """Between the last token of the first engine and the first of the second."""


def _killed_run(ready: Ready, stage: _Stage, pids: dict[str, int]) -> _KilledRun:
    """Stream the text to the stage, and kill the engine that makes it."""
    stage.show(PROMPT)
    pieces: list[str] = []
    engines: list[str] = []
    tokens, stall_s, last_at = 0, 0.0, time.monotonic()
    is_killed = False
    for piece in _completion(ready):
        now = time.monotonic()
        if piece.engine not in engines:
            engines.append(piece.engine)
            if is_killed:
                tokens, stall_s = len(pieces), now - last_at
                stage.notice(f"{piece.engine} goes on, {1e3 * stall_s:.0f} ms later")
        last_at = now
        pieces.append(piece.text)
        stage.show(piece.text)
        is_time = len(pieces) >= KILL_AFTER and piece.text.endswith("\n")
        if not is_killed and (is_time or len(pieces) >= KILL_AFTER_MAX):
            pid = pids[piece.engine]
            os.kill(pid, signal.SIGKILL)
            is_killed = True
            stage.notice(f"kill -9 {pid}: that was {piece.engine}, which makes this text")
    if len(engines) != 2:
        raise ValueError(f"the text was made by {' and '.join(engines) or 'nobody'}")
    return _KilledRun("".join(pieces), engines[0], engines[1], tokens, stall_s)


class _Piece(NamedTuple):
    """Some text of a stream, and which engine made it."""

    text: str
    engine: str


def _completion(ready: Ready) -> Iterator[_Piece]:
    """The pieces of one streamed completion."""
    host, _, port = (
        base_url(ready.address).removeprefix("http://").removesuffix("/v1").rpartition(":")
    )
    connection = http.client.HTTPConnection(host, int(port), timeout=_ANSWER_WITHIN_S)
    body = {
        "model": ready.model,
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "temperature": TEMPERATURE,
        "seed": SEED,
        "ignore_eos": True,
        "stream": True,
    }
    engine = ""
    is_done = False
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ValueError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if line.startswith(_ENGINE_COMMENT):
                engine = line.removeprefix(_ENGINE_COMMENT).split()[0].decode()
            elif line.strip() == b"data: [DONE]":
                is_done = True
            elif line.startswith(b"data: "):
                event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                yield from (_Piece(choice["text"], engine) for choice in event["choices"])
    finally:
        connection.close()
    if not is_done:
        raise ValueError("the stream broke off")


class _Stage:
    """The screen, on which text is interrupted by notices, and goes on where it was."""

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen
        is_bold = screen.isatty() and not os.environ.get("NO_COLOR")
        self._bold, self._plain = (_BOLD, _PLAIN) if is_bold else ("", "")
        self._column = 0

    def show(self, text: str) -> None:
        """Go on with the text."""
        _, newline, rest = text.rpartition("\n")
        self._column = len(rest) if newline else self._column + len(rest)
        self._write(text)

    def notice(self, line: str) -> None:
        """Say something on a line of its own."""
        before = "\n" if self._column else ""
        self._write(f"{before}{self._bold}── {line}{self._plain}\n{' ' * self._column}")

    def _write(self, text: str) -> None:
        self._screen.write(text)
        self._screen.flush()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _free_port(preferred: int) -> int:
    """The preferred port of the loopback, or a free one if somebody has it."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            number: int = probe.getsockname()[1]
            return number
    raise OSError("no port is free")


def _what_next(ready: Ready, run_dir: Path) -> str:
    """What to type next."""
    url, command = base_url(ready.address), Path(sys.argv[0])
    return f"""
Go on with curl:

  curl {url}/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{ready.model}", "prompt": "import os\\n\\ndef ", "max_tokens": 48}}'

or Python (pip install openai):

  from openai import OpenAI
  client = OpenAI(base_url="{url}", api_key="none")
  answer = client.completions.create(model="{ready.model}", prompt="class Stack:\\n")
  print(answer.choices[0].text)

How it is:  {command} status --run-dir {run_dir}
The log:    {run_dir / LOG_FILE}
To stop:    Ctrl-C here, or {command} stop --run-dir {run_dir}
"""


def _tail(path: Path) -> str:
    """The end of the log, for a failure that left nothing else behind."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])


def _write(screen: TextIO, line: str) -> None:
    screen.write(f"{line}\n")
    screen.flush()
