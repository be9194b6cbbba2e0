"""The official OpenAI client against real processes: gateway, supervisor and two engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.cluster import Cluster, running_cluster

MODEL = "understudy-demo"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "a function that adds"}]
PROMPT = "def add(a, b):\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(engines=2, engine="model") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[OpenAI]:
    base_url = f"{cluster.base_url}/v1"
    with OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def many(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    base_url = f"{cluster.base_url}/v1"
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_the_model_is_listed_and_found(client: OpenAI) -> None:
    [model] = client.models.list()
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_chat_is_answered(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in {"stop", "length"}
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8
    assert answer.usage.prompt_tokens > 0
    assert answer.id.startswith("chatcmpl-")


def test_a_completion_is_answered(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8)
    [choice] = answer.choices
    assert choice.text
    assert choice.index == 0
    assert answer.object == "text_completion"


def test_prompts_may_be_many_and_of_tokens(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=[[70, 71], [72]], max_tokens=2, n=2, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)


def test_a_chat_streams_what_it_would_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=24, temperature=0
    )
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=24, temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_a_completion_streams_what_it_would_answer(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
    chunks = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_the_usage_comes_at_the_end_of_a_stream(client: OpenAI) -> None:
    *others, last = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    assert others
    assert all(chunk.usage is None and chunk.choices for chunk in others)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    whole = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    )
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        cut = client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=24,
            temperature=0,
            stop=[stop],
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        if isinstance(cut, openai.Stream):
            choices = [chunk.choices[0] for chunk in cut]
        else:
            choices = [cut.choices[0]]
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_equal_seeds_give_equal_texts(client: OpenAI) -> None:
    def answer(seed: int | None) -> str:
        completion = client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=24,
            temperature=1.5,
            seed=seed,
            extra_body={"ignore_eos": True},
        )
        return completion.choices[0].text

    assert answer(5) == answer(5)
    assert answer(-1) == answer(2**64 - 1)
    assert len({answer(seed) for seed in (5, 6, None, None)}) > 2


def test_n_answers_differ_and_the_first_is_that_of_one(client: OpenAI) -> None:
    def answers(n: int) -> list[str | None]:
        completion = client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=24,
            temperature=1.5,
            seed=11,
            n=n,
            extra_body={"ignore_eos": True},
        )
        return [choice.message.content for choice in completion.choices]

    first, second = answers(2)
    assert first != second
    assert answers(1) == [first]


def test_n_answers_are_streamed_side_by_side(client: OpenAI) -> None:
    texts = {0: "", 1: ""}
    ends = {}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, n=2, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert sorted(ends) == [0, 1]


def test_log_probabilities_are_those_of_the_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    spelled = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert answer.choices[0].message.content is not None
    for entry in logprobs.content:
        # Greedy: the chosen token is the likeliest.
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
    assert spelled.decode(errors="replace").startswith(answer.choices[0].message.content[:3])


def test_log_probabilities_of_a_completion_have_their_own_shape(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, logprobs=2, extra_body={"ignore_eos": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == 4
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0


def test_an_echo_gives_the_prompt_back(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, echo=True)
    assert answer.choices[0].text.startswith(PROMPT)


async def test_fifty_streams_run_side_by_side(many: AsyncOpenAI) -> None:
    async def stream(seed: int) -> tuple[str, int]:
        text = ""
        num_tokens = 0
        async for chunk in await many.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=16,
            seed=seed % 5,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        ):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
        return text, num_tokens

    answers = await asyncio.gather(*[stream(seed) for seed in range(50)])
    assert {num_tokens for _, num_tokens in answers} == {16}
    for seed in range(5):
        assert len({text for text, _ in answers[seed::5]}) == 1


def test_a_client_that_leaves_a_stream_leaves_nothing_behind(
    client: OpenAI, cluster: Cluster
) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    cluster.wait_until(lambda report: report.reply is not None and report.reply.running == 0)


def test_errors_are_the_clients_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="other", messages=HELLO)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=5)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert tools.value.param == "tools"


def test_a_stream_that_cannot_begin_is_an_exception(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[], stream=True)


def test_a_call_with_the_same_idempotency_key_gets_the_same_answer(client: OpenAI) -> None:
    first, second = (
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=8,
            n=2,
            extra_headers={"Idempotency-Key": "order-66"},
        )
        for _ in range(2)
    )
    assert first == second


def test_what_is_ignored_is_named(client: OpenAI) -> None:
    response = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=1, user="me", extra_body={"zebra": 1}
    )
    assert response.headers["x-ignored-fields"] == "zebra"
    assert response.headers["x-request-id"]
