"""The Responses API over HTTP: streamed, kept, gone on from, in background, ended, forgotten."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.http_harness import MODEL, Harness, error_of, saying_text, serving
from tests.tiny_models import CHATML, write_model
from understudy.protocol.errors import InternalError
from understudy.protocol.request import FinishReason, Request

RESPONSES: Final = "/v1/responses"
BODY: Final[dict[str, Any]] = {"model": MODEL, "input": "hello"}
TOOL: Final = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
TEXT: Final = (
    "<think>\nlet me see\n</think>\n\nOne moment. 🦊\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    template = CHATML.replace(
        "message['content'] +",
        "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +",
    )
    return write_model(tmp_path, chat_template=template, max_position_embeddings=4096)


@pytest.fixture
async def silent(directory: Path) -> AsyncIterator[Harness]:
    """A server whose engine says what the test has it say."""
    async with serving(directory) as harness:
        yield harness


@pytest.fixture
async def talking(directory: Path) -> AsyncIterator[Harness]:
    """A server whose engine thinks, answers and calls a tool."""
    script = saying_text(directory, TEXT)
    async with serving(
        directory, script, tool_parser="hermes", reasoning_parser="qwen3"
    ) as harness:
        yield harness


async def ask(harness: Harness, method: str, path: str, status: int = 200) -> Any:
    async with harness.session.request(method, path) as response:
        answer = await response.json()
        assert response.status == status, answer
        return answer


async def events_of(response: Any) -> list[Any]:
    """The data of a stream's events; each has its type for a name."""
    assert response.status == 200, await response.text()
    found = []
    for block in (await response.text()).split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            name, data = lines
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


async def stream(harness: Harness, **body: Any) -> list[Any]:
    async with harness.post(RESPONSES, {**BODY, "stream": True, **body}) as response:
        return await events_of(response)


async def begin(harness: Harness, *tokens: int, **body: Any) -> tuple[Any, Request]:
    """A stream whose engine has made these tokens, and its request."""
    number = len(harness.gateway.submitted) + 1
    post = harness.post(RESPONSES, {**BODY, "stream": True, **body})
    call = asyncio.ensure_future(post.__aenter__())
    request = await harness.submitted(number)
    harness.gateway.deliver(request, *tokens)
    response = await call
    harness.responses.append(response)
    return response, request


async def join(harness: Harness, name: str, query: str = "") -> list[Any]:
    async with harness.session.get(f"{RESPONSES}/{name}?stream=true{query}") as response:
        return await events_of(response)


async def test_a_response_has_an_item_for_each_thing_that_the_model_does(
    talking: Harness,
) -> None:
    answer = await talking.answer(RESPONSES, {**BODY, "tools": [TOOL], "instructions": "be kind"})
    assert answer["status"] == "completed"
    assert answer["id"].startswith("resp_")
    assert answer["instructions"] == "be kind"
    thoughts, message, call = answer["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "let me see"}]
    assert message["content"][0]["text"] == "One moment. 🦊"
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert json.loads(call["arguments"]) == {"city": "Zürich"}
    assert {item["status"] for item in answer["output"]} == {"completed"}
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 3
    [request] = talking.gateway.submitted
    assert answer["usage"]["input_tokens"] == len(request.prompt)
    assert talking.served.tokenizer.decode(request.prompt).startswith("system\nbe kind")


async def test_a_stream_comes_to_the_same_as_an_answer_in_one_piece(talking: Harness) -> None:
    whole = await talking.answer(RESPONSES, {**BODY, "tools": [TOOL], "seed": 1})
    told = await stream(talking, tools=[TOOL], seed=1)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert [event["type"] for event in told[:2]] == ["response.created", "response.in_progress"]
    assert told[-1]["type"] == "response.completed"
    final = told[-1]["response"]
    texts = {
        kind: "".join(event["delta"] for event in told if event["type"] == kind)
        for kind in (
            "response.output_text.delta",
            "response.reasoning_text.delta",
            "response.function_call_arguments.delta",
        )
    }
    thoughts, message, call = final["output"]
    assert texts == {
        "response.output_text.delta": message["content"][0]["text"],
        "response.reasoning_text.delta": thoughts["content"][0]["text"],
        "response.function_call_arguments.delta": call["arguments"],
    }
    for mine, other in zip(final["output"], whole["output"], strict=True):
        unlike = {"id", "call_id"}
        assert {key: mine[key] for key in mine.keys() - unlike} == {
            key: other[key] for key in other.keys() - unlike
        }
    assert final["usage"] == whole["usage"]


async def test_a_stream_is_told_again_from_each_event_on(talking: Harness) -> None:
    told = await stream(talking, tools=[TOOL])
    name = told[0]["response"]["id"]
    assert await join(talking, name) == told
    for after in range(len(told)):
        assert await join(talking, name, f"&starting_after={after}") == told[after + 1 :]
    for wrong in (len(told), 10**8):
        path = f"{RESPONSES}/{name}?stream=true&starting_after={wrong}"
        await ask(talking, "GET", path, status=404)


async def test_how_tokens_come_does_not_change_the_events(silent: Harness) -> None:
    tokens = silent.tokens("some words, 🦊 and more of them")
    streams = []
    for size in (1, len(tokens)):
        response, request = await begin(silent, *tokens[:size], max_output_tokens=len(tokens))
        for token in tokens[size:]:
            silent.gateway.deliver(request, token)
        silent.gateway.deliver(request, finish=FinishReason.LENGTH)
        told = await events_of(response)
        assert told[-1]["type"] == "response.incomplete"
        assert await join(silent, told[0]["response"]["id"]) == told
        streams.append([(event["type"], event.get("delta")) for event in told])
    assert streams[0] == streams[1]


async def test_a_response_may_have_to_be_json(silent: Harness) -> None:
    form = {"type": "json_schema", "name": "city", "schema": {"type": "object"}, "strict": True}
    response, request = await begin(silent, *silent.tokens("{}"), text={"format": form})
    assert request.params.grammar
    silent.gateway.deliver(request, finish=FinishReason.STOP)
    last = (await events_of(response))[-1]
    assert last["response"]["status"] == "completed"
    assert last["response"]["text"] == {"format": form}


async def test_a_response_whose_deadline_passes_is_incomplete_and_says_so(silent: Harness) -> None:
    response, request = await begin(silent, *silent.tokens("some words"))
    silent.gateway.deliver(request, finish=FinishReason.DEADLINE)
    last = (await events_of(response))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "deadline"}


