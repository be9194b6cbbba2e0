"""The child that compiles: what it says, and that whatever kills it is refused."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from understudy.protocol.openai.structured_output import json_grammar
from understudy.runtime.grammar_checker import CheckerClosed, GrammarChecker, GrammarQuestion
from understudy.tools.demo.paths import demo_model_directory

LATE = "start: /(a{1000}){1000}/"
"""Takes more than a second to find that it is too complex."""


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(demo_model_directory(), check_s=20.0)
    yield checker
    checker.close()


def error_of(checker: GrammarChecker, text: str, *, is_gbnf: bool = False) -> str:
    return checker.check(GrammarQuestion(text, is_gbnf)).error


def test_a_grammar_that_compiles_comes_back(checker: GrammarChecker) -> None:
    for text in ('start: "a"', json_grammar({"type": "object"}, param="p").text):
        verdict = checker.check(GrammarQuestion(text, is_gbnf=False))
        assert (verdict.text, verdict.error) == (text, "")


def test_gbnf_comes_back_as_what_an_engine_can_read(checker: GrammarChecker) -> None:
    asked = GrammarQuestion('root ::= "yes" | "no" word\nword ::= [a-z]+', is_gbnf=True)
    verdict = checker.check(asked)
    assert not verdict.error
    assert "start:" in verdict.text
    assert not error_of(checker, verdict.text)


@pytest.mark.parametrize(
    ("text", "is_gbnf"),
    [
        ("start: x", False),
        ('root ::= "a" | x', True),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, True),
        (json_grammar({"type": 1}, param="p").text, False),
        (json_grammar({"$ref": "#"}, param="p").text, False),
        (json_grammar({"$ref": "https://127.0.0.1:9/schema"}, param="p").text, False),
        (json_grammar({"type": "array", "uniqueItems": True}, param="p").text, False),
        ("start: " + "(" * 20000 + '"a"' + ")" * 20000, False),
    ],
)
def test_what_is_wrong_is_said_in_a_line(checker: GrammarChecker, text: str, is_gbnf: bool) -> None:
    error = error_of(checker, text, is_gbnf=is_gbnf)
    assert error
    assert "\n" not in error
    assert len(error) < 400


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_is_not() -> None:
    hasty = GrammarChecker(demo_model_directory(), check_s=0.1)
    try:
        assert "too expensive" in error_of(hasty, LATE)
        assert "too expensive" in error_of(hasty, LATE)
        assert hasty.num_kills == 2
        before = hasty.pid
        hasty = patient(hasty)
        assert not error_of(hasty, 'start: "a"')
        assert hasty.pid == before  # the successor was started with the kill
    finally:
        hasty.close()


def patient(checker: GrammarChecker) -> GrammarChecker:
    """The same with more time: on a busy machine even a small grammar may need it."""
    checker._check_s = 20.0
    return checker


def test_a_child_that_dies_in_a_check_is_a_refusal(checker: GrammarChecker) -> None:
    assert not error_of(checker, 'start: "a"')
    assert checker.pid is not None
    os.kill(checker.pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (checker.pid, signal.SIGKILL))
    killer.start()
    assert "too expensive" in error_of(checker, 'start: "b"')
    killer.join()
    assert not error_of(checker, 'start: "b"')


def test_a_child_that_died_between_checks_is_replaced(checker: GrammarChecker) -> None:
    assert not error_of(checker, 'start: "a"')
    assert checker.pid is not None
    os.kill(checker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, checker.pid, os.WEXITED | os.WNOWAIT)
    assert not error_of(checker, 'start: "a"')


def test_closing_ends_a_check_and_leaves_no_child() -> None:
    checker = GrammarChecker(demo_model_directory(), check_s=60.0)
    assert not error_of(checker, 'start: "a"')
    pid = checker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            error_of(checker, 'start: "b"')
        except CheckerClosed as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    checker.close()
    thread.join(30)
    assert [type(error) for error in raised] == [CheckerClosed]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(CheckerClosed):
        error_of(checker, 'start: "c"')
