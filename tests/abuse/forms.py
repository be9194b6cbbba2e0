"""Values for JSON schemas: such as a client would send, and such as nobody should."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

Schema: TypeAlias = Mapping[str, Any]
Place: TypeAlias = tuple[Any, Any]
"""A container, and the key or index of a value in it."""

DEPTH_MAX: Final = 6
_KINDS: Final = (
    *("text", "input_text", "output_text", "message", "function", "function_call", "custom"),
    *("function_call_output", "reasoning", "tool_use", "tool_result", "thinking", "image_url"),
)
_WORDS: Final = ("a", "def f(x):", "hello", "for line in ", "{}", "größe 😀", "1", "x" * 40)
_SMALL: Final = ("tokens", "_tokens", "top_logprobs", "logprobs", "n", "best_of", "index")
_SCHEMAS: Final[tuple[Any, ...]] = (
    {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    {"enum": ["a", 1, None]},
    {},
)

NUMBERS: Final[tuple[Any, ...]] = (
    *(0, -1, 1, 17, 2**15, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**40),
    *(-(2**31) - 1, -(2**63), -(2**63) - 1, 0.0, -0.0, 1e-320, 1.5, -1.5, 1e308, -1e308),
)
TEXTS: Final[tuple[str, ...]] = (
    *(
        "",
        " ",
        "\x00",
        "\n\r\n",
        "\u202e\u2066x",
        "\ufeff",
        "\ufffe",
        "\U0010ffff",
        "e\u0301" * 300,
    ),
    *("../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x", "${jndi:ldap://x}"),
    *("{{ 7*7 }}", "{% for x in range(10**9) %}{% endfor %}", "{{''.__class__.__mro__}}"),
    *("<|im_start|>system\n", "<|endoftext|>", "<tool_call>{", "</think>", "[TOOL_CALLS]["),
    *(
        "' OR 1=1 --",
        "$(id)",
        "`id`",
        "%s%n%x",
        "\\u0000",
        "(a+)+$",
        "(?=a)*",
        "[" * 400,
        "(" * 400,
    ),
    *("0", "-1", "1e999", "NaN", "true", "null", "none", "auto", "required", "\u0661\u0662"),
)
CONTAINERS: Final[tuple[Any, ...]] = (
    *([], [[]], {}, [None], [{}], [[[]]], {"": None}, {"a": {}}, {"type": []}, {"type": 1}),
    *({"$ref": "#"}, {"$ref": "http://127.0.0.1:1/"}, {"type": "object", "properties": []}),
    *({"type": "string", "pattern": "(a|a)*$"}, {"allOf": [{"$ref": "#"}]}, {"minItems": 10**9}),
    *({"type": "array", "minItems": 50_000, "maxItems": 60_000}, {"enum": []}, {"const": 1e308}),
    *({"type": "function"}, {"type": "function", "function": {"name": ""}}, {"role": "user"}),
    *([{"role": "tool", "content": "x"}], [{"role": "assistant", "content": None}], [-1], ["", ""]),
)
SIMPLE: Final[tuple[Any, ...]] = (None, True, False)


class Forms:
    """Draws values for the schemas of one document.

    Args:
        definitions: The schemas that others refer to, by name.
        chance: Where all draws come from.
    """

    def __init__(self, definitions: Mapping[str, Schema], chance: random.Random) -> None:
        self._definitions = definitions
        self._chance = chance

    def plausible(self, schema: Schema, name: str = "", depth: int = 0) -> Any:
        """A value that the schema allows, and that costs an engine little."""
        chance = self._chance
        if "$ref" in schema:
            schema = self._definitions[str(schema["$ref"]).rpartition("/")[2]]
        if "anyOf" in schema:
            kinds = [one for one in schema["anyOf"] if one.get("type") != "null"]
            return self.plausible(chance.choice(kinds), name, depth)
        if "enum" in schema:
            return chance.choice(schema["enum"])
        if "allOf" in schema:
            required = [key for one in schema["allOf"] for key in one.get("required", ())]
            base = self._resolved(schema["allOf"][0])
            return self._object({**base, "required": required}, depth)
        kind = schema.get("type")
        makers: dict[Any, Callable[[], Any]] = {
            "string": lambda: self._string(name),
            "boolean": lambda: chance.random() < 0.3,
            "number": lambda: round(chance.uniform(0, 1), 3),
            "integer": lambda: self._integer(name),
            "array": lambda: self._array(schema, name, depth),
            "object": lambda: self._object(schema, depth),
        }
        return makers[kind]() if kind in makers else chance.choice(SIMPLE)

    def hostile(self) -> Any:
        """A value that hardly any field takes."""
        kinds = (NUMBERS, TEXTS, CONTAINERS, SIMPLE)
        drawn: Any = self._chance.choice(self._chance.choices(kinds, (5, 4, 4, 2))[0])
        return copy.deepcopy(drawn)  # what is drawn may be spoilt in its turn

    def deep(self) -> Any:
        """A value that is nested without need."""
        value: Any = self.hostile()
        as_list = self._chance.random() < 0.5
        for _ in range(self._chance.choice((20, 100, 400))):
            value = [value] if as_list else {"a": value}
        return value

    def long(self) -> Any:
        """A value of a great many parts."""
        count = self._chance.choice((100, 1000, 20_000))
        return self._chance.choice(
            (
                "x" * 10 * count,
                "🦊" * count,
                [1] * count,
                ["x"] * count,
                [[]] * count,
                {str(number): number for number in range(count)},
                [{"role": "user", "content": "x"}] * (count // 10),
            )
        )

    def _resolved(self, schema: Schema) -> Schema:
        if "$ref" in schema:
            return self._definitions[str(schema["$ref"]).rpartition("/")[2]]
        return schema

    def _string(self, name: str) -> str:
        if name == "type":
            return self._chance.choice(_KINDS)
        if name == "model":
            return "understudy-demo"
        if name in {"id", "call_id", "tool_call_id", "tool_use_id"}:
            return f"call_{self._chance.randrange(3)}"
        if name == "arguments":
            return self._chance.choice(("{}", '{"a": 1}', "{"))
        return self._chance.choice(_WORDS)

    def _integer(self, name: str) -> int:
        if name == "deadline_ms":
            return self._chance.choice((1, 50, 5000))
        if name.endswith(_SMALL):
            return self._chance.randint(1, 5)
        return self._chance.randint(0, 90)

    def _array(self, schema: Schema, name: str, depth: int) -> list[Any]:
        count = 1 if depth > 2 else self._chance.choice((1, 1, 2, 3))
        inner = schema.get("items", {})
        return [self.plausible(inner, name, depth + 1) for _ in range(count)]

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        chance = self._chance
        properties = schema.get("properties")
        if properties is None:
            extra = schema.get("additionalProperties")
            if isinstance(extra, Mapping):
                return {str(chance.randint(3, 90)): self.plausible(extra, "", depth + 1)}
            return copy.deepcopy(dict(chance.choice(_SCHEMAS)))
        required = set(schema.get("required", ()))
        probability = 0.12 if len(properties) > 8 else 0.5
        return {
            key: self.plausible(inner, key, depth + 1)
            for key, inner in properties.items()
            if key in required or (depth < DEPTH_MAX and chance.random() < probability)
        }


def places(value: Any) -> Iterator[Place]:
    """Every place in a JSON value where another could stand."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield value, key
            yield from places(child)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield value, index
            yield from places(child)
