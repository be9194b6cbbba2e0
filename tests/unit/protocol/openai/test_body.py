from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.body import (
    CONTAINERS_MAX,
    FIELDS_MAX,
    NAMED_MAX,
    STRINGS_MAX,
    decode_object,
    parse_body,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)
tricky_text = st.text(alphabet='\\":{}[],ua0 ')


class Fields(msgspec.Struct, kw_only=True, frozen=True):
    size: int | None = None
    ratio: float | None = None
    is_on: bool | None = None
    text: str | None = None
    places: list[dict[str, int]] | None = None
    bias: dict[str, float] | None = None


@given(value=st.dictionaries(st.text() | tricky_text, json_values | tricky_text))
def test_any_object_is_read_as_it_was_written(value: dict[str, Any]) -> None:
    assert decode_object(json.dumps(value).encode()) == value
    assert decode_object(json.dumps(value, ensure_ascii=False).encode()) == value


@given(
    value=st.dictionaries(tricky_text, tricky_text, min_size=1),
    extra=tricky_text,
    depth=st.integers(0, 5),
)
def test_a_duplicate_key_is_found_wherever_it_is(
    value: dict[str, str], extra: str, depth: int
) -> None:
    key = json.dumps(next(iter(value)))
    body = json.dumps(value)[:-1] + f", {key}: {json.dumps(extra)}}}"
    for _ in range(depth):
        body = f'{{"a:b": [0, {body}]}}'
    with pytest.raises(InvalidRequest, match="duplicate key"):
        decode_object(body.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"{}x",
        b"{'a': 1}",
        b'{"a": 01}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": -1e400}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"\xff": 1}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"a": "\\x"}',
        b'{"a": "\x01"}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": 1,}',
        b'{"a"}',
    ],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        decode_object(body)


@pytest.mark.parametrize("body", [b"null", b"[]", b"3", b'"text"', b"true", b"[{}]"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        decode_object(body)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_object(opening * 100_000)
    closing = b"]" if opening == b"[" else b"}"
    with pytest.raises(InvalidRequest):
        decode_object(b'{"a":' + opening * 20_000 + b"1" + closing * 20_000 + b"}")


def test_a_body_of_too_many_parts_is_refused() -> None:
    strings = json.dumps({"a": ["ab"] * (STRINGS_MAX + 1)}).encode()
    with pytest.raises(InvalidRequest, match="strings"):
        decode_object(strings)
    containers = json.dumps({"a": [[]] * CONTAINERS_MAX}).encode()
    with pytest.raises(InvalidRequest, match="objects and arrays"):
        decode_object(containers)
    fields = json.dumps({f"x{index}": 1 for index in range(FIELDS_MAX + 1)}).encode()
    with pytest.raises(InvalidRequest, match="fields"):
        parse_body(fields, Fields)


def test_a_long_list_of_numbers_is_read() -> None:
    numbers = list(range(100_000))
    assert decode_object(json.dumps({"a": numbers}).encode()) == {"a": numbers}


def test_brackets_and_quotes_in_a_text_do_not_count_as_parts() -> None:
    text = '{["' * CONTAINERS_MAX
    assert decode_object(json.dumps({"a": text}).encode()) == {"a": text}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"size": True}, "size"),
        ({"size": "1"}, "size"),
        ({"size": 1.0}, "size"),
        ({"size": [1]}, "size"),
        ({"ratio": "0.5"}, "ratio"),
        ({"ratio": True}, "ratio"),
        ({"is_on": 1}, "is_on"),
        ({"is_on": "true"}, "is_on"),
        ({"text": 3}, "text"),
        ({"places": [{"a": 1}, {"a": "x"}]}, "places[1]"),
        ({"places": {"a": 1}}, "places"),
        ({"bias": {"5": "x"}}, "bias"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_name(body: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(json.dumps(body).encode(), Fields)
    assert caught.value.param == param
    assert caught.value.message.startswith(param.partition("[")[0])


def test_null_is_the_same_as_absent() -> None:
    body = json.dumps(dict.fromkeys(("size", "tools", "grammar", "unknown"))).encode()
    assert parse_body(body, Fields) == (Fields(), ())


def test_an_integer_will_do_for_a_number() -> None:
    assert parse_body(b'{"ratio": 1}', Fields).fields.ratio == 1.0


def test_unknown_fields_are_named_and_ignored() -> None:
    body = json.dumps({"size": 1, "zeta": [], "alpha": {"x": 1}}).encode()
    assert parse_body(body, Fields) == (Fields(size=1), ("alpha", "zeta"))


def test_names_that_are_unfit_for_a_header_are_ignored_without_being_named() -> None:
    body = json.dumps({"a\r\nb": 1, "x" * 65: 1, "größe": 1, "": 1, "a b": 1}).encode()
    assert parse_body(body, Fields).ignored == ()


def test_only_so_many_fields_are_named() -> None:
    body = json.dumps({f"x{index}": 1 for index in range(100)}).encode()
    assert len(parse_body(body, Fields).ignored) == NAMED_MAX


def test_fields_about_the_account_are_accepted_without_a_word() -> None:
    body = json.dumps({"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"})
    assert parse_body(body.encode(), Fields).ignored == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function"}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "text", "more": 1}),
        ("structured_outputs", {"regex": "a"}),
        ("guided_json", {}),
        ("guided_regex", "a"),
        ("guided_anything", False),
        ("grammar", ""),
        ("regex", "a"),
        ("use_beam_search", True),
        ("bad_words", ["x"]),
        ("allowed_token_ids", [1]),
        ("suffix", "x"),
        ("chat_template", "{{ messages }}"),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("prompt_logprobs", 1),
        ("skip_special_tokens", False),
        ("truncate_prompt_tokens", 10),
        ("logits_processors", ["x"]),
        ("documents", [{"text": "x"}]),
    ],
)
def test_what_would_change_the_output_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="not supported") as caught:
        parse_body(json.dumps({name: value}).encode(), Fields)
    assert caught.value.param == name


@pytest.mark.parametrize(
    "body",
    [
        {"tools": []},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"use_beam_search": False},
        {"bad_words": []},
        {"suffix": ""},
        {"modalities": ["text"]},
        {"skip_special_tokens": True},
        {"length_penalty": 1},
    ],
)
def test_what_would_change_the_output_is_accepted_where_it_changes_nothing(body: Any) -> None:
    assert parse_body(json.dumps(body).encode(), Fields) == (Fields(), ())
