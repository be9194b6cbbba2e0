"""HTTP framing: whatever the cut of the bytes, the same head and the same body."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.tools.bench.response import (
    CHUNK_BYTES_MAX,
    LINE_BYTES_MAX,
    BodyDecoder,
    ChunkedDecoder,
    FixedLengthDecoder,
    MalformedResponse,
    UntilCloseDecoder,
    body_decoder,
    parse_head,
)


def chunked(pieces: list[bytes], *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    frames = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    return frames + b"0\r\n" + trailer + b"\r\n"


def feed_in_pieces(decoder: BodyDecoder, data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return b"".join(decoder.feed(data[low:high]) for low, high in pairwise(edges))


bodies = st.lists(st.binary(min_size=1, max_size=40) | st.just(b"\r\n0\r\n\r\n"), max_size=8)
cuts = st.lists(st.integers(0, 10_000), max_size=30)


@settings(deadline=None)
@given(bodies, cuts, st.sampled_from([b"", b";name=value"]), st.sampled_from([b"", b"X: y\r\n"]))
def test_any_cut_of_a_chunked_body_gives_the_same_body(
    pieces: list[bytes], cuts: list[int], extension: bytes, trailer: bytes
) -> None:
    decoder = ChunkedDecoder()
    data = chunked(pieces, extension=extension, trailer=trailer)
    assert feed_in_pieces(decoder, data, cuts) == b"".join(pieces)
    assert decoder.is_finished


@settings(deadline=None)
@given(bodies, st.data())
def test_a_chunked_body_that_lacks_its_last_byte_is_not_finished(
    pieces: list[bytes], data: st.DataObject
) -> None:
    whole = chunked(pieces)
    decoder = ChunkedDecoder()
    decoder.feed(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert not decoder.is_finished


def test_body_bytes_come_out_before_their_chunk_is_whole() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"a\r\nhello") == b"hello"
    assert decoder.feed(b"world\r\n") == b"world"


@pytest.mark.parametrize(
    "data",
    [
        b"zz\r\n",
        b"-5\r\nhello\r\n",
        b"\r\n",
        b"5\r\nhello!\r\n",
        b"%x\r\n" % (CHUNK_BYTES_MAX + 1),
        b"0\r\n\r\nHTTP/1.1 200 OK",
        b"1" * (LINE_BYTES_MAX + 1),
    ],
)
def test_a_broken_chunk_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedResponse):
        ChunkedDecoder().feed(data)


def test_bytes_that_no_request_asked_for_are_refused() -> None:
    decoder = ChunkedDecoder()
    decoder.feed(b"0\r\n\r\n")
    with pytest.raises(MalformedResponse, match="after the end"):
        decoder.feed(b"more")


def test_a_head_gives_status_and_headers_in_lower_case() -> None:
    head = parse_head(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\nCONNECTION: Close")
    assert head.status == 503
    assert head.headers == {"retry-after": "7", "connection": "Close"}
    assert head.retry_after_s == 7.0
    assert not head.is_kept_alive


@pytest.mark.parametrize(
    ("line", "expected_s"),
    [
        ("retry-after: 3\r\nretry-after-ms: 250", 0.25),
        ("retry-after: Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("retry-after: -1", None),
        ("server: x", None),
    ],
)
def test_retry_after_is_read_from_milliseconds_or_seconds(
    line: str, expected_s: float | None
) -> None:
    assert parse_head(f"HTTP/1.1 429 No\r\n{line}".encode()).retry_after_s == expected_s


@pytest.mark.parametrize("data", [b"", b"SSH-2.0-x", b"HTTP/1.1 ok", b"HTTP/2 200 OK"])
def test_what_is_no_status_line_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedResponse):
        parse_head(data)


def test_the_framing_follows_the_head() -> None:
    def decoder_for(*lines: str, status: int = 200) -> BodyDecoder:
        return body_decoder(parse_head("\r\n".join((f"HTTP/1.1 {status} X", *lines)).encode()))

    assert isinstance(decoder_for("Transfer-Encoding: chunked"), ChunkedDecoder)
    assert isinstance(decoder_for("Content-Length: 3"), FixedLengthDecoder)
    assert isinstance(decoder_for(), UntilCloseDecoder)
    assert decoder_for(status=204).is_finished
    assert decoder_for("Content-Length: 0").is_finished
    with pytest.raises(MalformedResponse):
        decoder_for("Content-Length: -3")


def test_a_body_of_known_length_ends_there() -> None:
    decoder = FixedLengthDecoder(5)
    assert decoder.feed(b"abc") == b"abc"
    assert not decoder.is_finished
    assert decoder.feed(b"de") == b"de"
    assert decoder.is_finished
    with pytest.raises(MalformedResponse):
        decoder.feed(b"f")


def test_a_body_until_close_never_finishes_by_itself() -> None:
    decoder = UntilCloseDecoder()
    assert decoder.feed(b"abc") == b"abc"
    assert not decoder.is_finished
