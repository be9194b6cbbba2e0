"""A gateway's checks of grammars: each once, remembered within bounds, never in the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from understudy.actors import grammar_checks
from understudy.actors.grammar_checks import WAITING_MAX, GrammarChecks
from understudy.protocol.errors import InternalError, InvalidRequest, Overloaded
from understudy.protocol.openai.structured_output import Grammar, lark_or_gbnf_grammar
from understudy.runtime.grammar_checker import GrammarChecker, GrammarQuestion, GrammarVerdict
from understudy.tools.demo.paths import demo_model_directory


@pytest.fixture
async def checks() -> AsyncIterator[GrammarChecks]:
    checks = GrammarChecks(demo_model_directory())
    yield checks
    checks.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What children are asked; they answer at once, and refuse what begins with an x."""
    asked: list[str] = []

    def check(_: GrammarChecker, question: GrammarQuestion) -> GrammarVerdict:
        asked.append(question.text)
        if question.text.startswith("x"):
            return GrammarVerdict(error="no")
        return GrammarVerdict(text=question.text + ("!" if question.is_gbnf else ""))

    monkeypatch.setattr(GrammarChecker, "check", check)
    return asked


async def test_a_good_grammar_passes_and_a_bad_one_names_its_field(checks: GrammarChecks) -> None:
    assert await checks.check(Grammar('start: "a"', "p")) == 'start: "a"'
    gbnf = lark_or_gbnf_grammar('root ::= "a"', param="p")
    assert "start:" in await checks.check(gbnf)
    assert await checks.check(gbnf) == await checks.check(gbnf)
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.regex: ") as caught:
        await checks.check(Grammar("start: /(/", "structured_outputs.regex"))
    assert caught.value.param == "structured_outputs.regex"


async def test_what_was_found_is_remembered(checks: GrammarChecks, asked: list[str]) -> None:
    for _ in range(3):
        assert await checks.check(Grammar("a", "p")) == "a"
        assert await checks.check(Grammar("a", "p", is_gbnf=True)) == "a!"
        for param in ("p", "q"):
            with pytest.raises(InvalidRequest) as caught:
                await checks.check(Grammar("x", param))
            assert caught.value.param == param
    assert sorted(asked) == ["a", "a", "x"]


async def test_equal_grammars_at_the_same_time_are_checked_once(
    checks: GrammarChecks, asked: list[str]
) -> None:
    await asyncio.gather(*(checks.check(Grammar("a", "p")) for _ in range(20)))
    assert asked == ["a"]


async def test_memory_of_what_was_found_is_bounded(
    checks: GrammarChecks, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_checks, "KNOWN_BYTES_MAX", 1000)
    for number in range(20):
        await checks.check(Grammar(f"{number}" * 100, "p", is_gbnf=True))
    assert len(checks._known) < 4
    assert checks._known_bytes <= 1000
    await checks.check(Grammar("0" * 100, "p", is_gbnf=True))
    assert len(asked) == 21


async def test_too_many_at_once_are_told_to_come_back(
    checks: GrammarChecks, asked: list[str]
) -> None:
    calls = [checks.check(Grammar(f"a{number}", "p")) for number in range(WAITING_MAX + 5)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results if not isinstance(result, str)] == 5 * [Overloaded]


async def test_a_call_that_is_given_up_leaves_the_check_to_the_others(
    checks: GrammarChecks, asked: list[str]
) -> None:
    given_up = asyncio.ensure_future(checks.check(Grammar("a", "p")))
    stays = asyncio.ensure_future(checks.check(Grammar("a", "p")))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await stays == "a"
    assert asked == ["a"]


async def test_without_a_child_nothing_can_be_checked(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(GrammarChecker, "_start", fail)
    with pytest.raises(InternalError):
        await checks.check(Grammar("a", "p"))


async def test_closing_ends_what_is_checked(checks: GrammarChecks) -> None:
    call = asyncio.ensure_future(checks.check(Grammar("start: /(a{1000}){1000}/", "p")))
    await asyncio.sleep(0)
    checks.close()
    with pytest.raises((InternalError, asyncio.CancelledError)):
        await call
