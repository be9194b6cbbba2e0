"""How a model directory wants its vectors made: what sentence-transformers wrote beside it.

Imports no torch, so that the gateway may use it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import PoolingKind
from understudy.runtime.model.config import ModelConfig, read_json_object, shown
from understudy.runtime.model.encoder_config import EncoderConfig

_JSON_BYTES_MAX: Final = 1 << 20
_POOLING_FOLDER: Final = "1_Pooling"
_FOLDER_FORM: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HARMLESS: Final = frozenset({"Transformer", "Normalize"})
"""Modules that change nothing: every vector is brought to length 1 here."""
_MODES: Final[Mapping[str, PoolingKind]] = MappingProxyType(
    {
        "cls": PoolingKind.CLS,
        "mean": PoolingKind.MEAN,
        "lasttoken": PoolingKind.LAST,
    }
)
_MODE_FIELD: Final = re.compile(r"pooling_mode_(\w+?)(?:_tokens?)?")


def pooling_of(directory: Path, config: ModelConfig | EncoderConfig) -> PoolingKind:
    """How the prompts of a model become vectors, from its own files if there are any.

    Raises:
        ConfigurationError: they ask for what is not supported.
    """
    is_encoder = isinstance(config, EncoderConfig)
    if isinstance(config, EncoderConfig) and config.has_score_head:
        return PoolingKind.SCORE
    folder = _pooling_folder(directory / "modules.json")
    path = directory / folder / "config.json"
    if not path.is_file():
        return PoolingKind.MEAN if is_encoder else PoolingKind.LAST
    kind = _mode(path)
    if kind is PoolingKind.CLS and not is_encoder:
        raise ConfigurationError(f"{path}: the first token of a decoder sees nothing of the text")
    return kind


def _pooling_folder(path: Path) -> str:
    """Where the pooling is described, and that nothing else is to be done."""
    if not path.is_file():
        return _POOLING_FOLDER
    found = _POOLING_FOLDER
    for module in _modules(path):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            found = str(module.get("path"))
            if not _FOLDER_FORM.fullmatch(found):
                raise ConfigurationError(f"{path}: path {shown(found)} is no folder's name")
        elif kind not in _HARMLESS:
            raise ConfigurationError(f"{path}: the module {shown(kind)} is not supported")
    return found


def _modules(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise ConfigurationError(f"{path}: larger than {_JSON_BYTES_MAX} bytes")
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise ConfigurationError(f"{path}: must be a JSON array of objects")
    return modules


def _mode(path: Path) -> PoolingKind:
    """The one mode that is on."""
    values = read_json_object(path)
    named = values.get("pooling_mode")
    modes = [named] if named is not None else []
    for name, value in values.items():
        match = _MODE_FIELD.fullmatch(name)
        if match is not None and value is True:
            modes.append(match[1])
    if len(modes) != 1 or modes[0] not in _MODES:
        asked = ", ".join(map(shown, modes)) or "nothing"
        raise ConfigurationError(
            f"{path}: pooling {asked} is not supported; supported: {', '.join(_MODES)}"
        )
    return _MODES[modes[0]]
