"""From a Hugging Face model directory to a model that runs.

Checks everything that can be checked before the first weight is read: config, headers, names,
shapes, memory. Fails with one line a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.checkpoint import Checkpoint
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.formats import check_weights, keeps_fp8, kv_dtype_of
from understudy.runtime.model.layers import Linear
from understudy.runtime.model.linears import kept_dtype, make_linear
from understudy.runtime.model.memory import available_memory
from understudy.runtime.model.native.library import native_library
from understudy.runtime.model.numerics import Numerics
from understudy.runtime.model.out_of_memory import telling_out_of_memory
from understudy.runtime.model.packed_cache import PackedCache
from understudy.runtime.model.parts import LayerParts, Part, all_parts, matrices_of, outer_parts
from understudy.runtime.model.quantization_config import (
    CheckpointQuantization,
    KVCacheDtype,
    Quantization,
    WeightFormat,
)
from understudy.runtime.model.quantized_checkpoint import (
    FLOATS,
    StoredPart,
    Weight,
    join,
    read_matrix,
    stored_parts,
)
from understudy.runtime.model.transformer import LayerWeights, ModelWeights, Transformer
from understudy.runtime.processor import processor_features
from understudy.runtime.scheduling.decision import OutOfMemory

Progress = Callable[[int, int], None]
"""Called with the bytes of weights read so far and their total."""

_MIB: Final = 1 << 20
_PROBLEMS_MAX: Final = 8
"""Missing or unexpected tensors come by the hundred; so many are named."""
_IGNORED_SUFFIXES: Final = (".rotary_emb.inv_freq",)
"""Old checkpoints store what we compute."""


_INT4_BYTES: Final = 0.625
"""Of a 4-bit weight, with its share of the scale and offset of a group of 32."""
_KINDS: Final[Mapping[WeightFormat, Quantization | None]] = MappingProxyType(
    {
        "int-quantized": "int8",
        "pack-quantized": "int4",
        "gptq": "int4",
        "awq": "int4",
        "float-quantized": None,
    }
)
"""What a stored form runs as; ``None`` is floating point, and may be quantised."""


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    numerics: Numerics = "exact",
    quantization: Quantization = "none",
    kv_cache_dtype: KVCacheDtype = "auto",
    progress: Progress | None = None,
) -> Transformer:
    """Load a model; ``quantization`` is of matrices that the checkpoint has in floating point.

    With ``kv_cache_dtype`` "int8" or "fp8" keys and values are kept in 8 bits, with a scale for
    each head.

    Raises:
        ConfigurationError: The directory is no model, not a supported one, or damaged, or the
            memory does not suffice: what was needed, what there is, what to set.
    """
    if dtype not in {torch.float32, torch.bfloat16}:
        raise ConfigurationError(f"dtype {dtype} is not supported; supported: float32, bfloat16")
    config = ModelConfig.from_directory(directory)
    check_weights(directory, config.quantization, quantization, device)
    kv_dtype = kv_dtype_of(config, kv_cache_dtype, dtype, device)
    checkpoint = Checkpoint.open(directory)
    bytes_total = _check_tensors(directory, config, checkpoint)
    stored = checkpoint.tensors[outer_parts(config)[0].name].dtype
    kept = kept_dtype(stored, dtype=dtype, device=device)
    has_fp8 = keeps_fp8(config.quantization, quantization, device)
    needed = _weight_bytes(config, kept, quantization, has_fp8=has_fp8)
    _check_memory(directory, needed, device)
    making = _Making(dtype, device, quantization, config.quantization, has_fp8)
    library = native_library(device, dtype)
    packed = None if library is None else PackedCache.of(directory, quantization, library)
    reader = _Reader(directory, checkpoint, making, _Meter(bytes_total, progress), packed)
    try:
        with telling_out_of_memory(), torch.inference_mode():
            weights = _model_weights(config, reader)
            if packed is not None:
                packed.keep()
            return Transformer(config, weights, numerics=numerics, kv_dtype=kv_dtype)
    except OutOfMemory as error:
        raise _out_of_memory(directory, needed, device) from error


def default_dtype(device: torch.device) -> torch.dtype:
    """What ``dtype="auto"`` means: bfloat16 where the hardware multiplies it, else float32.

    Without such instructions bfloat16 is emulated, and three times slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_products = {"amx_bf16", "avx512_bf16"} & processor_features()
    return torch.bfloat16 if has_products else torch.float32


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


class _Making(NamedTuple):
    """What the weights are to become, and what the checkpoint has made of them."""

    dtype: torch.dtype
    device: torch.device
    quantization: Quantization
    stored: CheckpointQuantization | None
    keeps_fp8: bool


