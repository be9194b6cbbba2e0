"""JSON schemas of whole forms, as applications ask for them. Written for this table."""

from __future__ import annotations

from collections.abc import Iterator

from tests.conformance.words import SHORT, Schema, closed


def records() -> Iterator[tuple[str, Schema]]:
    """One thing each."""
    yield (
        "person",
        closed(
            optional=("email",),
            name={"type": "string", "minLength": 1, "maxLength": 20},
            age={"type": "integer", "minimum": 0, "maximum": 150},
            email={"type": "string", "format": "email"},
        ),
    )
    yield (
        "sentiment",
        closed(
            label={"enum": ["positive", "negative", "neutral"]},
            confidence={"type": "number", "minimum": 0, "maximum": 1},
        ),
    )
    yield (
        "tool call",
        closed(
            name={"enum": ["get_weather", "get_time"]},
            arguments=closed(optional=("unit",), city=SHORT, unit={"enum": ["C", "F"]}),
        ),
    )
    yield (
        "order",
        closed(
            id={"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
            lines={
                "type": "array",
                "items": closed(
                    product=SHORT,
                    count={"type": "integer", "minimum": 1, "maximum": 99},
                    price={"type": "number", "minimum": 0, "maximum": 1000},
                ),
                "minItems": 1,
                "maxItems": 2,
            },
            is_paid={"type": "boolean"},
        ),
    )
    yield (
        "steps and an answer",
        closed(
            steps={
                "type": "array",
                "items": closed(explanation={"type": "string", "maxLength": 20}, output=SHORT),
                "maxItems": 2,
            },
            final_answer=SHORT,
        ),
    )


def listings() -> Iterator[tuple[str, Schema]]:
    """Several things, and what is about them."""
    yield (
        "calendar event",
        closed(
            title=SHORT,
            date={"type": "string", "format": "date"},
            participants={"type": "array", "items": SHORT, "maxItems": 3},
        ),
    )
    yield (
        "questions",
        {
            "type": "array",
            "items": closed(
                question={"type": "string", "maxLength": 15},
                choices={"type": "array", "items": SHORT, "minItems": 2, "maxItems": 2},
                answer={"enum": [0, 1]},
            ),
            "minItems": 1,
            "maxItems": 2,
        },
    )
    yield (
        "extraction",
        closed(
            entities={
                "type": "array",
                "items": closed(
                    text=SHORT,
                    kind={"enum": ["PERSON", "PLACE", "DATE"]},
                    start={"type": "integer", "minimum": 0, "maximum": 9999},
                ),
                "maxItems": 2,
            }
        ),
    )


def sheets() -> Iterator[tuple[str, Schema]]:
    """Things in fields of other things."""
    yield (
        "settings",
        closed(
            optional=("proxy",),
            host={"type": "string", "format": "ipv4"},
            port={"type": "integer", "minimum": 1, "maximum": 65535},
            level={"enum": ["debug", "info", "error"]},
            proxy={"anyOf": [closed(url={"enum": ["http://proxy"]}), {"type": "null"}]},
        ),
    )
    yield (
        "table",
        closed(
            columns={"type": "array", "items": SHORT, "minItems": 2, "maxItems": 2},
            rows={
                "type": "array",
                "items": {
                    "type": "array",
                    "items": {"type": ["integer", "null"]},
                    "minItems": 2,
                    "maxItems": 2,
                },
                "maxItems": 2,
            },
        ),
    )
    yield (
        "review",
        closed(
            rating={"type": "integer", "minimum": 1, "maximum": 5},
            pros={"type": "array", "items": SHORT, "maxItems": 2},
            cons={"type": "array", "items": SHORT, "maxItems": 2},
            would_buy_again={"type": "boolean"},
        ),
    )
