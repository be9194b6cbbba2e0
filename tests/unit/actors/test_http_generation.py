from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.http_harness import (
    CHAT,
    COMPLETIONS,
    HELLO,
    MODEL,
    NOW,
    Harness,
    beside,
    saying,
    serving,
)
from tests.tiny_models import END_OF_TEXT_ID, VOCAB_SIZE, write_model
from understudy.actors.http_answers import HttpLimits
from understudy.protocol.errors import InternalError, Overloaded
from understudy.protocol.messages import ClusterState
from understudy.protocol.request import FinishReason, Request, TokenLogprobs

CHAT_BODY = {"model": MODEL, "messages": HELLO}
NOBODY = ClusterState(engines_serving=0, engines_known=2, max_model_len=0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
async def harness(directory: Path) -> AsyncIterator[Harness]:
    async with serving(directory) as harness:
        yield harness


@pytest.fixture
async def echo(directory: Path) -> AsyncIterator[Harness]:
    """A server that answers each request with its own prompt."""

    def say_prompt(request: Request) -> list[int]:
        return [*request.prompt, END_OF_TEXT_ID]

    async with serving(directory, say_prompt) as harness:
        yield harness


async def test_a_chat_is_answered_with_what_the_engine_says(directory: Path) -> None:
    async with serving(directory, saying(70, 71, 72)) as harness:
        answer = await harness.answer(CHAT, CHAT_BODY)
        [request] = harness.gateway.submitted
        expected = harness.served.tokenizer.decode([70, 71, 72])
    assert answer == {
        "id": f"chatcmpl-{request.group_id:016x}",
        "object": "chat.completion",
        "created": int(NOW),
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": expected, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(request.prompt),
            "completion_tokens": 4,
            "total_tokens": len(request.prompt) + 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_chats_prompt_is_the_rendered_template(echo: Harness) -> None:
    answer = await echo.answer(CHAT, CHAT_BODY)
    [request] = echo.gateway.submitted
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert list(request.prompt) == echo.tokens(text)
    assert answer["choices"][0]["message"]["content"] == "user\nhello\nassistant\n"


async def test_a_chats_answer_may_take_what_the_context_leaves(harness: Harness) -> None:
    await harness.leave(CHAT, CHAT_BODY)
    [request] = harness.gateway.submitted
    assert request.params.max_tokens == 256 - len(request.prompt)


async def test_the_clusters_context_may_be_shorter_than_the_models(echo: Harness) -> None:
    echo.gateway.cluster = ClusterState(engines_serving=1, engines_known=1, max_model_len=20)
    error = await echo.error(COMPLETIONS, {"prompt": "x", "max_tokens": 20})
    assert error["code"] == "context_length_exceeded"


async def test_a_completion_is_answered_with_its_text(echo: Harness) -> None:
    answer = await echo.answer(COMPLETIONS, {"model": MODEL, "prompt": "a + b"})
    [request] = echo.gateway.submitted
    assert answer["object"] == "text_completion"
    assert answer["id"] == f"cmpl-{request.group_id:016x}"
    assert answer["choices"] == [
        {"index": 0, "text": "a + b", "logprobs": None, "finish_reason": "stop"}
    ]
    assert request.params.max_tokens == 16


async def test_max_tokens_ends_an_answer_for_its_length(echo: Harness) -> None:
    answer = await echo.answer(COMPLETIONS, {"prompt": "abcdefgh", "max_tokens": 3})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_a_stop_string_ends_the_request_as_well_as_the_text(echo: Harness) -> None:
    prompt = "one two three"
    answer = await echo.answer(
        COMPLETIONS, {"prompt": prompt, "stop": [" tw", "zz"], "max_tokens": 200}
    )
    [request] = echo.gateway.submitted
    assert answer["choices"][0] == {
        "index": 0,
        "text": "one",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert echo.gateway.cancelled == [request.request_id]
    assert answer["usage"]["completion_tokens"] < len(request.prompt)


async def test_a_stop_string_can_be_part_of_the_text(echo: Harness) -> None:
    body = {"prompt": "one two", "stop": " tw", "include_stop_str_in_output": True}
    answer = await echo.answer(COMPLETIONS, body)
    assert answer["choices"][0]["text"] == "one tw"


async def test_a_stop_token_is_counted_and_not_shown(echo: Harness) -> None:
    [a, b, c] = echo.tokens("abc")
    answer = await echo.answer(COMPLETIONS, {"prompt": [a, b, c], "stop_token_ids": [c]})
    assert answer["choices"][0]["text"] == "ab"
    assert answer["usage"]["completion_tokens"] == 3
    body = {"prompt": [a, b, c], "stop_token_ids": [c], "include_stop_str_in_output": True}
    assert (await echo.answer(COMPLETIONS, body))["choices"][0]["text"] == "abc"


async def test_n_answers_come_in_order_from_requests_of_one_group(harness: Harness) -> None:
    letters = harness.tokens("abc")

    async def engine() -> None:
        await harness.submitted(3)
        requests = harness.gateway.submitted
        assert len({request.group_id for request in requests}) == 1
        assert requests[0].params.seed == 7
        for request, letter in reversed(list(zip(requests, letters, strict=True))):
            harness.gateway.deliver(request, letter, finish=FinishReason.LENGTH)

    answer = await beside(engine(), harness.answer(CHAT, {**CHAT_BODY, "n": 3, "seed": 7}))
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 3
    [*_, last] = harness.gateway.submitted
    assert answer["usage"]["prompt_tokens"] == len(last.prompt)


async def test_each_prompt_of_a_list_has_choices_of_its_own(echo: Harness) -> None:
    body = {"prompt": ["one", "two"], "n": 2, "seed": 3}
    answer = await echo.answer(COMPLETIONS, body)
    assert [choice["text"] for choice in answer["choices"]] == ["one", "one", "two", "two"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    requests = echo.gateway.submitted
    assert {request.group_id for request in requests} == {requests[0].request_id}
    # Each prompt is answered as if it had come alone.
    assert [r.params.seed for r in requests[:2]] == [r.params.seed for r in requests[2:]]
    prompt_tokens = len(requests[0].prompt) + len(requests[2].prompt)
    assert answer["usage"]["prompt_tokens"] == prompt_tokens


async def test_prompts_of_a_list_draw_seeds_of_their_own(echo: Harness) -> None:
    await echo.answer(COMPLETIONS, {"prompt": ["one", "one"]})
    first, second = echo.gateway.submitted
    assert first.params.seed != second.params.seed


async def test_a_prompt_may_be_token_ids(echo: Harness) -> None:
    answer = await echo.answer(COMPLETIONS, {"prompt": echo.tokens("größe")})
    assert answer["choices"][0]["text"] == "größe"


@pytest.mark.parametrize("prompt", ["one", ["one"]])
async def test_an_echo_begins_with_the_prompt(echo: Harness, prompt: Any) -> None:
    answer = await echo.answer(COMPLETIONS, {"prompt": prompt, "echo": True})
    assert answer["choices"][0]["text"] == "oneone"


async def test_an_echo_of_token_ids_is_their_text(echo: Harness) -> None:
    body = {"prompt": echo.tokens("one"), "echo": True}
    assert (await echo.answer(COMPLETIONS, body))["choices"][0]["text"] == "oneone"


async def test_an_echo_without_tokens_needs_no_engine(harness: Harness) -> None:
    harness.gateway.cluster = NOBODY
    answer = await harness.answer(COMPLETIONS, {"prompt": "one", "echo": True, "max_tokens": 0})
    assert answer["choices"][0]["text"] == "one"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert harness.gateway.submitted == []


async def test_an_empty_prompt_follows_the_end_of_a_text(echo: Harness) -> None:
    await echo.answer(COMPLETIONS, {"prompt": ""})
    assert echo.gateway.submitted[0].prompt == (END_OF_TEXT_ID,)


async def test_log_probabilities_of_a_chat(harness: Harness) -> None:
    body = {**CHAT_BODY, "logprobs": True, "top_logprobs": 2}
    a, b = harness.tokens("ab")

    async def engine() -> None:
        request = await harness.submitted()
        assert request.params.logprobs == 2
        harness.gateway.deliver(request, a, logprobs=(TokenLogprobs(-0.5, ((a, -0.5), (b, -1.5))),))
        harness.gateway.deliver(
            request,
            b,
            END_OF_TEXT_ID,
            finish=FinishReason.STOP,
            logprobs=(TokenLogprobs(-0.1, ()), TokenLogprobs(-0.2, ())),
        )

    answer = await beside(engine(), harness.answer(CHAT, body))
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "b", "<|endoftext|>"]
    assert [entry["logprob"] for entry in content] == [-0.5, -0.1, -0.2]
    assert content[0]["top_logprobs"][1] == {"token": "b", "logprob": -1.5, "bytes": [98]}
    assert answer["choices"][0]["message"]["content"] == "ab"


async def test_log_probabilities_of_a_completion_say_where_tokens_start(
    harness: Harness,
) -> None:
    tokens = harness.tokens("aßb")

    async def engine() -> None:
        request = await harness.submitted()
        logprobs = tuple(TokenLogprobs(-1.0, ()) for _ in tokens)
        harness.gateway.deliver(request, *tokens, finish=FinishReason.LENGTH, logprobs=logprobs)

    answer = await beside(engine(), harness.answer(COMPLETIONS, {"prompt": "x", "logprobs": 0}))
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "a"
    # Tokens inside a character start where the character does.
    assert logprobs["text_offset"] == [0, *[1] * (len(tokens) - 2), 2]


async def test_an_engine_without_log_probabilities_gives_an_empty_list(echo: Harness) -> None:
    answer = await echo.answer(CHAT, {**CHAT_BODY, "logprobs": True})
    assert answer["choices"][0]["logprobs"] == {"content": [], "refusal": None}


async def test_ignored_fields_are_named_in_a_header(echo: Harness) -> None:
    body = {**CHAT_BODY, "user": "u", "metadata": {}, "session_id": "x", "zebra": 1}
    async with echo.post(CHAT, body) as response:
        assert response.headers["X-Ignored-Fields"] == "session_id, zebra"
    async with echo.post(CHAT, CHAT_BODY) as response:
        assert "X-Ignored-Fields" not in response.headers


async def test_another_model_is_not_found(harness: Harness) -> None:
    for path, body in ((CHAT, CHAT_BODY), (COMPLETIONS, {"prompt": "x"})):
        error = await harness.error(path, {**body, "model": "other"}, status=404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_the_model_need_not_be_named(echo: Harness) -> None:
    answer = await echo.answer(COMPLETIONS, {"prompt": "x"})
    assert answer["model"] == MODEL


@pytest.mark.parametrize("size", [300, 10**6])
@pytest.mark.parametrize("letter", ["a", "\u0301", "\x00", "🦊"])
async def test_a_prompt_beyond_the_context_reaches_no_engine(
    harness: Harness, size: int, letter: str
) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": letter * size}),
        (CHAT, {"messages": [{"role": "user", "content": letter * size}]}),
    ):
        error = await harness.error(path, body)
        assert error["code"] == "context_length_exceeded"
    assert harness.gateway.submitted == []


async def test_a_prompt_exactly_at_the_limit_is_served(echo: Harness) -> None:
    tokens = [70] * 255
    answer = await echo.answer(COMPLETIONS, {"prompt": tokens, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == 255
    error = await echo.error(COMPLETIONS, {"prompt": [*tokens, 70], "max_tokens": 1})
    assert error["code"] == "context_length_exceeded"


async def test_a_long_text_within_the_limits_is_encoded_beside_the_loop(tmp_path: Path) -> None:
    directory = write_model(tmp_path, max_position_embeddings=1 << 16)
    async with serving(directory, saying(70)) as harness:
        answer = await harness.answer(COMPLETIONS, {"prompt": "fox " * 5000})
    assert answer["usage"]["prompt_tokens"] > 5000


async def test_a_token_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    async with serving(write_model(tmp_path, vocab_size=80), saying(1)) as harness:
        error = await harness.error(COMPLETIONS, {"prompt": "the quick brown fox"})
    assert error["param"] == "prompt"


async def test_a_model_without_a_template_does_not_chat(tmp_path: Path) -> None:
    async with serving(write_model(tmp_path, chat_template=None)) as harness:
        error = await harness.error(CHAT, CHAT_BODY)
    assert error["param"] == "messages"


async def test_a_template_that_refuses_the_messages_is_told_to_the_client(tmp_path: Path) -> None:
    directory = write_model(tmp_path, chat_template="{{ raise_exception('no such turn') }}")
    async with serving(directory) as harness:
        error = await harness.error(CHAT, CHAT_BODY)
    assert "no such turn" in error["message"]


async def test_a_template_that_prints_nothing_makes_no_prompt(tmp_path: Path) -> None:
    async with serving(write_model(tmp_path, chat_template="{# nothing #}")) as harness:
        error = await harness.error(CHAT, CHAT_BODY)
    assert error["message"] == "the prompt is empty"


async def test_an_error_from_behind_is_the_answer(harness: Harness) -> None:
    async def engine() -> None:
        harness.gateway.fail(await harness.submitted(), Overloaded("full", retry_after_s=10.0))

    async def client() -> tuple[int, int]:
        async with harness.post(CHAT, CHAT_BODY) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "overloaded"
            return int(response.headers["Retry-After"]), int(response.headers["retry-after-ms"])

    seconds, milliseconds = await beside(engine(), client())
    assert 8 <= seconds <= 12
    assert 8000 <= milliseconds <= 12000


async def test_one_choice_that_fails_ends_the_others(harness: Harness) -> None:
    async def engine() -> None:
        await harness.submitted(2)
        harness.gateway.fail(harness.gateway.submitted[1], InternalError("broken"))

    error = await beside(engine(), harness.error(CHAT, {**CHAT_BODY, "n": 2}, status=500))
    assert error["message"] == "broken"
    assert harness.gateway.cancelled == [harness.gateway.submitted[0].request_id]


@pytest.mark.parametrize(
    ("finish", "status"), [(FinishReason.ERROR, 500), (FinishReason.CANCELLED, 503)]
)
async def test_an_end_without_a_word_for_it_is_an_error(
    harness: Harness, finish: FinishReason, status: int
) -> None:
    async def engine() -> None:
        harness.gateway.deliver(await harness.submitted(), finish=finish)

    await beside(engine(), harness.error(CHAT, CHAT_BODY, status=status))


async def test_nothing_is_submitted_while_no_engine_serves(harness: Harness) -> None:
    harness.gateway.cluster = NOBODY
    async with harness.post(CHAT, CHAT_BODY) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 1
        assert (await response.json())["error"]["code"] == "unavailable"
    assert harness.gateway.submitted == []


async def test_a_call_that_is_open_when_the_server_stops_is_told_so(harness: Harness) -> None:
    async def stop() -> None:
        await harness.submitted()
        await harness.runner.cleanup()

    error = await beside(stop(), harness.error(CHAT, CHAT_BODY, status=503))
    assert error["message"] == "the gateway is stopping"
    assert harness.gateway.num_open == 0


async def test_a_call_that_can_end_in_time_does_so_while_the_server_stops(
    directory: Path,
) -> None:
    async with serving(directory, limits=HttpLimits(shutdown_timeout_s=60)) as harness:

        async def stop() -> None:
            request = await harness.submitted()
            stopping = asyncio.ensure_future(harness.runner.cleanup())
            await asyncio.sleep(0)
            tokens = harness.tokens("abc")
            harness.gateway.deliver(request, *tokens, finish=FinishReason.LENGTH)
            await stopping

        answer = await beside(stop(), harness.answer(CHAT, CHAT_BODY))
    assert answer["choices"][0]["message"]["content"] == "abc"


async def test_a_client_that_goes_away_ends_its_requests(harness: Harness) -> None:
    await harness.leave(CHAT, {**CHAT_BODY, "n": 4}, after=4)
    await harness.cancelled(4)
    assert harness.gateway.num_open == 0


async def test_token_ids_are_within_the_logits(harness: Harness) -> None:
    error = await harness.error(COMPLETIONS, {"prompt": [VOCAB_SIZE]})
    assert error["param"] == "prompt"


async def test_a_prompt_is_told_with_its_log_probabilities(directory: Path) -> None:
    """As evaluations ask for it: each token but the first, which nothing stands before."""
    body = {"prompt": "one two three", "echo": True, "logprobs": 1, "max_tokens": 1, "stop": "two"}
    async with serving(directory) as harness:
        tokens = harness.tokens("one two three")
        decode = harness.served.tokenizer.decode

        async def engine(number: int = 1) -> None:
            request = await harness.submitted(number)
            assert (*request.prompt, *request.params.echoed) == tuple(tokens)
            said = [*request.params.echoed, 70]
            logprobs = tuple(TokenLogprobs(-0.5, ((token, -0.5),)) for token in said)
            harness.gateway.deliver(request, *said, finish=FinishReason.LENGTH, logprobs=logprobs)

        answer = await beside(engine(), harness.answer(COMPLETIONS, body))
        as_ids = harness.answer(COMPLETIONS, {**body, "prompt": tokens})
        again = await beside(engine(2), as_ids)
        error = await harness.error(COMPLETIONS, {**body, "stream": True})
    assert error["param"] == "logprobs"
    [choice] = answer["choices"]
    # A stop string in the prompt ends nothing.
    assert choice["text"] == decode([*tokens, 70])
    starts = [len(decode(tokens[:place])) for place in range(len(tokens) + 1)]
    assert choice["logprobs"] == {
        "tokens": [decode([token]) for token in (*tokens, 70)],
        "token_logprobs": [None, *(-0.5 for _ in tokens)],
        "top_logprobs": [None, *({decode([token]): -0.5} for token in (*tokens[1:], 70))],
        "text_offset": starts,
    }
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(tokens), 1)
    assert again["choices"] == answer["choices"]
    assert again["usage"] == usage