class _Reader:
    """Reads tensors of the checkpoint into weights on one device."""

    def __init__(
        self,
        directory: Path,
        checkpoint: Checkpoint,
        making: _Making,
        meter: _Meter,
        packed: PackedCache | None,
    ) -> None:
        self._directory = directory
        self._checkpoint = checkpoint
        self._making = making
        self._meter = meter
        self._packed = packed

    def tensor(self, *parts: Part) -> Tensor:
        """Several tensors as one, joined along their first dimension."""
        return self._joined(parts, self._making.dtype)

    def matrix(self, *parts: Part) -> Tensor:
        """The same, in the dtype that a matrix is kept in."""
        making = self._making
        stored = {self._checkpoint.tensors[part.name].dtype for part in parts}
        widest = stored.pop() if len(stored) == 1 else making.dtype
        return self._joined(parts, kept_dtype(widest, dtype=making.dtype, device=making.device))

    def _joined(self, parts: tuple[Part, ...], dtype: torch.dtype) -> Tensor:
        device = self._making.device
        if len(parts) == 1 and self._checkpoint.tensors[parts[0].name].dtype == dtype:
            self._meter.add(self._checkpoint.tensors[parts[0].name].num_bytes)
            return self._checkpoint.stored(parts[0].name).to(device)
        num_rows = sum(part.shape[0] for part in parts)
        tensor = torch.empty((num_rows, *parts[0].shape[1:]), dtype=dtype, device=device)
        slices = torch.split(tensor, [part.shape[0] for part in parts])
        for part, into in zip(parts, slices, strict=True):
            self._checkpoint.read(part.name, into)
            self._meter.add(self._checkpoint.tensors[part.name].num_bytes)
        return tensor

    def linear(self, weights: list[Part], biases: list[Part]) -> Linear:
        """One matrix from several, with their biases if there are any."""
        bias = self.tensor(*biases) if biases else None
        kept = self._kept(weights, bias)
        if kept is not None:
            stored = [self._checkpoint.tensors.get(part.name) for part in weights]
            self._meter.add(sum(each.num_bytes for each in stored if each is not None))
            return kept
        try:
            return self._linear(weights[0].name, self._weight(weights), bias)
        except ValueError as error:
            raise ConfigurationError(f"{self._directory}: {weights[0].module}: {error}") from error

    def _weight(self, parts: list[Part]) -> Weight:
        stored = self._making.stored
        if stored is None or not stored.covers(parts[0].module):
            return self.matrix(*parts)
        return join([self._matrix(stored, part) for part in parts])

    def _kept(self, parts: list[Part], bias: Tensor | None) -> Linear | None:
        """A linear as an earlier start laid it out."""
        if self._packed is None:
            return None
        outputs = sum(part.shape[0] for part in parts)
        packed = self._packed.get(parts[0].name, outputs, parts[0].shape[1])
        return None if packed is None else self._packed.linear(packed, bias)

    def lm_head(self, part: Part, tied: Tensor | None) -> Linear:
        """The output embedding; int8 is the least that it is quantised to.

        It decides directly about each token, and in 4 bits it would cost more quality than all
        other matrices; fp8 is coarser than int8, too. ``tied`` is the input embedding, if that is
        this one as well.
        """
        making = self._making
        if making.quantization in {"int4", "fp8"}:
            making = making._replace(quantization="int8")
        reader = _Reader(self._directory, self._checkpoint, making, self._meter, self._packed)
        if tied is None:
            return reader.linear([part], [])
        return reader._kept([part], None) or reader._linear(part.name, tied, None)

    def _matrix(self, stored: CheckpointQuantization, part: Part) -> Weight:
        keeps_fp8 = self._making.keeps_fp8
        weight = read_matrix(self._checkpoint, stored, part.module, part.shape, keeps_fp8=keeps_fp8)
        for each in stored_parts(stored, part.module, part.shape):
            if each.name in self._checkpoint.tensors:
                self._meter.add(self._checkpoint.tensors[each.name].num_bytes)
        return weight

    def _linear(self, name: str, weight: Weight, bias: Tensor | None) -> Linear:
        making, packed = self._making, self._packed
        return make_linear(
            weight,
            bias,
            quantization=making.quantization,
            dtype=making.dtype,
            device=making.device,
            keep=None if packed is None else partial(packed.add, name),
        )


