"""Server-sent events under any cut, and the verdict on a stream."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.tools.bench.events import (
    EVENT_BYTES_MAX,
    CompletionStream,
    EventParser,
    Failure,
    event_data,
)


def events_of_lines(lines: list[str]) -> list[bytes]:
    """The oracle: the specification's steps (WHATWG HTML, 9.2.6), one line at a time."""
    events: list[bytes] = []
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                events.append("\n".join(data).encode())
            data = []
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
    return events


words = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
lines = st.lists(
    st.one_of(
        st.just(""),
        words.map(lambda text: f"data: {text}"),
        words.map(lambda text: f"data:{text}"),
        words.map(lambda text: f": {text}"),
        words.map(lambda text: f"id: {text}"),
        st.just('data: {"choices":[{"text":"x","finish_reason":null}]}'),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(lines, st.data())
def test_any_cut_of_the_bytes_gives_the_same_events(lines: list[str], data: st.DataObject) -> None:
    ends = [data.draw(st.sampled_from(["\n", "\r\n", "\r"])) for _ in lines]
    for index in reversed(range(len(lines) - 1)):
        if ends[index] == "\r" and lines[index + 1] + ends[index + 1] == "\n":
            # A CR before an LF would be read as one end of a line, not two.
            ends[index] = "\n"
    stream = "".join(line + end for line, end in zip(lines, ends, strict=True)).encode()
    stream += b": the last CR, if any, is followed by something\n"
    parser = EventParser()
    found: list[bytes] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += map(event_data, parser.feed(stream[:size]))
        stream = stream[size:]
    assert found == events_of_lines(lines)


def test_comments_and_events_without_data_are_dropped() -> None:
    assert EventParser().feed(b": keep-alive\n\nid: 1\n\nevent: x\n\n") == []


def test_an_event_keeps_its_data_beside_its_id() -> None:
    blocks = EventParser().feed(b"id: 7.1\ndata: one\ndata: two\n\n")
    assert list(map(event_data, blocks)) == [b"one\ntwo"]


def test_an_event_without_end_is_refused_in_the_end() -> None:
    parser = EventParser()
    parser.feed(b"data: " + b"x" * (EVENT_BYTES_MAX - 6))
    with pytest.raises(ValueError, match="more than"):
        parser.feed(b"x")


def completion_chunk(text: str, finish_reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return b"data: " + msgspec.json.encode({"id": "1", "choices": [choice], **more})


def chat_chunk(finish_reason: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: " + msgspec.json.encode({"id": "1", "choices": [choice], "usage": None})


def usage_chunk(prompt_tokens: int, completion_tokens: int) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return b"data: " + msgspec.json.encode({"id": "1", "choices": [], "usage": usage})


DONE = b"data: [DONE]"


def stream_of(*arrivals: list[bytes]) -> CompletionStream:
    stream = CompletionStream()
    for time_s, blocks in enumerate(arrivals):
        stream.arrive(blocks, float(time_s))
    return stream


def test_a_whole_stream_is_whole_and_its_times_are_those_of_its_reads() -> None:
    stream = stream_of(
        [completion_chunk("a")],
        [completion_chunk("b"), completion_chunk("c")],
        [],
        [completion_chunk("d", "length")],
        [usage_chunk(7, 4), DONE],
    )
    assert stream.close(expected_tokens=4) is None
    assert (stream.first_token_at_s, stream.last_token_at_s) == (0.0, 3.0)
    assert stream.gaps_s == [1.0, 2.0]
    assert (stream.arrivals, stream.token_events) == (3, 4)
    assert (stream.num_prompt_tokens, stream.num_tokens) == (7, 4)


def test_the_role_and_the_empty_end_of_a_chat_are_no_tokens() -> None:
    stream = stream_of(
        [chat_chunk(role="assistant", content="")],
        [chat_chunk(content="a")],
        [chat_chunk(content="b")],
        [chat_chunk("stop"), DONE],
    )
    assert stream.close(expected_tokens=2) is None
    assert (stream.first_token_at_s, stream.last_token_at_s) == (1.0, 2.0)
    assert stream.num_tokens == 2


def test_json_with_spaces_reads_the_same() -> None:
    spaced = b'data: {"choices": [{"text": "a", "finish_reason": null}]}'
    stream = stream_of([spaced], [spaced])
    assert stream.token_events == 2


@pytest.mark.parametrize(
    ("blocks", "kind"),
    [
        ([], "stream_cut"),
        ([completion_chunk("a")], "stream_cut"),
        ([completion_chunk("a", "stop")], "stream_cut"),
        ([completion_chunk("a"), DONE], "no_finish_reason"),
        ([completion_chunk("a"), b'data: {"error":{"message":"gone"}}'], "stream_error"),
        ([completion_chunk("a"), b'data: {"error":{"message":"gone"}}', DONE], "stream_error"),
        ([completion_chunk("a", "length"), usage_chunk(1, 1), DONE], "wrong_length"),
        ([completion_chunk("a"), b"data: not JSON", DONE], "bad_response"),
        ([b'data: {"choices":5}', DONE], "bad_response"),
        (
            [completion_chunk("a", "stop"), DONE, DONE, completion_chunk("b", "stop")],
            "bad_response",
        ),
    ],
)
def test_a_stream_that_does_not_end_as_it_must_is_an_error(blocks: list[bytes], kind: str) -> None:
    failure = stream_of(blocks).close(expected_tokens=2)
    assert failure is not None
    assert failure.kind == kind


def test_the_first_failure_is_the_one_that_is_told() -> None:
    stream = stream_of([b'data: {"error":"first"}', b'data: {"error":"second"}'])
    assert stream.close(expected_tokens=None) == Failure("stream_error", '"first"')


def test_text_that_looks_like_json_is_text() -> None:
    text = '","finish_reason":null},{"error":{}} [DONE]'
    stream = stream_of([completion_chunk(text)], [completion_chunk(text, "stop"), DONE])
    assert stream.close(expected_tokens=None) is None
    assert stream.token_events == 2
