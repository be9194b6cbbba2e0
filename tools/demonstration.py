"""``understudy demo``: two engines, one streamed completion, who made it, and the end.

Everything runs in a directory and on a port of its own, so that it disturbs nothing. With
``--stay`` it goes on serving, and says what to try.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

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
MAX_TOKENS: Final = 96
SEED: Final = 7
"""The answer is the same each time: text depends on request and seed alone."""

_ANSWER_WITHIN_S: Final = 60.0
_STATUS_WITHIN_S: Final = 1.0
_LOOK_EVERY_TOKENS: Final = 8


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
            self._stream(ready)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.problem = f"no answer: {error}"
        if self._stays and self.problem is None:
            _write(self._screen, _what_next(ready, self._run_dir))
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def _stream(self, ready: Ready) -> None:
        """Stream one completion to the screen, and say which engine made it."""
        _write(
            self._screen, f"{ready.model} is ready at {base_url(ready.address)}. It goes on from:\n"
        )
        self._screen.write(PROMPT)
        engines: list[str] = []
        num_pieces = 0
        with SupervisorClient(self._run_dir / SUPERVISOR_SOCKET) as client:
            for text in _completion(ready):
                self._screen.write(text)
                self._screen.flush()
                if num_pieces % _LOOK_EVERY_TOKENS == 0:
                    engines += [name for name in _busy_engines(client) if name not in engines]
                num_pieces += 1
        if not num_pieces:
            raise ValueError("the stream was empty")
        made_by = " and ".join(engines) or "an engine too quick to be seen"
        _write(self._screen, f"\n\nMade by {made_by}, one of {ready.engines} engines.")


def _completion(ready: Ready) -> Iterator[str]:
    """The pieces of one streamed completion."""
    host, _, port = (
        base_url(ready.address).removeprefix("http://").removesuffix("/v1").rpartition(":")
    )
    connection = http.client.HTTPConnection(host, int(port), timeout=_ANSWER_WITHIN_S)
    body = {
        "model": ready.model,
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "seed": SEED,
        "stream": True,
    }
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ValueError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise ValueError(event["error"]["message"])
            yield from (choice["text"] for choice in event["choices"])
    finally:
        connection.close()


def _busy_engines(client: SupervisorClient) -> list[str]:
    """The engines that have work right now."""
    try:
        reply = client.request(StatusRequest(), StatusReply, timeout_s=_STATUS_WITHIN_S)
    except Unavailable:
        return []
    return [engine.name for engine in reply.engines if engine.outstanding or engine.running]


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
