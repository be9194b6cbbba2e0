"""What a body may say of its answer's form, and what is refused before anything is compiled."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.chat import parse_chat
from understudy.protocol.openai.completions import parse_completion
from understudy.protocol.openai.sampling import ModelTraits
from understudy.protocol.openai.structured_output import (
    CHOICE_BYTES_MAX,
    CHOICES_MAX,
    GRAMMAR_BYTES_MAX,
    Grammar,
    choice_grammar,
    json_grammar,
    lark_or_gbnf_grammar,
    regex_grammar,
)

MODEL = ModelTraits(name="tiny", vocab_size=128, max_model_len=256, eos_token_ids=(0,))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(**fields: Any) -> Grammar | None:
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    return parse_chat(json.dumps(body).encode(), MODEL).generation.grammar


def completion(**fields: Any) -> Grammar | None:
    body = {"prompt": "hello", **fields}
    return parse_completion(json.dumps(body).encode(), MODEL).generation.grammar


def schema_of(grammar: Grammar | None) -> dict[str, Any]:
    assert grammar is not None
    [part] = json.loads(grammar.text)["grammars"]
    schema: dict[str, Any] = part["json_schema"]
    return schema


def test_text_is_no_grammar() -> None:
    assert chat() is None
    assert chat(response_format={"type": "text"}) is None
    assert completion() is None


def test_a_json_object_is_a_schema() -> None:
    assert schema_of(chat(response_format={"type": "json_object"}))["type"] == "object"


@pytest.mark.parametrize("strict", [True, None])
def test_a_json_schema_is_taken_at_its_word(strict: bool | None) -> None:
    wrapped = {"name": "answer", "schema": SCHEMA, "strict": strict}
    grammar = chat(response_format={"type": "json_schema", "json_schema": wrapped})
    assert schema_of(grammar).items() >= SCHEMA.items()
    assert schema_of(grammar)["x-guidance"]["lenient"] is False


def test_a_schema_that_is_not_strict_may_have_parts_that_cannot_be_enforced() -> None:
    wrapped = {"name": "answer", "schema": SCHEMA, "strict": False}
    grammar = chat(response_format={"type": "json_schema", "json_schema": wrapped})
    assert schema_of(grammar)["x-guidance"]["lenient"] is True


@pytest.mark.parametrize("ask", [chat, completion])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("json", SCHEMA),
        ("json", json.dumps(SCHEMA)),
        ("regex", "a+"),
        ("choice", ["a", "b"]),
        ("grammar", 'start: "a"'),
        ("grammar", 'root ::= "a"'),
    ],
)
def test_structured_outputs_are_a_grammar_on_both_endpoints(
    ask: Any, name: str, value: object
) -> None:
    grammar = ask(structured_outputs={name: value})
    assert grammar.param == f"structured_outputs.{name}"
    assert grammar.is_gbnf == ("::=" in str(value))


def test_the_order_of_properties_is_the_clients() -> None:
    names = ["z", "a", "m"]
    schema = {"type": "object", "properties": {name: {} for name in names}}
    kept = schema_of(completion(structured_outputs={"json": schema}))
    assert list(kept["properties"]) == names


def test_a_clients_own_options_for_the_library_are_not_heard() -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_pattern": ".*"}}
    grammar = completion(structured_outputs={"json": schema})
    assert schema_of(grammar)["x-guidance"]["whitespace_pattern"] != ".*"


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("structured_outputs", {"structured_outputs": {}}),
    ("structured_outputs", {"structured_outputs": {"json": {}, "regex": "a"}}),
    ("structured_outputs", {"structured_outputs": {"choice": ["a"], "grammar": "a"}}),
    ("structured_outputs", {"structured_outputs": {"whatever": 1}}),
    ("structured_outputs.json", {"structured_outputs": {"json": 1}}),
    ("structured_outputs.json", {"structured_outputs": {"json": "[]"}}),
    ("structured_outputs.json", {"structured_outputs": {"json": "{"}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": ""}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": ["a"]}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": []}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": [""]}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": " \n"}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": '{"grammars": []}'}}),
    ("min_tokens", {"structured_outputs": {"regex": "a"}, "min_tokens": 1}),
    ("ignore_eos", {"structured_outputs": {"regex": "a"}, "ignore_eos": True}),
    ("guided_json", {"guided_json": {}}),
    ("guided_regex", {"guided_regex": "a"}),
    ("guided_choice", {"guided_choice": ["a"]}),
    ("guided_grammar", {"guided_grammar": "a"}),
]
WRONG_IN_CHATS: list[tuple[str, dict[str, Any]]] = [
    ("response_format", {"response_format": {"type": "json_schema"}}),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {}}}),
    ("response_format", {"response_format": {"type": "text", "more": 1}}),
    ("response_format.type", {"response_format": {"type": "xml"}}),
    (
        "structured_outputs",
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
    ),
]


@pytest.mark.parametrize(("param", "fields"), WRONG + WRONG_IN_CHATS)
def test_what_is_wrong_is_named(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(("param", "fields"), WRONG)
def test_what_is_wrong_is_named_for_completions(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert caught.value.param == param


def test_options_that_ask_for_nothing_contradict_nothing() -> None:
    fields = {"min_tokens": 0, "ignore_eos": False, "response_format": {"type": "text"}}
    assert chat(structured_outputs={"regex": "a"}, **fields) is not None


def test_a_model_that_cannot_end_an_answer_cannot_follow_a_grammar() -> None:
    endless = ModelTraits(name="tiny", vocab_size=128, max_model_len=256)
    body = {"prompt": "x", "structured_outputs": {"regex": "a"}}
    with pytest.raises(InvalidRequest) as caught:
        parse_completion(json.dumps(body).encode(), endless)
    assert caught.value.param == "structured_outputs.regex"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_schemas_may_be_deep_but_not_too_deep() -> None:
    assert json_grammar(nested(30), param="p")
    for depth in (200, 20_000):
        with pytest.raises(InvalidRequest, match="nested more than"):
            json_grammar(nested(depth), param="p")


@pytest.mark.parametrize(
    "make",
    [
        lambda: json_grammar({"enum": [f"v{i}" for i in range(20_000)]}, param="p"),
        lambda: json_grammar(
            {"properties": {f"property {i}": {"type": "integer"} for i in range(3_000)}}, param="p"
        ),
        lambda: regex_grammar("a" * (GRAMMAR_BYTES_MAX + 1), param="p"),
        lambda: lark_or_gbnf_grammar("#" * (GRAMMAR_BYTES_MAX + 1), param="p"),
        lambda: choice_grammar([f"{i:030}" for i in range(CHOICES_MAX)], param="p"),
        lambda: choice_grammar(["a"] * (CHOICES_MAX + 1), param="p"),
        lambda: choice_grammar(["a" * (CHOICE_BYTES_MAX + 1)], param="p"),
    ],
)
def test_what_is_too_large_is_refused_unread(make: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make()
    assert caught.value.param == "p"


@given(st.lists(st.text(min_size=1), min_size=1, max_size=20))
def test_choices_make_one_rule_whatever_is_in_them(choices: list[str]) -> None:
    grammar = choice_grammar(choices, param="p")
    assert len(grammar.text.splitlines()) == 2


@given(st.text(min_size=1, max_size=200))
def test_a_regular_expression_stays_between_its_slashes(regex: str) -> None:
    [part] = json.loads(regex_grammar(regex, param="p").text)["grammars"]
    _, _, rule = part["lark_grammar"].partition("REGEX: ")
    assert rule.startswith("/")
    assert rule.endswith("/")
    assert not {"\n", "\r"} & set(rule)
    inside = rule[1:-1]
    bare = inside.replace("\\\\", "").replace("\\/", "")
    assert "/" not in bare
