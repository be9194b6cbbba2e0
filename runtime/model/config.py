"""What a model directory says about its model: shapes, rope, end tokens, default sampling.

Reads ``config.json`` and ``generation_config.json`` of a Hugging Face directory and nothing else.
Imports no torch, so that the supervisor, the gateway and the command line may use it. No value is
trusted: every number is checked against a range, and all problems are reported at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.quantization_config import (
    CheckpointQuantization,
    checkpoint_quantization,
)

SUPPORTED_ARCHITECTURES: Final = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_JSON_BYTES_MAX: Final = 4 << 20
CHECKPOINT_DTYPES: Final = ("float32", "float16", "bfloat16")
_QWEN3_HEAD_DIM: Final = 128
"""What a Qwen3 config means when it names no ``head_dim``."""


@dataclass(frozen=True, slots=True)
class LinearRopeScaling:
    """Positions divided by ``factor`` (kaiokendev, "Extending context is hard", 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Long wavelengths divided by ``factor``, short ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnRopeScaling:
    """YaRN (Peng et al., arXiv:2309.00071), with the options that published checkpoints use.

    ``attention_factor`` multiplies cosines and sines; it is already resolved from ``mscale`` and
    ``mscale_all_dim`` or from the paper's formula.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling that ``generation_config.json`` recommends; ``None`` where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama or Qwen family, fully described."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    """The projections to queries, keys and values have a bias."""
    attention_output_bias: bool
    """The projection of the attention's output has a bias."""
    mlp_bias: bool
    qk_norm: bool
    """Queries and keys are normalised head by head before rope (Qwen3)."""
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    """Union of config.json's and generation_config.json's, ascending."""
    bos_token_id: int | None
    sampling: SamplingDefaults
    dtype: str | None
    """What the checkpoint was saved in: float32, float16, bfloat16, or unknown."""
    quantization: CheckpointQuantization | None = None
    """How the checkpoint's matrices are quantised, if they are."""

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head (grouped-query attention)."""
        return self.num_heads // self.num_kv_heads

    @property
    def max_model_len(self) -> int:
        """The longest context the positions reach; yarn's reach counts where it is longer."""
        if isinstance(self.rope_scaling, YarnRopeScaling):
            scaling = self.rope_scaling
            reach = int(scaling.original_max_position_embeddings * scaling.factor)
            return max(self.max_position_embeddings, reach)
        return self.max_position_embeddings

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Read a model directory; raise ConfigurationError with every problem found."""
        fields = config_fields(path)
        generation_path = path / "generation_config.json"
        generation = ConfigFields(
            generation_path, read_json_object(generation_path) if generation_path.is_file() else {}
        )
        architecture = read_architecture(fields, SUPPORTED_ARCHITECTURES)
        config = _model_config(architecture, fields, generation)
        problems = (*fields.problems, *generation.problems)
        if problems or config is None:
            raise ConfigurationError(*problems)
        return config


class ConfigFields:
    """Typed access to a JSON object; a bad value becomes a problem, not an exception.

    After a problem the access returns a harmless stand-in, so that one pass finds them all.
    """

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        *,
        prefix: str = "",
        problems: list[str] | None = None,
    ) -> None:
        self.path = path
        self.values = values
        self.prefix = prefix
        self.problems: list[str] = [] if problems is None else problems

    def problem(self, message: str) -> None:
        """Note what is wrong."""
        self.problems.append(f"{self.path}: {message}")

    def section(self, name: str) -> ConfigFields:
        """A nested object; its problems join this one's."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self.problem(f"{self.prefix}{name} must be an object, got {shown(value)}")
            value = None
        return ConfigFields(
            self.path, value or {}, prefix=f"{self.prefix}{name}.", problems=self.problems
        )

    def integer(self, name: str, least: int, most: int, *, default: int | None = None) -> int:
        """A required integer, or one with a default, in ``least .. most``."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                self.problem(f"{self.prefix}{name} is missing")
                return least
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.problem(
                f"{self.prefix}{name} must be an integer from {least} to {most}, got {shown(value)}"
            )
            return least
        return value

    def number(
        self, name: str, least: float, most: float, *, default: float | None = None
    ) -> float:
        """A required finite number, or one with a default, in ``least .. most``."""
        value = self.optional_number(name, least, most)
        if value is None:
            if default is None:
                if self.values.get(name) is None:
                    self.problem(f"{self.prefix}{name} is missing")
                return least
            return default
        return value

    def optional_number(self, name: str, least: float, most: float) -> float | None:
        """A finite number in ``least .. most``, or None where the field is absent."""
        value = self.values.get(name)
        if value is None:
            return None
        # JSON has no NaN, but Python's reader takes it; the comparison refuses it.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not least <= value <= most
        ):
            self.problem(
                f"{self.prefix}{name} must be a number from {least:g} to {most:g}, "
                f"got {shown(value)}"
            )
            return None
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(f"{self.prefix}{name} must be true or false, got {shown(value)}")
            return default
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them; absent is none."""
        value = self.values.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if (
                isinstance(token_id, bool)
                or not isinstance(token_id, int)
                or not 0 <= token_id < vocab_size
            ):
                self.problem(
                    f"{self.prefix}{name} must hold token ids below vocab_size {vocab_size}, "
                    f"got {shown(token_id)}"
                )
                return ()
        return tuple(ids)


def config_fields(path: Path) -> ConfigFields:
    """The ``config.json`` of a model directory; raise ConfigurationError if there is none."""
    if not path.is_dir():
        raise ConfigurationError(f"{path}: no such directory")
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ConfigurationError(f"{path}: not a model directory: no config.json")
    return ConfigFields(config_path, read_json_object(config_path))


def shown(value: object) -> str:
    """A value for an error message, cut to a length that leaves the message one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file; raise ConfigurationError if there is none."""
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise ConfigurationError(f"{path}: larger than {_JSON_BYTES_MAX} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path}: must be a JSON object")
    return value


def read_architecture(fields: ConfigFields, names_known: tuple[str, ...]) -> str:
    """The one architecture that the config names; any other ends the reading at once."""
    names = fields.values.get("architectures")
    supported = ", ".join(names_known)
    if not isinstance(names, list) or not names:
        raise ConfigurationError(f"{fields.path}: architectures is missing; supported: {supported}")
    if len(names) != 1 or names[0] not in names_known:
        others = ", ".join(shown(name) for name in names[:4])
        raise ConfigurationError(
            f"{fields.path}: unsupported architecture {others}; supported: {supported}"
        )
    return str(names[0])


def _model_config(
    architecture: str, fields: ConfigFields, generation: ConfigFields
) -> ModelConfig | None:
    vocab_size = fields.integer("vocab_size", 2, 1 << 24)
    hidden_size = fields.integer("hidden_size", 8, 1 << 17)
    num_heads = fields.integer("num_attention_heads", 1, 4096)
    num_kv_heads = fields.integer("num_key_value_heads", 1, 4096, default=num_heads)
    max_positions = fields.integer("max_position_embeddings", 1, 1 << 26)
    _refuse_unsupported(fields)
    if num_heads % num_kv_heads:
        fields.problem(
            f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    head_dim = _head_dim(architecture, fields, hidden_size, num_heads)
    rope = _rope_fields(fields)
    general_bias = fields.boolean("attention_bias", default=False)
    end_ids = {
        *fields.token_ids("eos_token_id", vocab_size),
        *generation.token_ids("eos_token_id", vocab_size),
    }
    bos_ids = fields.token_ids("bos_token_id", vocab_size)
    dtype = fields.values.get("dtype", fields.values.get("torch_dtype"))
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 20),
        num_layers=fields.integer("num_hidden_layers", 1, 1024),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        rope_theta=rope.number("rope_theta", 1.0, 1e15, default=10_000.0),
        rope_scaling=_rope_scaling(rope, fields, max_positions),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        attention_bias=architecture == "Qwen2ForCausalLM" or general_bias,
        attention_output_bias=architecture != "Qwen2ForCausalLM" and general_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.boolean("mlp_bias", default=False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        max_position_embeddings=max_positions,
        eos_token_ids=tuple(sorted(end_ids)),
        bos_token_id=bos_ids[0] if bos_ids else None,
        sampling=_sampling_defaults(generation),
        dtype=dtype if dtype in CHECKPOINT_DTYPES else None,
        quantization=_quantization(fields),
    )
    return None if fields.problems or generation.problems else config


def _refuse_unsupported(fields: ConfigFields) -> None:
    """Features that would silently change the output if they were ignored."""
    activation = fields.values.get("hidden_act", "silu")
    if activation != "silu":
        fields.problem(f"hidden_act {shown(activation)} is not supported; supported: silu")
    layer_types = fields.values.get("layer_types")
    windowed = isinstance(layer_types, list) and any(
        layer_type != "full_attention" for layer_type in layer_types
    )
    if windowed or fields.values.get("use_sliding_window") is True:
        fields.problem("sliding window attention is not supported")


def _quantization(fields: ConfigFields) -> CheckpointQuantization | None:
    # Checkpoints written before transformers knew compressed-tensors use the other name.
    for name in ("quantization_config", "compression_config"):
        if fields.values.get(name) is not None:
            try:
                return checkpoint_quantization(fields.values[name])
            except ConfigurationError as error:
                fields.problem(f"{name}: {error}")
    return None


def _head_dim(architecture: str, fields: ConfigFields, hidden_size: int, num_heads: int) -> int:
    if fields.values.get("head_dim") is not None:
        head_dim = fields.integer("head_dim", 2, 1024)
    elif architecture == "Qwen3ForCausalLM" and "head_dim" not in fields.values:
        head_dim = _QWEN3_HEAD_DIM
    else:
        head_dim = hidden_size // num_heads
        if hidden_size % num_heads:
            fields.problem(
                f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads} "
                "and head_dim is missing"
            )
    if head_dim % 2 or head_dim < 2:
        fields.problem(f"head_dim must be even, got {head_dim}: rope turns pairs")
    return head_dim