async def test_a_response_in_background_is_told_as_far_as_it_is(silent: Harness) -> None:
    answer = await silent.answer(RESPONSES, {**BODY, "background": True})
    name = answer["id"]
    assert (answer["status"], answer["output"], answer["usage"]) == ("queued", [], None)
    request = silent.gateway.submitted[0]
    assert request.idempotency_key  # so that it goes on when its gateway is gone
    silent.gateway.deliver(request, *silent.tokens("one two"))
    answer = await ask(silent, "GET", f"{RESPONSES}/{name}")
    assert answer["status"] == "in_progress"
    assert answer["output"][0]["content"][0]["text"] == "one two"
    silent.gateway.deliver(request, *silent.tokens(" three"), 0, finish=FinishReason.STOP)
    answer = await ask(silent, "GET", f"{RESPONSES}/{name}")
    assert answer["status"] == "completed"
    assert answer["output"][0]["content"][0]["text"] == "one two three"
    told = await join(silent, name)
    assert told[-1]["response"] == answer


async def test_a_stream_of_a_response_in_background_outlives_its_client(silent: Harness) -> None:
    response, request = await begin(silent, *silent.tokens("one"), background=True)
    name = response.headers["X-Stream-Id"]
    response.close()
    await silent.gateway.wait_until(lambda gateway: bool(gateway.left))
    silent.gateway.deliver(request, *silent.tokens(" two"), 0, finish=FinishReason.STOP)
    told = await join(silent, name, "&starting_after=4")
    assert "".join(event.get("delta", "") for event in told) == " two"


async def test_a_response_in_background_is_cancelled(silent: Harness) -> None:
    name = (await silent.answer(RESPONSES, {**BODY, "background": True}))["id"]
    silent.gateway.deliver(silent.gateway.submitted[0], *silent.tokens("one"))
    for _ in range(2):
        answer = await ask(silent, "POST", f"{RESPONSES}/{name}/cancel")
        assert answer["status"] == "cancelled"
        assert answer["output"][0]["status"] == "incomplete"
    assert (await ask(silent, "GET", f"{RESPONSES}/{name}"))["status"] == "cancelled"


async def test_only_what_is_in_background_is_cancelled(talking: Harness) -> None:
    name = (await talking.answer(RESPONSES, BODY))["id"]
    await ask(talking, "POST", f"{RESPONSES}/{name}/cancel", status=400)


