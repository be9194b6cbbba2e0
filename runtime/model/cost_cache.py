"""Keeps cost tables between starts: measuring one takes as long as the steps that it is about."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

from understudy.runtime.cache import cache_directory, is_ours, note_use
from understudy.runtime.log import get_logger
from understudy.runtime.scheduling.speculation import CostTable

_POINTS_MAX: Final = 1000
_BYTES_MAX: Final = 1 << 20


def remembered_costs(name: str, measure: Callable[[], tuple[CostTable, ...]]) -> list[CostTable]:
    """What an earlier start measured under this name; else it is measured, and kept.

    ``name`` holds all that costs depend on: the model, the form of its weights, the machine. Where
    nothing can be kept, each start measures.
    """
    try:
        path = cache_directory() / f"costs-{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
        if is_ours(path):
            note_use(path)
            kept = _read(path)
            if kept is not None:
                return kept
    except OSError as error:
        get_logger().warning(f"costs of steps cannot be kept: {error}")
        return list(measure())
    tables = list(measure())
    _write(path, tables)
    return tables


def _read(path: Path) -> list[CostTable] | None:
    """The tables of a file; None if it holds anything else."""
    try:
        tables = json.loads(path.read_bytes()[:_BYTES_MAX])
        if not isinstance(tables, list) or not tables:
            return None
        return [CostTable(_checked(points)) for points in tables]
    except (ValueError, TypeError):
        return None


def _checked(points: object) -> list[tuple[int, float]]:
    if not isinstance(points, list) or not 0 < len(points) <= _POINTS_MAX:
        raise ValueError
    checked = [(int(tokens), float(seconds)) for tokens, seconds in points]
    if not all(tokens > 0 and 0 <= s < math.inf for tokens, s in checked):
        raise ValueError
    return checked


def _write(path: Path, tables: list[CostTable]) -> None:
    made = path.with_suffix(".new")
    try:
        made.write_text(json.dumps([table.points for table in tables]), encoding="utf-8")
        made.chmod(0o600)
        made.replace(path)
    except OSError as error:
        get_logger().warning(f"costs of steps cannot be kept: {error}")
