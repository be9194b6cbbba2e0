"""JSON schemas as applications write them, and their keywords one by one and together.

Written for this table. Each is within what the library can enforce; the name says what it is about.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.conformance.forms import listings, records, sheets
from tests.conformance.words import INTEGER, SHORT, Schema, closed, closed_of


def table() -> dict[str, Schema]:
    """All schemas by name."""
    schemas: dict[str, Schema] = {}
    for group in (
        _scalars,
        _strings,
        _numbers,
        _arrays,
        _objects,
        _objects_within,
        _unions,
        _references,
        records,
        listings,
        sheets,
    ):
        for name, schema in group():
            assert name not in schemas, name
            schemas[name] = schema
    return schemas


def _scalars() -> Iterator[tuple[str, Schema]]:
    for kind in ("string", "integer", "number", "boolean", "null"):
        yield f"root {kind}", {"type": kind}
        yield f"{kind} in an object", closed(value={"type": kind})
        yield f"{kind} or null", closed(value={"type": [kind, "null"]} if kind != "null" else {})
    constants = [
        "text",
        'with "quotes"',
        "Größe 🦊",
        7,
        -1,
        2.5,
        True,
        None,
        [1, "a"],
        {"a": {"b": 1}},
    ]
    for index, constant in enumerate(constants):
        yield f"constant {index}", closed(value={"const": constant})
    yield "enum of texts", closed(value={"enum": ["red", "green", "blue"]})
    yield "enum with common beginnings", closed(value={"enum": ["a", "ab", "abc", "abd"]})
    yield "enum of many kinds", closed(value={"enum": [1, "1", None, True, [], {}]})
    yield "enum of escapes", closed(value={"enum": ["\n", "\t", "\\", '"', "/", "\u0001"]})
    yield "enum of one", {"enum": ["only"]}
    yield "enum of hundreds", closed(value={"enum": [f"value {i}" for i in range(300)]})
    yield "typed enum", closed(value={"type": "string", "enum": ["x", "y", 3]})


def _strings() -> Iterator[tuple[str, Schema]]:
    for least, most in ((0, 0), (1, 1), (0, 5), (3, 3), (5, 20), (0, 100)):
        schema = {"type": "string", "minLength": least, "maxLength": most}
        yield f"text of {least} to {most}", closed(value=schema)
    yield "long enough text", closed(value={"type": "string", "minLength": 10})
    patterns = [
        "^[a-z]+$", "^[A-Z]{2,3}$", r"^\d{3}-\d{4}$", "^(yes|no|maybe)$", "^a", "z$", "mid",
        r"^[0-9a-f]{8}$", r"^\+?[0-9 ]{5,12}$", "^[^x]{1,5}$", "^(ab|cd){1,3}e?$",
        r"^\w+@\w+\.com$", r"^#[0-9a-fA-F]{6}$", "^[äöü]{1,3}$", r"^v[0-9]+(\.[0-9]+){0,2}$",
        "^.{2,4}$",
    ]  # fmt: skip
    for pattern in patterns:
        yield f"pattern {pattern}", closed(value={"type": "string", "pattern": pattern})
    yield (
        "pattern and length",
        closed(value={"type": "string", "pattern": "^[a-z]*$", "minLength": 2, "maxLength": 6}),
    )
    for form in ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "uri"):
        yield f"format {form}", closed(value={"type": "string", "format": form})


def _numbers() -> Iterator[tuple[str, Schema]]:
    ranges = [
        (0, 9), (1, 100), (-5, 5), (-100, -10), (0, 255), (1000, 1000), (7, 123456), (-1, 0),
        (0, 10**12), (99, 101),
    ]  # fmt: skip
    for least, most in ranges:
        schema = {"type": "integer", "minimum": least, "maximum": most}
        yield f"integer {least} to {most}", closed(value=schema)
    yield "integer above", closed(value={"type": "integer", "exclusiveMinimum": 10})
    yield "integer below", closed(value={"type": "integer", "exclusiveMaximum": -3})
    yield "integer at least", closed(value={"type": "integer", "minimum": 18})
    yield (
        "integer between",
        closed(value={"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 5}),
    )
    yield "number 0 to 1", closed(value={"type": "number", "minimum": 0, "maximum": 1})
    yield (
        "number between",
        closed(value={"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 2.5}),
    )
    yield "number at most", closed(value={"type": "number", "maximum": 3.75})
    yield "multiple of 5", closed(value={"type": "integer", "multipleOf": 5})
    yield (
        "multiple of 3 within",
        closed(value={"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 99}),
    )


def _arrays() -> Iterator[tuple[str, Schema]]:
    for kind in ("string", "integer", "number", "boolean"):
        items = {"type": kind, "maxLength": 6} if kind == "string" else {"type": kind}
        yield f"list of {kind}", {"type": "array", "items": items, "maxItems": 4}
        yield (
            f"list of {kind} in an object",
            closed(values={"type": "array", "items": items, "maxItems": 3}),
        )
    for least, most in ((0, 0), (1, 1), (2, 2), (2, 5), (0, 3)):
        yield (
            f"list of {least} to {most}",
            closed(
                values={
                    "type": "array",
                    "items": {"enum": [1, 2, 3]},
                    "minItems": least,
                    "maxItems": most,
                }
            ),
        )
    yield (
        "list of at least two",
        closed(values={"type": "array", "items": {"type": "boolean"}, "minItems": 2}),
    )
    pair = [{"type": "integer", "maximum": 999, "minimum": 0}, SHORT]
    yield (
        "pair",
        closed(value={"type": "array", "prefixItems": pair, "items": False, "minItems": 2}),
    )
    yield (
        "pair and more",
        closed(
            value={"type": "array", "prefixItems": pair, "items": {"type": "null"}, "maxItems": 4}
        ),
    )
    yield (
        "list of lists",
        {
            "type": "array",
            "items": {
                "type": "array",
                "items": {"enum": ["x", "o", " "]},
                "minItems": 3,
                "maxItems": 3,
            },
            "minItems": 3,
            "maxItems": 3,
        },
    )
    yield (
        "list of objects",
        closed(
            people={
                "type": "array",
                "items": closed(name=SHORT, age={"enum": [1, 2]}),
                "maxItems": 2,
            }
        ),
    )
    yield "list of anything", {"type": "array", "maxItems": 2}


def _objects() -> Iterator[tuple[str, Schema]]:
    for count in (1, 2, 5, 12, 25):
        names = {f"field_{i}": {"type": "boolean"} for i in range(count)}
        yield f"{count} fields", closed_of(names)
        yield f"{count} fields that may be missing", closed_of(names, optional=tuple(names))
    yield "empty object", closed()
    yield "anything", {"type": "object"}
    yield (
        "half of the fields required",
        closed(
            optional=("b", "d"), a=INTEGER, b={"type": "null"}, c={"type": "boolean"}, d=INTEGER
        ),
    )
    yield (
        "keys with spaces and more",
        closed_of(
            {
                "a b": {"type": "null"},
                'q"q': {"type": "null"},
                "ü": {"type": "null"},
                "/": INTEGER,
            }
        ),
    )
    yield (
        "keys with common beginnings",
        closed(optional=("a", "aa", "aaa"), a=INTEGER, aa=INTEGER, aaa=INTEGER),
    )
    yield "map to integers", {"type": "object", "additionalProperties": {"enum": [0, 1]}}
    yield (
        "map beside a field",
        {
            "type": "object",
            "properties": {"id": {"enum": [1, 2]}},
            "required": ["id"],
            "additionalProperties": {"type": "boolean"},
        },
    )
    yield (
        "open object",
        {
            "type": "object",
            "properties": {"a": {"enum": ["x"]}},
            "required": ["a"],
        },
    )
    yield "required without properties", {"type": "object", "required": ["a"]}


def _objects_within() -> Iterator[tuple[str, Schema]]:
    for depth in (2, 4, 8, 16):
        schema: Schema = {"enum": [True]}
        for _ in range(depth):
            schema = closed(inner=schema)
        yield f"{depth} deep", schema
    yield (
        "titles and other words",
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": "https://example.com/thing",
            "title": "Thing",
            "description": "A thing.",
            "default": {"a": 1},
            "examples": [{"a": 2}],
            **closed(a={"type": "integer", "title": "A", "description": "Its a.", "default": 1}),
        },
    )
    yield (
        "matching keys",
        {
            "type": "object",
            "patternProperties": {"^[a-c]$": {"enum": [0, 1]}},
            "additionalProperties": False,
        },
    )


def _unions() -> Iterator[tuple[str, Schema]]:
    yield "either of two kinds", closed(value={"anyOf": [SHORT, {"type": "integer"}]})
    yield (
        "either of three objects",
        {
            "anyOf": [
                closed(a={"enum": [1]}),
                closed(b={"enum": [2]}),
                closed(c={"type": "boolean"}),
            ]
        },
    )
    yield "optional by null", closed(value={"anyOf": [closed(x=INTEGER), {"type": "null"}]})
    yield "one of kinds apart", closed(value={"oneOf": [{"type": "boolean"}, {"type": "null"}]})
    tagged = [closed(kind={"const": tag}, size=INTEGER) for tag in ("circle", "square")]
    yield "one of tagged objects", closed(shape={"oneOf": tagged})
    yield "any of tagged objects", closed(shape={"anyOf": tagged})
    yield (
        "list of tagged objects",
        {
            "type": "array",
            "items": {"anyOf": tagged},
            "minItems": 1,
            "maxItems": 2,
        },
    )
    yield "several types", closed(value={"type": ["boolean", "null", "integer"]})
    yield "all of one", closed(value={"allOf": [{"type": "integer", "minimum": 3}]})
    yield (
        "all of two ranges",
        closed(value={"type": "integer", "allOf": [{"minimum": 3}, {"maximum": 30}]}),
    )
    yield (
        "all of two objects",
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]},
                {"type": "object", "properties": {"b": {"enum": [2]}}, "required": ["b"]},
            ],
        },
    )
    yield (
        "all with a reference",
        {
            "$defs": {"base": {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}},
            "allOf": [{"$ref": "#/$defs/base"}],
            "properties": {"b": {"type": "boolean"}},
            "required": ["b"],
        },
    )
    yield (
        "nested unions",
        closed(
            value={"anyOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"anyOf": [{"const": "x"}]}]}
        ),
    )


def _references() -> Iterator[tuple[str, Schema]]:
    point = closed(x=INTEGER, y=INTEGER)
    yield "definition", {"$defs": {"point": point}, **closed(at={"$ref": "#/$defs/point"})}
    yield (
        "old definitions",
        {
            "definitions": {"point": point},
            **closed(at={"$ref": "#/definitions/point"}),
        },
    )
    yield (
        "definition used twice",
        {
            "$defs": {"point": point},
            **closed(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
        },
    )
    yield (
        "chain of definitions",
        {
            "$defs": {
                "a": {"$ref": "#/$defs/b"},
                "b": {"$ref": "#/$defs/c"},
                "c": {"enum": ["end"]},
            },
            **closed(value={"$ref": "#/$defs/a"}),
        },
    )
    tree = closed(
        optional=("left", "right"),
        value={"enum": [1, 2, 3]},
        left={"$ref": "#/$defs/tree"},
        right={"$ref": "#/$defs/tree"},
    )
    yield "tree", {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}
    yield (
        "linked list",
        {
            "$defs": {
                "node": closed(
                    value={"type": "boolean"},
                    next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                )
            },
            "$ref": "#/$defs/node",
        },
    )
    yield (
        "nested lists of itself",
        {
            "$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}, "maxItems": 2}},
            "$ref": "#/$defs/list",
        },
    )
    yield (
        "reference to the root",
        closed(optional=("child",), name={"enum": ["a", "b"]}, child={"$ref": "#"}),
    )
    yield (
        "reference into properties",
        {
            **closed(a=point, b={"$ref": "#/properties/a"}),
        },
    )
