"""What the schemas of the table are put together from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Schema = dict[str, Any]

INTEGER: Final[Schema] = {"type": "integer"}
SHORT: Final[Schema] = {"type": "string", "maxLength": 8}


def closed(*, optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these properties and no others."""
    return closed_of(properties, optional=optional)


def closed_of(properties: Mapping[str, Schema], *, optional: tuple[str, ...] = ()) -> Schema:
    """The same, where names are no identifiers."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }
