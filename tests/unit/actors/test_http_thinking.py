"""A budget for thoughts, over HTTP: from the body to what an engine is told, and back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.http_harness import CHAT, COMPLETIONS, HELLO, MODEL, serving
from tests.tiny_models import CHATML, write_model
from understudy.protocol.request import Request
from understudy.runtime.scheduling.thinking import advance, begin, forced_token
from understudy.runtime.tokenizer import Tokenizer

BODY: Final = {"model": MODEL, "messages": HELLO}
OPENED: Final = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
BUDGET: Final = "thinking_token_budget"
FORM: Final = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "object"}}}
TOOL: Final = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path, chat_template=OPENED, max_position_embeddings=4096)


def thinker(directory: Path) -> Any:
    """Says "hmm" for ever, but for what a budget makes it say, and then answers."""
    tokenizer = Tokenizer.from_directory(directory)
    thought = tokenizer.encode("hmm", add_special_tokens=False)[0]
    answer = tokenizer.encode("It rains.", add_special_tokens=False)

    def script(request: Request) -> Iterable[int]:
        thinking = request.params.thinking
        if thinking is None:
            return [*answer, request.params.stop_token_ids[0]]
        progress = begin(thinking)
        said: list[int] = []
        while progress.phase.name in {"THOUGHTS", "CLOSING"}:
            forced = forced_token(thinking, progress)
            said.append(thought if forced is None else forced)
            progress = advance(thinking, progress, said[-1])
        return [*said, *answer, request.params.stop_token_ids[0]]

    return script


@pytest.mark.parametrize("budget", [0, 1, 17])
async def test_thoughts_are_cut_and_counted(directory: Path, budget: int) -> None:
    async with serving(directory, thinker(directory), reasoning_parser="qwen3") as harness:
        answer = await harness.answer(CHAT, {**BODY, BUDGET: budget})
        thinking = harness.gateway.submitted[0].params.thinking
    assert thinking is not None
    assert (thinking.is_open, thinking.budget) == (True, budget)
    [choice] = answer["choices"]
    assert choice["message"]["content"] == "It rains."
    assert len(choice["message"].get("reasoning", "")) == budget
    details = answer["usage"].get("completion_tokens_details", {"reasoning_tokens": 0})
    # The mark takes some tokens itself before it is complete.
    assert budget <= details["reasoning_tokens"] < budget + len(thinking.forced)


async def test_messages_and_responses_have_budgets_by_their_own_names(directory: Path) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 2000}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    async with serving(directory, thinker(directory), reasoning_parser="qwen3") as harness:
        await harness.answer("/v1/messages", {**body, "thinking": thinking})
        await harness.answer("/v1/responses", {"model": MODEL, "input": "hi", BUDGET: 3})
        budgets = [request.params.thinking for request in harness.gateway.submitted]
        refused = await harness.answer(
            "/v1/messages",
            {**body, "thinking": {"type": "enabled", "budget_tokens": -1}},
            status=400,
        )
    assert [each.budget for each in budgets if each is not None] == [1024, 3]
    assert refused["error"]["param"] == "thinking.budget_tokens"


async def test_a_form_begins_behind_thoughts_with_or_without_a_budget(directory: Path) -> None:
    form = {**BODY, "response_format": FORM}
    call = {**BODY, "tools": [TOOL], "tool_choice": "required"}
    async with serving(
        directory, lambda _: [0], reasoning_parser="qwen3", tool_parser="hermes"
    ) as harness:
        for body in (form, {**form, BUDGET: 5}, call, {**call, BUDGET: 5}):
            async with harness.post(CHAT, body) as response:
                assert response.status == 200
        params = [request.params for request in harness.gateway.submitted]
    assert all(each.grammar for each in params)
    budgets = [None if each.thinking is None else each.thinking.budget for each in params]
    assert budgets == [None, 5, None, 5]
    # A call's own grammar has room for thoughts, unless a budget is kept before it.
    assert [each.thinking is None for each in params] == [False, False, True, False]
    assert ["thoughts" in each.grammar for each in params] == [False, False, True, False]


@pytest.mark.parametrize("budget", [-1, 1 << 64, "5", 1.5, True])
async def test_budgets_that_are_none_are_refused(directory: Path, budget: Any) -> None:
    async with serving(directory, reasoning_parser="qwen3") as harness:
        error = await harness.error(CHAT, {**BODY, BUDGET: budget})
        assert harness.gateway.submitted == []
    assert error["param"] == BUDGET or "integer" in error["message"]


async def test_a_budget_needs_a_model_whose_thoughts_are_known(directory: Path) -> None:
    async with serving(directory) as harness:
        error = await harness.error(CHAT, {**BODY, BUDGET: 5})
        assert "--reasoning-parser" in error["message"]
        plain = await harness.error(COMPLETIONS, {"model": MODEL, "prompt": "x", BUDGET: 5})
    assert error["param"] == plain["param"] == BUDGET
