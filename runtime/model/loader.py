"""From a Hugging Face model directory to a model that runs.

Checks everything that can be checked before the first weight is read: config, headers, names,
shapes, memory. Fails with one line a problem. Knows the names that transformers gives to tensors;
nothing else in the system does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.checkpoint import Checkpoint
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.layers import Linear
from understudy.runtime.model.memory import available_memory
from understudy.runtime.model.numerics import Numerics
from understudy.runtime.model.transformer import LayerWeights, ModelWeights, Transformer

Progress = Callable[[int, int], None]
"""Called with the bytes of weights read so far and their total."""

_MIB: Final = 1 << 20
_PROBLEMS_MAX: Final = 8
"""Missing or unexpected tensors come by the hundred; so many are named."""
_IGNORED_SUFFIXES: Final = (".rotary_emb.inv_freq",)
"""Old checkpoints store what we compute."""


class _Part(NamedTuple):
    """A tensor of the checkpoint, and the shape that the config gives it."""

    name: str
    shape: tuple[int, ...]


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    numerics: Numerics = "exact",
    progress: Progress | None = None,
) -> Transformer:
    """Load a model.

    Raises:
        ConfigurationError: The directory is no model, not a supported one, or damaged, or the
            memory does not suffice: what was needed, what there is, what to set.
    """
    if dtype not in {torch.float32, torch.bfloat16}:
        raise ConfigurationError(f"dtype {dtype} is not supported; supported: float32, bfloat16")
    config = ModelConfig.from_directory(directory)
    checkpoint = Checkpoint.open(directory)
    _check_tensors(directory, config, checkpoint)
    bytes_total = sum(checkpoint.tensors[name].num_bytes for name in _expected_parts(config))
    needed = _weight_bytes(config, dtype)
    _check_memory(directory, needed, device)
    reader = _Reader(checkpoint, dtype, device, _Meter(bytes_total, progress))
    try:
        with torch.inference_mode():
            weights = _model_weights(config, reader)
            return Transformer(config, weights, numerics=numerics)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(directory, needed, device) from error
    except RuntimeError as error:
        # The CPU's allocator has no exception class of its own.
        if "can't allocate memory" not in str(error):
            raise
        raise _out_of_memory(directory, needed, device) from error


def default_dtype(device: torch.device) -> torch.dtype:
    """What ``dtype="auto"`` means: bfloat16 where the hardware multiplies it, else float32.

    Without such instructions bfloat16 is emulated, and three times slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\nflags")[2]
    features = flags.partition("\n")[0].split()
    return torch.bfloat16 if {"amx_bf16", "avx512_bf16"} & set(features) else torch.float32


class _Meter:
    """Counts what was read, and tells whoever wants to know."""

    def __init__(self, bytes_total: int, progress: Progress | None) -> None:
        self._bytes_total = bytes_total
        self._bytes_done = 0
        self._progress = progress

    def add(self, num_bytes: int) -> None:
        self._bytes_done += num_bytes
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)


class _Reader:
    """Reads tensors of the checkpoint into weights of one dtype on one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        meter: _Meter,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._meter = meter

    def tensor(self, *parts: _Part) -> Tensor:
        """Several tensors as one, joined along their first dimension."""
        num_rows = sum(part.shape[0] for part in parts)
        tensor = torch.empty(
            (num_rows, *parts[0].shape[1:]), dtype=self._dtype, device=self._device
        )
        slices = torch.split(tensor, [part.shape[0] for part in parts])
        for part, into in zip(parts, slices, strict=True):
            self._checkpoint.read(part.name, into)
            self._meter.add(self._checkpoint.tensors[part.name].num_bytes)
        return tensor

    def linear(self, weights: list[_Part], biases: list[_Part]) -> Linear:
        """One matrix from several, with their biases if there are any."""
        return Linear(self.tensor(*weights), self.tensor(*biases) if biases else None)


class _LayerParts:
    """The tensors of one layer, by their names in the checkpoint."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        prefix = f"model.layers.{index}."
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        projections = (
            (f"{attention}q_proj", queries),
            (f"{attention}k_proj", keys),
            (f"{attention}v_proj", keys),
        )
        self.attention_norm = _Part(f"{prefix}input_layernorm.weight", (hidden,))
        self.mlp_norm = _Part(f"{prefix}post_attention_layernorm.weight", (hidden,))
        self.qkv = [_Part(f"{name}.weight", (size, hidden)) for name, size in projections]
        self.qkv_bias = (
            [_Part(f"{name}.bias", (size,)) for name, size in projections]
            if config.attention_bias
            else []
        )
        self.qk_norm = (
            [
                _Part(f"{attention}{name}.weight", (config.head_dim,))
                for name in ("q_norm", "k_norm")
            ]
            if config.qk_norm
            else []
        )
        self.output = [_Part(f"{attention}o_proj.weight", (hidden, queries))]
        self.output_bias = (
            [_Part(f"{attention}o_proj.bias", (hidden,))] if config.attention_output_bias else []
        )
        gates = (f"{mlp}gate_proj", f"{mlp}up_proj")
        self.gate_up = [_Part(f"{name}.weight", (inner, hidden)) for name in gates]
        self.down = [_Part(f"{mlp}down_proj.weight", (hidden, inner))]
        self.gate_up_bias = (
            [_Part(f"{name}.bias", (inner,)) for name in gates] if config.mlp_bias else []
        )
        self.down_bias = [_Part(f"{mlp}down_proj.bias", (hidden,))] if config.mlp_bias else []

    def __iter__(self) -> Iterator[_Part]:
        yield from (self.attention_norm, self.mlp_norm)
        yield from (*self.qkv, *self.qkv_bias, *self.qk_norm, *self.output, *self.output_bias)
        yield from (*self.gate_up, *self.gate_up_bias, *self.down, *self.down_bias)


