"""How the weights of a checkpoint are quantised, from the ``quantization_config`` of its config.

Understands compressed-tensors, GPTQ and AWQ, as far as ``quantized_checkpoint`` reads them; what it
does not understand is refused with one line, since ignoring it would change the output. Imports no
torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from understudy.protocol.errors import ConfigurationError

Quantization = Literal["none", "int8", "int4", "fp8"]
"""What is done at load to weights that are stored in floating point."""

KVCacheDtype = Literal["auto", "int8", "fp8"]
"""What keys and values are kept in; ``auto`` is the dtype that the model computes in."""

WeightFormat = Literal["int-quantized", "pack-quantized", "float-quantized", "gptq", "awq"]

_METHODS: Final = ("compressed-tensors", "gptq", "awq")
_GROUP_SIZE_MAX: Final = 1 << 17


@dataclass(frozen=True, slots=True)
class CheckpointQuantization:
    """The form in which a checkpoint keeps its matrices."""

    format: WeightFormat
    group_size: int | None = None
    """Inputs that share a scale; ``None``: all of a row."""
    is_symmetric: bool = True
    """There are no zero points."""
    is_per_tensor: bool = False
    """The whole matrix has one scale."""
    is_weight_only: bool = False
    """Rows are to be multiplied as they are, though the matrix has 8 bits."""
    ignored: tuple[str, ...] = ()
    """Modules that are not quantised: names, or patterns after ``re:``."""

    def covers(self, module: str) -> bool:
        """Whether a module's matrix is quantised."""
        if module == "lm_head" and self.format in {"gptq", "awq"}:
            return False
        return not any(_names(pattern, module) for pattern in self.ignored)


def checkpoint_quantization(value: object) -> CheckpointQuantization:
    """Understand a ``quantization_config``.

    Raises:
        ConfigurationError: one line, what is not supported.
    """
    if not isinstance(value, dict):
        raise ConfigurationError("must be an object")
    match value.get("quant_method"):
        case "compressed-tensors":
            return _compressed_tensors(value)
        case "gptq":
            return _gptq(value)
        case "awq":
            return _awq(value)
        case other:
            raise ConfigurationError(
                f"quant_method {other!r:.60} is not supported; supported: {', '.join(_METHODS)}"
            )


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern == module


def _compressed_tensors(value: Mapping[str, Any]) -> CheckpointQuantization:
    groups = value.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ConfigurationError("config_groups must have one group for all linears")
    (group,) = groups.values()
    if not isinstance(group, dict):
        raise ConfigurationError("config_groups must hold objects")
    _require(group, "targets", ["Linear"])
    weights = _section(group, "weights")
    _require(weights, "dynamic", False, None)
    _require(value, "kv_cache_scheme", None, {})
    _require(value, "transform_config", None, {})
    sparsity = value.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise ConfigurationError("sparsity_config is not supported")
    ignored = _ignored(value.get("ignore"))
    name = group.get("format") or value.get("format")
    match name:
        case "int-quantized":
            _require_values(weights, num_bits=8, type="int", strategy="channel", symmetric=True)
            activations = _section(group, "input_activations")
            _require_values(
                activations, num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True
            )
            return CheckpointQuantization("int-quantized", ignored=ignored)
        case "pack-quantized":
            return _pack_quantized(group, weights, ignored)
        case "float-quantized":
            _require_values(weights, num_bits=8, type="float", symmetric=True)
            _require(weights, "strategy", "channel", "tensor")
            return CheckpointQuantization(
                "float-quantized",
                is_per_tensor=weights.get("strategy") == "tensor",
                is_weight_only=group.get("input_activations") is None,
                ignored=ignored,
            )
        case _:
            raise ConfigurationError(
                f"format {name!r:.60} is not supported; supported: "
                "int-quantized, pack-quantized, float-quantized"
            )


def _pack_quantized(
    group: Mapping[str, Any], weights: Mapping[str, Any], ignored: tuple[str, ...]
) -> CheckpointQuantization:
    _require(group, "input_activations", None)
    _require_values(weights, num_bits=4, type="int")
    _require(weights, "strategy", "group", "channel")
    _require(weights, "actorder", None, "static", "weight")
    group_size = None
    if weights.get("strategy") == "group":
        group_size = _group_size(weights.get("group_size"))
    is_symmetric = _flag(weights, "symmetric", default=True)
    return CheckpointQuantization("pack-quantized", group_size, is_symmetric, ignored=ignored)


def _gptq(value: Mapping[str, Any]) -> CheckpointQuantization:
    _require_values(value, bits=4)
    _require(value, "desc_act", False, None)
    _require(value, "checkpoint_format", "gptq", None)
    _require(value, "is_marlin_format", False, None)
    _require(value, "lm_head", False, None)
    _require(value, "dynamic", None, {})
    return CheckpointQuantization("gptq", _group_size(value.get("group_size")), is_symmetric=False)


def _awq(value: Mapping[str, Any]) -> CheckpointQuantization:
    bits = "w_bit" if "w_bit" in value else "bits"
    _require_values(value, **{bits: 4})
    version = value.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise ConfigurationError(f"version {version!r:.60} is not supported; supported: 'gemm'")
    _require(value, "zero_point", True, None)
    size = value.get("q_group_size", value.get("group_size"))
    ignored = _ignored(value.get("modules_to_not_convert"))
    # AWQ names parts of a name, wherever they stand in it.
    patterns = tuple(f"re:.*{re.escape(name)}" for name in ignored)
    return CheckpointQuantization("awq", _group_size(size), is_symmetric=False, ignored=patterns)


def _section(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = value.get(name)
    if not isinstance(section, dict):
        raise ConfigurationError(f"{name} must be an object")
    return section


def _require_values(value: Mapping[str, Any], **wanted: object) -> None:
    for name, one in wanted.items():
        _require(value, name, one)


def _require(value: Mapping[str, Any], name: str, *supported: object) -> None:
    """Refuse any value but these; that of an absent name is ``None``."""
    found = value.get(name)
    # True equals 1 to Python, and not to a config.
    if not any(type(found) is type(one) and found == one for one in supported):
        known = " or ".join(repr(one) for one in supported if one is not None)
        known = known or "none"
        raise ConfigurationError(f"{name} {found!r:.60} is not supported; supported: {known}")


def _flag(value: Mapping[str, Any], name: str, *, default: bool) -> bool:
    found = value.get(name, default)
    if not isinstance(found, bool):
        raise ConfigurationError(f"{name} must be true or false, got {found!r:.60}")
    return found


def _group_size(value: object) -> int | None:
    if value == -1:
        return None
    if type(value) is not int or not 1 <= value <= _GROUP_SIZE_MAX:
        raise ConfigurationError(f"group_size must be a number from 1, or -1, got {value!r:.60}")
    return value


def _ignored(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigurationError("the list of modules that are not quantised must hold names")
    for pattern in value:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ConfigurationError(
                    f"ignore: {pattern!r:.60} is no pattern: {error}"
                ) from error
    return tuple(value)