async def test_a_deleted_response_is_gone(talking: Harness) -> None:
    name = (await talking.answer(RESPONSES, BODY))["id"]
    answer = await ask(talking, "DELETE", f"{RESPONSES}/{name}")
    assert answer == {"id": name, "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        await ask(talking, method, f"{RESPONSES}/{name}", status=404)


async def test_a_response_that_could_not_go_on_is_failed(silent: Harness) -> None:
    response, request = await begin(silent, *silent.tokens("one"))
    silent.gateway.fail(request, InternalError("the engine burns"))
    told = await events_of(response)
    assert (told[-1]["type"], told[-1]["message"]) == ("error", "the engine burns")
    assert [event["sequence_number"] for event in told] == list(range(len(told)))


async def test_a_refused_response_in_background_is_an_error(silent: Harness) -> None:
    silent.gateway.is_connected = False
    error = await silent.error(RESPONSES, {**BODY, "background": True}, status=503)
    assert error["code"] == "unavailable"


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_kept_response_that_was_refused_on_its_way_says_why(
    silent: Harness, tokens: int
) -> None:
    name = (await silent.answer(RESPONSES, {**BODY, "background": True}))["id"]
    [request] = silent.gateway.submitted
    made = silent.tokens("one two three")[:tokens]
    silent.gateway.deliver(request, *made, finish=FinishReason.REFUSED)
    answer = await ask(silent, "GET", f"{RESPONSES}/{name}")
    assert answer["status"] == "failed"
    assert "grammar" in answer["error"]["message"]
    assert await ask(silent, "GET", f"{RESPONSES}/{name}") == answer
    assert (await ask(silent, "POST", f"{RESPONSES}/{name}/cancel"))["status"] == "failed"
    # Who joins it as a stream is refused as who made it would have been.
    refusal = await ask(silent, "GET", f"{RESPONSES}/{name}?stream=true", status=400)
    assert error_of(refusal)["message"] == answer["error"]["message"]
    error = await silent.error(RESPONSES, {**BODY, "previous_response_id": name})
    assert error["param"] == "previous_response_id"
    assert (await ask(silent, "DELETE", f"{RESPONSES}/{name}"))["deleted"]
    await ask(silent, "GET", f"{RESPONSES}/{name}", status=404)


async def test_a_conversation_goes_on_from_a_response(talking: Harness) -> None:
    first = await talking.answer(RESPONSES, {**BODY, "tools": [TOOL], "instructions": "be kind"})
    call = first["output"][2]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    body = {**BODY, "input": [result], "previous_response_id": first["id"], "tools": [TOOL]}
    second = await talking.answer(RESPONSES, body)
    assert second["previous_response_id"] == first["id"]
    body = {**BODY, "input": "and now?", "previous_response_id": second["id"]}
    await talking.answer(RESPONSES, body)
    prompt = talking.served.tokenizer.decode(talking.gateway.submitted[-1].prompt)
    parts = ["hello", "One moment. 🦊", call["call_id"], "rain", "One moment. 🦊", "and now?"]
    at = -1
    for part in parts:
        at = prompt.find(part, at + 1)
        assert at >= 0, part
    assert "be kind" not in prompt


async def test_what_was_not_stored_is_not_found(talking: Harness) -> None:
    name = (await talking.answer(RESPONSES, {**BODY, "store": False}))["id"]
    await ask(talking, "GET", f"{RESPONSES}/{name}", status=404)
    error = await talking.error(RESPONSES, {**BODY, "previous_response_id": name}, status=404)
    assert error["param"] == "previous_response_id"


async def test_a_response_is_no_stream_of_another_kind(talking: Harness) -> None:
    name = (await talking.answer(RESPONSES, BODY))["id"]
    digits = name.removeprefix("resp_")
    for path in (f"/v1/streams/{digits}", f"/v1/streams/chatcmpl-{digits}"):
        await ask(talking, "GET", path, status=404)
    answer = await talking.answer(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}
    )
    other = answer["id"].replace("chatcmpl-", "resp_")
    assert error_of(await ask(talking, "GET", f"{RESPONSES}/{other}", status=404))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "boss", "content": "x"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        ({"n": 2}, "n"),
        ({"background": True, "store": False}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 1}}}},
            "text.format",
        ),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"temperature": 9}, "temperature"),
    ],
)
async def test_what_is_wrong_with_a_body_is_named(
    talking: Harness, body: dict[str, Any], param: str
) -> None:
    error = await talking.error(RESPONSES, {**BODY, **body})
    assert error["param"] == param
    assert talking.gateway.submitted == []


@pytest.mark.parametrize(
    "path",
    [
        "/resp_",
        "/resp_zz",
        "/resp_0123456789abcdef",
        "/chatcmpl-0123456789abcdef",
        "/resp_0123456789abcdef?stream=true&starting_after=1",
    ],
)
async def test_what_is_no_response_is_not_found(silent: Harness, path: str) -> None:
    await ask(silent, "GET", RESPONSES + path, status=404)


async def test_an_empty_answer_is_a_response_without_items(directory: Path) -> None:
    def nothing(request: Request) -> list[int]:
        return [request.params.stop_token_ids[0]]

    async with serving(directory, nothing) as harness:
        answer = await harness.answer(RESPONSES, BODY)
        again = await ask(harness, "GET", f"{RESPONSES}/{answer['id']}")
    assert (answer["status"], answer["output"]) == ("completed", [])
    assert again == answer


@pytest.mark.parametrize("is_background", [False, True])
async def test_a_repeated_call_joins_the_response_that_it_repeats(
    talking: Harness, is_background: bool
) -> None:
    answers = []
    for _ in range(2):
        body = {**BODY, "background": is_background}
        async with talking.post(RESPONSES, body, Idempotency_Key="k") as response:
            assert response.status == 200
            answers.append(await response.json())
    assert answers[0]["id"] == answers[1]["id"]
    assert len(talking.gateway.submitted) == 1


async def test_a_conversation_that_is_too_long_to_be_kept_can_be_answered_unkept(
    tmp_path: Path,
) -> None:
    template = "{{ messages | length }}"
    directory = write_model(tmp_path, chat_template=template)
    body = {**BODY, "input": "x" * (600 << 10)}
    async with serving(directory, saying_text(directory, "one")) as harness:
        error = await harness.error(RESPONSES, body)
        assert error["param"] == "store"
        assert (await harness.answer(RESPONSES, {**body, "store": False}))["status"] == "completed"