def _rope_fields(fields: ConfigFields) -> ConfigFields:
    """Rope's parameters in one place, from either form of config.

    The newer form nests everything in ``rope_parameters``; the older one has ``rope_theta`` beside
    a ``rope_scaling`` that may be null.
    """
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    rope = fields.section(name)
    values = dict(rope.values)
    values.setdefault("rope_theta", fields.values.get("rope_theta"))
    return ConfigFields(rope.path, values, prefix=rope.prefix, problems=rope.problems)


def _rope_scaling(
    rope: ConfigFields, fields: ConfigFields, max_positions: int
) -> RopeScaling | None:
    if rope.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        rope.problem(f"{rope.prefix}partial_rotary_factor below 1 is not supported")
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        rope.problem(
            f"{rope.prefix}rope_type {shown(kind)} is not supported; "
            "supported: default, linear, llama3, yarn"
        )
        return None
    if kind == "linear":
        return LinearRopeScaling(factor=rope.number("factor", 1.0, 1e6))
    # A value beside the rope object wins over one inside: that is how Phi3-style configs say it.
    original = fields.integer(
        "original_max_position_embeddings",
        1,
        1 << 26,
        default=rope.integer("original_max_position_embeddings", 1, 1 << 26, default=max_positions),
    )
    if kind == "llama3":
        low = rope.number("low_freq_factor", 1e-3, 1e6)
        high = rope.number("high_freq_factor", 1e-3, 1e6)
        if high <= low:
            rope.problem(f"{rope.prefix}high_freq_factor must be above low_freq_factor")
        return Llama3RopeScaling(rope.number("factor", 1.0, 1e6), low, high, original)
    return _yarn_scaling(rope, original, max_positions)


