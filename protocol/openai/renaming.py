"""Errors about a field that another endpoint calls by another name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from understudy.protocol.errors import InvalidRequest


@contextmanager
def params_named(names: Mapping[str, str]) -> Iterator[None]:
    """Have errors name the client's fields, not those that they were translated to.

    Args:
        names: The client's by ours. A field of a tool loses its ``function`` on the way.
    """
    try:
        yield
    except InvalidRequest as error:
        if error.param is not None:
            head = error.param.partition("[")[0].partition(".")[0]
            renamed = names.get(head, head) + error.param[len(head) :]
            error.param = renamed.replace("].function", "]") if head == "tools" else renamed
        raise