def _outer_parts(config: ModelConfig) -> tuple[_Part, _Part, _Part]:
    """Embedding, last norm and output embedding; tied, the last is the first again."""
    shape = (config.vocab_size, config.hidden_size)
    embedding = _Part("model.embed_tokens.weight", shape)
    head = embedding if config.tie_word_embeddings else _Part("lm_head.weight", shape)
    return embedding, _Part("model.norm.weight", (config.hidden_size,)), head


def _model_weights(config: ModelConfig, reader: _Reader) -> ModelWeights:
    embedding_part, norm_part, head_part = _outer_parts(config)
    embedding = reader.tensor(embedding_part)
    layers = tuple(
        _layer_weights(config, _LayerParts(config, index), reader)
        for index in range(config.num_layers)
    )
    norm = reader.tensor(norm_part)
    if config.tie_word_embeddings:
        return ModelWeights(embedding, layers, norm, Linear(embedding, None))
    return ModelWeights(embedding, layers, norm, reader.linear([head_part], []))


def _layer_weights(config: ModelConfig, parts: _LayerParts, reader: _Reader) -> LayerWeights:
    qk_norm = None
    if parts.qk_norm:
        query_norm, key_norm = reader.tensor(*parts.qk_norm).view(2, config.head_dim)
        qk_norm = torch.cat(
            (
                query_norm.expand(config.num_heads, -1),
                key_norm.expand(config.num_kv_heads, -1),
            )
        )
    return LayerWeights(
        attention_norm=reader.tensor(parts.attention_norm),
        qkv=reader.linear(parts.qkv, parts.qkv_bias),
        qk_norm=qk_norm,
        attention_output=reader.linear(parts.output, parts.output_bias),
        mlp_norm=reader.tensor(parts.mlp_norm),
        gate_up=reader.linear(parts.gate_up, parts.gate_up_bias),
        down=reader.linear(parts.down, parts.down_bias),
    )


def _expected_parts(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    parts = dict(_outer_parts(config))
    for index in range(config.num_layers):
        parts.update(_LayerParts(config, index))
    return parts


def _check_tensors(directory: Path, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Compare the names and shapes that are there with those that the config asks for."""
    expected = _expected_parts(config)
    found = checkpoint.tensors
    missing = [f"{directory}: tensor {name} is missing" for name in expected if name not in found]
    wrong = [
        f"{found[name].path}: {name} has shape {list(found[name].shape)}, "
        f"config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unexpected = [
        f"{stored.path}: unexpected tensor {name}"
        for name, stored in found.items()
        if name not in expected and name not in ignored and not name.endswith(_IGNORED_SUFFIXES)
    ]
    problems = [
        line for kind in (missing, wrong, unexpected) for line in _first_lines(kind, directory)
    ]
    if problems:
        raise ConfigurationError(*problems)


def _first_lines(problems: list[str], directory: Path) -> list[str]:
    rest = len(problems) - _PROBLEMS_MAX
    shown = problems[:_PROBLEMS_MAX]
    return [*shown, f"{directory}: {rest} more like the last one"] if rest > 0 else shown


def _weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that the loaded weights take; a tied output embedding is laid out a second time."""
    sizes = [torch.Size(shape).numel() for shape in _expected_parts(config).values()]
    if config.tie_word_embeddings:
        sizes.append(config.vocab_size * config.hidden_size)
    return sum(sizes) * dtype.itemsize


def _check_memory(directory: Path, needed: int, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
    if needed > available:
        raise _out_of_memory(directory, needed, device, available)


def _out_of_memory(
    directory: Path, needed: int, device: torch.device, available: int | None = None
) -> ConfigurationError:
    there_is = "" if available is None else f", {available // _MIB} MiB are available"
    return ConfigurationError(
        f"{directory}: out of memory on {device.type}: the weights need {needed // _MIB} MiB"
        f"{there_is}; set --dtype bfloat16 or choose a smaller model"
    )
