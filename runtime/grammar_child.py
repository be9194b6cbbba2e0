"""The child process that compiles clients' grammars, within limits, and may die of them.

Started by ``grammar_checker``. A grammar passes if it compiles as an engine will compile it, and if
its first mask is found in reasonable time: an engine spends no more on it than was spent here.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path
from typing import Final

from llguidance.gbnf_to_lark import gbnf_to_lark

from understudy.runtime.grammar_checker import (
    GrammarQuestion,
    GrammarVerdict,
    pack,
    read_question,
)
from understudy.runtime.grammars import GrammarError, GrammarVocabulary, check, load_vocabulary
from understudy.runtime.kit.process import die_with_parent

MASK_S: Final = 0.5
"""A grammar whose first mask takes longer would hold up an engine's threads."""
STACK_BYTES: Final = 1 << 20
"""What compiling may nest here: less than an engine's threads have, which must not overflow."""
ERROR_CHARACTERS_MAX: Final = 300


def main(directory: Path, *, parent_pid: int, memory_bytes: int) -> None:
    """Answer questions until there are no more."""
    die_with_parent(parent_pid)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = load_vocabulary(directory)
    limit = _address_space() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.stack_size(STACK_BYTES)
    sys.stdout.buffer.write(pack(GrammarVerdict()))
    sys.stdout.buffer.flush()
    while (question := read_question(sys.stdin.buffer)) is not None:
        sys.stdout.buffer.write(pack(_judge_on_small_stack(vocabulary, question)))
        sys.stdout.buffer.flush()


def _judge_on_small_stack(
    vocabulary: GrammarVocabulary, question: GrammarQuestion
) -> GrammarVerdict:
    verdicts: list[GrammarVerdict] = []
    thread = threading.Thread(target=lambda: verdicts.append(judge(vocabulary, question)))
    thread.start()
    thread.join()
    return verdicts[0]  # without one, this process ends, which is a verdict as well


def judge(vocabulary: GrammarVocabulary, question: GrammarQuestion) -> GrammarVerdict:
    """Compile a grammar, and say what is wrong with it."""
    text = question.text
    if question.is_gbnf:
        try:
            text = gbnf_to_lark(text)
        except Exception as error:  # noqa: BLE001 - a parser of others, which raises what it likes
            return GrammarVerdict(error=_shortened(f"no GBNF that can be read: {error}"))
    try:
        matcher = vocabulary.compile(text)
        begun_at = time.perf_counter()
        mask = matcher.compute_bitmask()
        seconds = time.perf_counter() - begun_at
        check(matcher)
    except GrammarError as error:
        return GrammarVerdict(error=_shortened(str(error)))
    if not mask.strip(b"\0"):
        return GrammarVerdict(error="no text can follow it")
    if seconds > MASK_S:
        return GrammarVerdict(error="too expensive to follow")
    return GrammarVerdict(text=text)


def _shortened(error: str) -> str:
    """The first line, without the excerpts that may follow it."""
    line = error.strip().partition("\n")[0]
    if line in {"NoExtension", "NoExtensionBias"}:
        return "no text can follow it"
    return line[:ERROR_CHARACTERS_MAX] or "it cannot be compiled"


def _address_space() -> int:
    """What this process has mapped, in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main(Path(sys.argv[1]), parent_pid=int(sys.argv[2]), memory_bytes=int(sys.argv[3]))
