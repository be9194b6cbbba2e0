"""The child process that compiles clients' grammars, within limits, and may die of them.

Started by ``grammar_checker``. A grammar passes if it compiles as an engine will compile it, and if
the masks of an answer's first tokens are found in reasonable time.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Final

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from understudy.runtime.grammar_checker import (
    GrammarQuestion,
    GrammarVerdict,
    pack,
    read_question,
)
from understudy.runtime.grammars import GrammarError, GrammarVocabulary, check, load_vocabulary
from understudy.runtime.kit.process import die_with_parent

FOLLOWED_TOKENS: Final = 8
"""How far a grammar is followed: what is too expensive often is so from the first key on."""
MASK_S: Final = 0.5
"""A grammar whose masks take longer would hold up an engine's threads."""
TOO_EXPENSIVE: Final = "too expensive to follow"
NICENESS: Final = 5
"""What strangers have compiled may not cost those who are served already their processor."""
STACK_BYTES: Final = 1 << 20
"""What compiling may nest here: less than an engine's threads have, which must not overflow."""
ERROR_CHARACTERS_MAX: Final = 300


def main(directory: Path, *, parent_pid: int, memory_bytes: int) -> None:
    """Answer questions until there are no more."""
    die_with_parent(parent_pid)
    os.nice(NICENESS)
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
        is_fast = _follow(vocabulary, vocabulary.compile(text))
    except GrammarError as error:
        return GrammarVerdict(error=_shortened(str(error)))
    return GrammarVerdict(text=text) if is_fast else GrammarVerdict(error=TOO_EXPENSIVE)


def _follow(vocabulary: GrammarVocabulary, matcher: LLMatcher) -> bool:
    """Make an answer's first tokens; whether the masks for them are found fast enough.

    Raises:
        GrammarError: they are not found at all.
    """
    for _ in range(FOLLOWED_TOKENS):
        begun_at = time.perf_counter()
        bits = int.from_bytes(vocabulary.mask(matcher), "little")
        if time.perf_counter() - begun_at > MASK_S:
            return False
        bits &= ~sum(1 << token for token in vocabulary.eos_token_ids)
        lowest = (bits & -bits).bit_length() - 1
        if lowest < 0:
            return True  # it is complete
        if not matcher.consume_token(lowest):
            check(matcher)
    return True


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
