"""Has a client's grammar compiled by a child process, which may be killed for it.

Compiling what a stranger wrote may take long, take much memory, or end the process that does it.
So a child does it, within limits, and what kills the child is refused. The child is started with
the first grammar and stays; one that was killed is replaced at once. Blocks: for threads, not for
an event loop. Imports no llguidance; ``grammar_child`` is the other side.
"""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Final

import msgspec

CHECK_S: Final = 2.0
"""What one grammar may take."""
MEMORY_BYTES: Final = 512 << 20
"""What compiling may take, beside the vocabulary."""
START_S: Final = 60.0
"""What a child may take to read the vocabulary, on a busy machine."""

_LENGTH: Final = struct.Struct(">I")
_READ_BYTES: Final = 1 << 16


class GrammarQuestion(msgspec.Struct, frozen=True, array_like=True):
    """What the child is asked."""

    text: str
    is_gbnf: bool


class GrammarVerdict(msgspec.Struct, frozen=True, array_like=True):
    """What the child found; its first word, when it is ready, is one without either."""

    text: str = ""
    """The grammar for llguidance, unless there is an error."""
    error: str = ""
    """What is wrong, in words for the client."""


class CheckerClosed(Exception):
    """The checker was closed in the middle of a check."""


class GrammarChecker:
    """One child at a time, and one grammar at a time.

    Args:
        directory: The model's, for its vocabulary.
        check_s: What one grammar may take.
    """

    def __init__(self, directory: Path, *, check_s: float = CHECK_S) -> None:
        self.num_kills = 0
        """How many children had to be replaced."""
        self._directory = directory
        self._check_s = check_s
        self._child: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._is_closed = False
        self._lock = threading.Lock()
        """Held in ``check``."""

    @property
    def pid(self) -> int | None:
        """The child's number, if there is one."""
        return None if self._child is None else self._child.pid

    def check(self, question: GrammarQuestion) -> GrammarVerdict:
        """Have a grammar compiled.

        Raises:
            CheckerClosed: it was closed meanwhile.
            OSError: no child can be started.
        """
        with self._lock:
            return self._check(question)

    def close(self) -> None:
        """End the child, and what a thread has it check."""
        self._is_closed = True
        child = self._child
        if child is not None:
            child.kill()
        with self._lock:
            self._discard()

    def _check(self, question: GrammarQuestion) -> GrammarVerdict:
        if self._child is None or self._child.poll() is not None:
            self._start()
        if not self._is_ready:
            if self._receive(START_S) is None:
                self._replace()
                raise OSError("the process that checks grammars does not start")
            self._is_ready = True
        self._send(question)
        verdict = self._receive(self._check_s)
        if verdict is not None:
            return verdict
        self._replace()
        limits = f"{self._check_s:g} s and {MEMORY_BYTES >> 20} MiB"
        return GrammarVerdict(error=f"too expensive: it cannot be compiled within {limits}")

    def _replace(self) -> None:
        """Kill the child; the next one starts, so that the next grammar does not wait for it."""
        self.num_kills += 1
        self._start()

    def _start(self) -> None:
        self._discard()
        if self._is_closed:
            raise CheckerClosed
        self._child = subprocess.Popen(
            [
                *(sys.executable, "-m", "understudy.runtime.grammar_child"),
                *(str(self._directory), str(os.getpid()), str(MEMORY_BYTES)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A library that dies may say what it was reading: a client's words.
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        self._is_ready = False
        if self._is_closed:  # while it started: nobody else has seen this child
            self._discard()
            raise CheckerClosed

    def _discard(self) -> None:
        """End the child, if there is one, and let go of it."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                _close(pipe)
            self._child = None

    def _send(self, question: GrammarQuestion) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(pack(question))
            self._child.stdin.flush()
        except OSError:
            return  # it has ended; reading will tell

    def _receive(self, within_s: float) -> GrammarVerdict | None:
        """The child's next word; ``None`` if none came in time, or ever will."""
        assert self._child is not None
        assert self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(descriptor, select.POLLIN)
        give_up_at = time.monotonic() + within_s
        buffer = b""
        while True:
            left_s = give_up_at - time.monotonic()
            if left_s <= 0 or not poll.poll(1e3 * left_s):
                break
            piece = os.read(descriptor, _READ_BYTES)
            if not piece:
                self._child.wait()
                break
            buffer += piece
            if len(buffer) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer)
                if len(buffer) >= _LENGTH.size + length:
                    return msgspec.msgpack.decode(buffer[_LENGTH.size :], type=GrammarVerdict)
        if self._is_closed:
            raise CheckerClosed
        return None


def pack(record: msgspec.Struct) -> bytes:
    """A record as it goes through a pipe: its length, and it."""
    body = msgspec.msgpack.encode(record)
    return _LENGTH.pack(len(body)) + body


def read_question(pipe: IO[bytes]) -> GrammarQuestion | None:
    """The next question, in the child; ``None`` when there will be no more."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return msgspec.msgpack.decode(pipe.read(_LENGTH.unpack(head)[0]), type=GrammarQuestion)


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        try:
            pipe.close()
        except OSError:
            return  # what was left to write has no reader any more
