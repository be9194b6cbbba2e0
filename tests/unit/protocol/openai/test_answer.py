from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.errors import InternalError, RequestError, Unavailable
from understudy.protocol.openai.answer import (
    ChunkEncoder,
    Heading,
    engine_comment,
    error_event,
    finish_reason_or_error,
    system_fingerprint,
    usage,
    usage_event,
)
from understudy.protocol.openai.chat import CHUNK_KIND as CHAT_KIND
from understudy.protocol.openai.chat import chat_chunk_encoder
from understudy.protocol.openai.completions import CHUNK_KIND, completion_chunk_encoder
from understudy.protocol.openai.logprobs import LEAST_LOGPROB, TokenLogprob, spell_logprobs
from understudy.protocol.openai.stream_ids import EventIds
from understudy.protocol.request import FinishReason, TokenLogprobs

HEADING = Heading("chatcmpl-1", 5, 'a "model"')
LOGPROB = TokenLogprob(b"x", -1.0, (), 3)


def read(event: bytes) -> tuple[str, dict[str, Any]]:
    """The id and the chunk of an event."""
    first, second, *rest = event.decode().split("\n")
    assert rest == ["", ""]
    assert first.startswith("id: ")
    assert second.startswith("data: ")
    return first.removeprefix("id: "), json.loads(second.removeprefix("data: "))


@pytest.fixture(params=[False, True])
def has_usage(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def chat_chunk(index: int, delta: dict[str, str], *, has_usage: bool, **more: Any) -> Any:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    chunk: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": CHAT_KIND,
        "created": 5,
        "model": 'a "model"',
        "choices": [choice | more],
    }
    return chunk | ({"usage": None} if has_usage else {})


@given(text=st.text(), position=st.integers(0, 10**6), has_usage=st.booleans())
def test_a_chunk_of_text_is_the_json_that_openai_sends(
    text: str, position: int, has_usage: bool
) -> None:
    encoder = chat_chunk_encoder(HEADING, EventIds(0xABC, [0, 0, 7]), 2, has_usage=has_usage)
    event_id, chunk = read(encoder.encode(position, text))
    assert event_id == f"0000000000000abc.0-0-{position}"
    assert chunk == chat_chunk(2, {"content": text}, has_usage=has_usage)


@given(text=st.text(), has_usage=st.booleans())
def test_the_short_way_gives_the_same_bytes_as_the_long_one(text: str, has_usage: bool) -> None:
    for make_encoder in (chat_chunk_encoder, completion_chunk_encoder):
        encoder: ChunkEncoder = make_encoder(HEADING, EventIds(7, [0]), 0, has_usage=has_usage)
        assert encoder.encode(9, text) == encoder.encode_any(9, text, is_first=False)


def test_the_first_chunk_of_a_chat_names_the_role(has_usage: bool) -> None:
    encoder = chat_chunk_encoder(HEADING, EventIds(7, [0]), 0, has_usage=has_usage)
    _, chunk = read(encoder.encode_any(1, "x", is_first=True))
    delta = {"role": "assistant", "content": "x"}
    assert chunk == chat_chunk(0, delta, has_usage=has_usage)


def test_the_last_chunk_says_why_it_is_the_last(has_usage: bool) -> None:
    encoder = chat_chunk_encoder(HEADING, EventIds(7, [0]), 0, has_usage=has_usage)
    _, chunk = read(encoder.encode_any(1, "", is_first=False, finish_reason="stop"))
    assert chunk == chat_chunk(0, {"content": ""}, has_usage=has_usage, finish_reason="stop")


def test_a_chunk_can_say_what_it_cost() -> None:
    encoder = chat_chunk_encoder(HEADING, EventIds(7, [0]), 0, has_usage=True)
    _, chunk = read(
        encoder.encode_any(1, "x", is_first=False, usage=usage(3, 1, num_cached_tokens=0))
    )
    assert chunk["usage"]["total_tokens"] == 4


def test_a_chunk_of_a_chat_has_log_probabilities_in_the_shape_of_chats() -> None:
    encoder = chat_chunk_encoder(HEADING, EventIds(7, [0]), 0, has_usage=False)
    _, chunk = read(encoder.encode_any(1, "x", is_first=False, logprobs=[LOGPROB]))
    [entry] = chunk["choices"][0]["logprobs"]["content"]
    assert entry == {"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": []}


def test_a_chunk_of_a_completion_has_its_text_and_its_own_log_probabilities() -> None:
    encoder = completion_chunk_encoder(HEADING, EventIds(7, [0, 0]), 1, has_usage=False)
    _, chunk = read(encoder.encode_any(1, "x", is_first=True, logprobs=[LOGPROB]))
    assert chunk["object"] == CHUNK_KIND
    assert chunk["choices"] == [
        {
            "index": 1,
            "text": "x",
            "logprobs": {
                "tokens": ["x"],
                "token_logprobs": [-1.0],
                "top_logprobs": [{"x": -1.0}],
                "text_offset": [3],
            },
            "finish_reason": None,
        }
    ]


def test_the_chunk_with_the_usage_has_no_choices() -> None:
    event = usage_event(HEADING, CHAT_KIND, usage(1, 2, num_cached_tokens=0)).decode()
    chunk = json.loads(event.removeprefix("data: "))
    assert event.endswith("\n\n")
    assert chunk["choices"] == []
    assert chunk["usage"]["completion_tokens"] == 2


def test_an_error_is_an_event_with_openais_error_object() -> None:
    event = error_event(InternalError("it\nbroke"))
    assert event.count(b"\n") == 2
    assert json.loads(event.decode().removeprefix("data: ")) == {
        "error": {
            "message": "it\nbroke",
            "type": "api_error",
            "param": None,
            "code": "internal_error",
        }
    }


def test_an_engine_is_named_in_a_comment() -> None:
    assert engine_comment("engine-0", 1) == b": engine engine-0 choice 1\n"


@pytest.mark.parametrize(
    ("finish", "outcome"),
    [
        (FinishReason.STOP, "stop"),
        (FinishReason.LENGTH, "length"),
        (FinishReason.CANCELLED, Unavailable),
        (FinishReason.ERROR, InternalError),
    ],
)
def test_every_end_has_a_word_or_an_error(finish: FinishReason, outcome: Any) -> None:
    found = finish_reason_or_error(finish)
    if isinstance(found, RequestError):
        assert type(found) is outcome
    else:
        assert found == outcome


def test_minus_infinity_is_said_as_a_number() -> None:
    given = TokenLogprobs(-math.inf, ((2, -math.inf), (1, -0.5)))
    entry = spell_logprobs(5, given, offset=4, spell=lambda token_id: b"%d" % token_id)
    assert entry == TokenLogprob(
        b"5",
        LEAST_LOGPROB,
        (TokenLogprob(b"2", LEAST_LOGPROB), TokenLogprob(b"1", -0.5)),
        4,
    )


def test_the_fingerprint_names_the_classes_of_numerics_whatever_their_order() -> None:
    one, other = system_fingerprint(("exact", "fast")), system_fingerprint(("fast", "exact"))
    assert one == other
    assert re.fullmatch(r"fp_[0-9a-f]{12}", one)
    assert one != system_fingerprint(("exact",))
    assert system_fingerprint(()) == ""


def test_an_answer_says_its_fingerprint_if_it_has_one() -> None:
    fields = HEADING._replace(system_fingerprint="fp_1").fields("chat.completion")
    assert fields == {**HEADING.fields("chat.completion"), "system_fingerprint": "fp_1"}
    assert "system_fingerprint" not in HEADING.fields("chat.completion")
