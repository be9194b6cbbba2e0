"""Clients' grammars, checked for a gateway without holding its event loop up.

Children do the checking (``runtime/grammar_checker.py``). What they found is remembered, bounded
in bytes; equal grammars that come at the same time are checked once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from understudy.protocol.errors import InternalError, InvalidRequest, Overloaded
from understudy.protocol.openai.structured_output import Grammar
from understudy.runtime.grammar_checker import (
    CheckerClosed,
    GrammarChecker,
    GrammarQuestion,
    GrammarVerdict,
)
from understudy.runtime.log import get_logger

NUM_CHILDREN: Final = 2
"""So that somebody whose grammar takes long does not stop everybody else's."""
WAITING_MAX: Final = 64
"""Different grammars that are checked or wait for it."""
WAIT_S: Final = 10.0
"""What a call waits at most for its turn and its verdict."""
KNOWN_BYTES_MAX: Final = 4 << 20
_ENTRY_BYTES: Final = 256
"""What remembering a verdict takes beside its texts."""


class GrammarChecks:
    """All checks of one gateway.

    Args:
        directory: The model's.
    """

    def __init__(self, directory: Path) -> None:
        self._threads = ThreadPoolExecutor(NUM_CHILDREN, thread_name_prefix="grammar")
        self._checkers = [GrammarChecker(directory) for _ in range(NUM_CHILDREN)]
        # The one that was used last is the first to be used again: where one is enough, the
        # other never starts.
        self._idle = deque(self._checkers)
        self._running: dict[bytes, asyncio.Future[GrammarVerdict | None]] = {}
        self._known: OrderedDict[bytes, GrammarVerdict] = OrderedDict()
        self._known_bytes = 0

    async def check(self, grammar: Grammar) -> str:
        """The grammar as an engine reads it.

        Raises:
            InvalidRequest: it cannot be compiled, or is too expensive; ``param`` names its field.
            Overloaded: too many are to be checked.
            InternalError: nothing can be checked here.
        """
        key = _key(grammar)
        verdict = self._known.get(key)
        if verdict is None:
            verdict = await self._find(key, grammar)
        else:
            self._known.move_to_end(key)
        if verdict is None:
            raise InternalError("grammars cannot be checked")
        if verdict.error:
            raise InvalidRequest(f"{grammar.param}: {verdict.error}", param=grammar.param)
        return verdict.text or grammar.text

    def close(self) -> None:
        """End the children, and what waits for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for checker in self._checkers:
            checker.close()

    async def _find(self, key: bytes, grammar: Grammar) -> GrammarVerdict | None:
        running = self._running.get(key)
        if running is None:
            if len(self._running) >= WAITING_MAX:
                raise Overloaded("too many grammars are being checked", retry_after_s=1.0)
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._threads, self._ask, grammar)
            self._running[key] = running
            running.add_done_callback(lambda done: self._note(key, grammar, done))
        try:
            # The check goes on for others, and for the next time, if this call is given up.
            return await asyncio.wait_for(asyncio.shield(running), WAIT_S)
        except TimeoutError:
            raise Overloaded("too many grammars are being checked", retry_after_s=1.0) from None

    def _ask(self, grammar: Grammar) -> GrammarVerdict | None:
        """Ask a child, on a thread."""
        checker = self._idle.pop()
        try:
            return checker.check(GrammarQuestion(grammar.text, grammar.is_gbnf))
        except CheckerClosed:
            return None
        except OSError as error:
            get_logger().error("grammars cannot be checked", error=str(error))
            return None
        finally:
            self._idle.append(checker)

    def _note(
        self, key: bytes, grammar: Grammar, done: asyncio.Future[GrammarVerdict | None]
    ) -> None:
        """Remember what was found, and forget what was not asked for in the longest time."""
        del self._running[key]
        verdict = None if done.cancelled() else done.result()
        if verdict is None:
            return
        if verdict.text == grammar.text:
            verdict = GrammarVerdict()  # no need to keep what every asker brings along
        self._known[key] = verdict
        self._known_bytes += _size(verdict)
        while self._known_bytes > KNOWN_BYTES_MAX:
            _, forgotten = self._known.popitem(last=False)
            self._known_bytes -= _size(forgotten)


def _key(grammar: Grammar) -> bytes:
    kind = b"gbnf" if grammar.is_gbnf else b""
    return hashlib.sha256(kind + b"\0" + grammar.text.encode()).digest()


def _size(verdict: GrammarVerdict) -> int:
    return _ENTRY_BYTES + len(verdict.text) + len(verdict.error)