def _yarn_scaling(rope: ConfigFields, original: int, max_positions: int) -> YarnRopeScaling:
    factor = rope.number("factor", 1.0, 1e6, default=max(1.0, max_positions / original))
    mscale = rope.optional_number("mscale", 0.0, 1e3)
    mscale_all_dim = rope.optional_number("mscale_all_dim", 0.0, 1e3)

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    computed = growth(mscale) / growth(mscale_all_dim) if mscale and mscale_all_dim else growth(1.0)
    return YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor", 1e-3, 1e3, default=computed),
        beta_fast=rope.number("beta_fast", 1e-3, 1e6, default=32.0),
        beta_slow=rope.number("beta_slow", 1e-3, 1e6, default=1.0),
        truncate=rope.boolean("truncate", default=True),
    )


def _sampling_defaults(generation: ConfigFields) -> SamplingDefaults:
    top_k = generation.integer("top_k", 0, 1 << 24, default=-1)
    return SamplingDefaults(
        temperature=generation.optional_number("temperature", 0.0, 100.0),
        top_p=generation.optional_number("top_p", 0.0, 1.0),
        top_k=None if top_k < 0 else top_k,
        min_p=generation.optional_number("min_p", 0.0, 1.0),
        repetition_penalty=generation.optional_number("repetition_penalty", 1e-3, 1e3),
    )