def _model_weights(config: ModelConfig, reader: _Reader) -> ModelWeights:
    embedding_part, norm_part, head_part = outer_parts(config)
    embedding = reader.matrix(embedding_part)
    layers = tuple(
        _layer_weights(config, LayerParts(config, index), reader)
        for index in range(config.num_layers)
    )
    norm = reader.tensor(norm_part)
    tied = embedding if config.tie_word_embeddings else None
    return ModelWeights(embedding, layers, norm, reader.lm_head(head_part, tied))


def _layer_weights(config: ModelConfig, parts: LayerParts, reader: _Reader) -> LayerWeights:
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


def _expected_parts(config: ModelConfig) -> Iterator[StoredPart]:
    """What the checkpoint must or may have; raise ConfigurationError if it cannot be quantised."""
    stored = config.quantization
    quantized: set[str] = set()
    problems = []
    for parts in matrices_of(config) if stored is not None else ():
        assert stored is not None
        covered = [part for part in parts if stored.covers(part.module)]
        if covered and covered != parts:
            names = ", ".join(part.module for part in parts)
            problems.append(f"quantization_config: all or none of {names} must be quantised")
        for part in covered:
            quantized.add(part.name)
            try:
                yield from stored_parts(stored, part.module, part.shape)
            except ValueError as error:
                problems.append(f"quantization_config: {part.module}: {error}")
    if problems:
        raise ConfigurationError(*_first_lines(problems, "quantization_config"))
    for part in all_parts(config):
        if part.name not in quantized:
            yield StoredPart(part.name, (part.shape,), FLOATS)


def _check_tensors(directory: Path, config: ModelConfig, checkpoint: Checkpoint) -> int:
    """Compare the tensors that are there with those that the config asks for.

    Returns the bytes of all that will be read.
    """
    try:
        expected = {part.name: part for part in _expected_parts(config)}
    except ConfigurationError as error:
        raise ConfigurationError(*(f"{directory}: {line}" for line in error.problems)) from error
    found = checkpoint.tensors
    missing = [
        f"{directory}: tensor {part.name} is missing"
        for part in expected.values()
        if part.is_required and part.name not in found
    ]
    there = [(part, found[part.name]) for part in expected.values() if part.name in found]
    wrong = [
        f"{stored.path}: {part.name} has shape {list(stored.shape)}, "
        f"config.json asks for {list(part.shapes[0])}"
        for part, stored in there
        if stored.shape not in part.shapes
    ]
    wrong += [
        f"{stored.path}: {part.name} is of {stored.dtype}, config.json asks for "
        + " or ".join(map(str, part.dtypes))
        for part, stored in there
        if stored.dtype not in part.dtypes
    ]
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    ignored |= _zero_biases(config, checkpoint, expected.keys())
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
    return sum(stored.num_bytes for _, stored in there)


def _zero_biases(
    config: ModelConfig, checkpoint: Checkpoint, expected: Collection[str]
) -> set[str]:
    """Biases that GPTQ's tools write for linears that have none; they are zero, and are checked."""
    if config.quantization is None or config.quantization.format != "gptq":
        return set()
    names = (f"{part.module}.bias" for parts in matrices_of(config) for part in parts)
    extra = [name for name in names if name in checkpoint.tensors and name not in expected]
    return {name for name in extra if not bool(checkpoint.stored(name).any())}


def _first_lines(problems: list[str], place: object) -> list[str]:
    rest = len(problems) - _PROBLEMS_MAX
    shown = problems[:_PROBLEMS_MAX]
    return [*shown, f"{place}: {rest} more like the last one"] if rest > 0 else shown


def _weight_bytes(
    config: ModelConfig, dtype: torch.dtype, quantization: Quantization, *, has_fp8: bool
) -> int:
    """Bytes that the loaded weights take; a tied output embedding is laid out a second time."""
    matrices = {part for parts in matrices_of(config) for part in parts}
    head = outer_parts(config)[2]
    others = [part for part in all_parts(config) if part not in matrices]
    num_bytes = sum(torch.Size(part.shape).numel() for part in others) * dtype.itemsize
    for part in {*matrices, head}:
        stored = config.quantization
        if stored is not None and stored.covers(part.module) and part in matrices:
            kind = _KINDS[stored.format] or ("fp8" if has_fp8 else quantization)
        else:
            kind = "int8" if part == head and quantization == "int4" else quantization
        bytes_each = {"none": dtype.itemsize, "int8": 1, "fp8": 1, "int4": _INT4_BYTES}[kind]
        num_bytes += int(torch.Size(part.shape).numel() * bytes_each)
    return num_bytes


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
        f"{there_is}; set --dtype bfloat16 or --quantization int8, or choose a smaller model"
    )
