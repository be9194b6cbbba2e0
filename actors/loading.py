"""What an engine process loads before it joins: a model, or the echo that stands in for one."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.cache import remove_unused
from understudy.runtime.config import EngineConfig
from understudy.runtime.echo import EchoRunner
from understudy.runtime.grammar_masks import GrammarMasks
from understudy.runtime.grammars import Grammars, load_vocabulary
from understudy.runtime.kit.clock import Clock
from understudy.runtime.log import get_logger
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.encoder_config import EncoderConfig, read_config
from understudy.runtime.model.packed_path import fetch_early
from understudy.runtime.model.torch_import import postponing
from understudy.runtime.processor import cores_of
from understudy.runtime.scheduling.decision import OutOfMemory, Runner
from understudy.runtime.scheduling.speculation import Speculator

if TYPE_CHECKING:
    from understudy.runtime.model.runner import ModelRunner
    from understudy.runtime.model.transformer import Transformer

HOST_MEMORY_SHARE: Final = 0.5
"""Of the memory that is available, what all engines of a machine together give to KV caches."""
PROGRESS_EVERY: Final = 0.25
"""How much of a checkpoint is loaded between two reports."""


class Loaded(NamedTuple):
    """A runner, and the limits that come with it."""

    runner: Runner
    max_model_len: int
    num_blocks: int
    numerics: str
    """The class of the numerics: runners of one class make the same bits."""
    speculator: Speculator | None = None
    pools_only: bool = False
    """It makes vectors and no tokens, and has no keys and values to share."""


def load_runner(config: EngineConfig, clock: Clock) -> Loaded:
    """Load what the configuration names.

    Raises:
        ConfigurationError: the model directory is none, or does not fit the machine.
    """
    model_config = read_config(config.model)
    max_model_len = config.max_model_len or model_config.max_model_len
    if max_model_len > model_config.max_model_len:
        raise ConfigurationError(
            f"max-model-len {max_model_len} is beyond what the model reaches:"
            f" {model_config.max_model_len}"
        )
    if config.engine == "echo":
        return _load_echo(config, model_config, max_model_len, clock)
    if isinstance(model_config, EncoderConfig):
        return _load_encoder(config, max_model_len)
    loaded = _load_model(config, max_model_len, clock)
    with suppress(OSError):  # what cannot be tidied up harms nobody
        remove_unused()
    return loaded


def _load_echo(
    config: EngineConfig,
    model_config: ModelConfig | EncoderConfig,
    max_model_len: int,
    clock: Clock,
) -> Loaded:
    rate = config.echo_tokens_per_s
    runner = EchoRunner(
        clock,
        vocab_size=model_config.vocab_size,
        reserved=model_config.eos_token_ids,
        hidden_size=model_config.hidden_size,
        step_s=1 / rate if rate else 0.0,
    )
    pools_only = isinstance(model_config, EncoderConfig)
    return Loaded(
        runner, max_model_len, _blocks_unused(config, max_model_len), "echo", pools_only=pools_only
    )


def _blocks_unused(config: EngineConfig, max_model_len: int) -> int:
    """Blocks for who keeps no keys and values: as many as a batch can ever use."""
    return config.max_num_seqs * -(-max_model_len // config.block_size)


def _load_encoder(config: EngineConfig, max_model_len: int) -> Loaded:
    with postponing():
        import torch

    from understudy.runtime.model.encoder import load_encoder
    from understudy.runtime.model.encoder_runner import EncoderRunner
    from understudy.runtime.model.exactness import numerics_class

    unfit = {
        "quantization": config.quantization != "none",
        "kv-cache-dtype": config.kv_cache_dtype != "auto",
        "speculative-config": config.speculative_config is not None,
    }
    if any(unfit.values()):
        raise ConfigurationError(
            *[
                f"{config.model}: --{name} is not for encoders; leave it out"
                for name in unfit
                if unfit[name]
            ]
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(_device(config, has_cuda=torch.cuda.is_available()))
    # Their vectors are compared with those of others, so precision comes before speed.
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    encoder = load_encoder(config.model, dtype=dtype, device=device)
    get_logger().info(
        "encoder is loaded",
        model=config.model.name,
        architecture=encoder.config.architecture,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    numerics = numerics_class(config.model, dtype=dtype, device=device, numerics="exact")
    num_blocks = _blocks_unused(config, max_model_len)
    return Loaded(EncoderRunner(encoder), max_model_len, num_blocks, numerics, pools_only=True)


def _load_model(config: EngineConfig, max_model_len: int, clock: Clock) -> Loaded:
    reading = _read_early(config)
    with postponing():  # here and not above: an engine without a model needs no torch
        import torch

    from understudy.actors.speculation import load_speculator
    from understudy.runtime.model.exactness import numerics_class, prove_exactness_once
    from understudy.runtime.model.kv_cache import blocks_that_fit
    from understudy.runtime.model.loader import default_dtype, load_model
    from understudy.runtime.model.runner import ModelRunner

    device = _device(config, has_cuda=torch.cuda.is_available())
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_to_cores(config, device)
    torch_device = torch.device(device)
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype)
    dtype = named or default_dtype(torch_device)
    if reading is not None:
        reading.join()  # what is mapped meanwhile does not count as memory that is left
    model = load_model(
        config.model,
        dtype=dtype,
        device=torch_device,
        numerics=config.numerics,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        progress=_Progress(config.model.name),
    )
    size = blocks_that_fit(
        model.config,
        block_size=config.block_size,
        dtype=model.kv_dtype,
        device=torch_device,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory=config.kv_cache_memory,
        memory_share=HOST_MEMORY_SHARE / config.data_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        step_bytes=_step_bytes(config, model),
    )
    if size.warning is not None:
        # A sequence that outgrew the cache would end early, by an accident of this engine's
        # memory. A shorter context, known to all, is the honest limit.
        if config.max_model_len is not None:
            raise ConfigurationError(size.warning)
        max_model_len = size.num_blocks * config.block_size
        get_logger().warning(size.warning, max_model_len=max_model_len)
    numerics = numerics_class(
        config.model,
        dtype=dtype,
        device=torch_device,
        numerics=config.numerics,
        quantization=config.quantization,
        kv_dtype=model.kv_dtype,
    )
    if config.numerics == "exact":
        prove_exactness_once(model, block_size=config.block_size, name=numerics)
    threads = torch.get_num_threads()
    _report_loaded(config, model.config, device, dtype, threads=threads, kv_cache=size.reason)
    grammars = Grammars(lambda: load_vocabulary(config.model))
    masks = GrammarMasks(grammars, report=_report_grammar)
    runner = ModelRunner(
        model, num_blocks=size.num_blocks, block_size=config.block_size, grammar_masks=masks
    )
    _warm_up(config, runner)
    speculator = load_speculator(config, model, runner, grammars, clock, numerics=numerics)
    return Loaded(runner, max_model_len, size.num_blocks, numerics, speculator)


def _read_early(config: EngineConfig) -> threading.Thread | None:
    """Have the disk read while torch is imported, where that is of use: for the CPU's kernels."""
    if config.device == "cuda" or config.dtype == "bfloat16":
        return None
    return fetch_early(config.model, config.quantization)


def _step_bytes(config: EngineConfig, model: Transformer) -> int:
    """Of a GPU's memory, what has to be left for steps, if nobody has said what is for keys."""
    if model.device.type != "cuda" or config.kv_cache_memory is not None:
        return 0
    from understudy.runtime.model.step_profile import largest_step_bytes

    try:
        return largest_step_bytes(
            model,
            block_size=config.block_size,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
        )
    except OutOfMemory as error:
        raise ConfigurationError(
            f"a step of {config.max_num_batched_tokens} tokens does not fit the GPU's memory beside"
            " the weights: lower --max-num-batched-tokens or --max-num-seqs"
        ) from error


def _warm_up(config: EngineConfig, runner: ModelRunner) -> None:
    try:
        runner.warm_up(config.max_num_seqs)
    except OutOfMemory as error:
        raise ConfigurationError(
            f"graphs of {config.max_num_seqs} sequences do not fit the GPU's memory beside weights"
            " and KV cache: lower --gpu-memory-utilization or --max-num-seqs"
        ) from error


def _report_loaded(
    config: EngineConfig,
    model_config: ModelConfig,
    device: str,
    dtype: object,
    *,
    threads: int,
    kv_cache: str,
) -> None:
    get_logger().info(
        "model is loaded",
        model=config.model.name,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        quantization=_quantization_shown(config, model_config),
        numerics=config.numerics,
        threads=threads,
        kv_cache=kv_cache,
    )


def keep_to_cores(config: EngineConfig, device: str) -> None:
    """Have this thread, and those that it starts, keep to the engine's own cores, if any are."""
    if device != "cpu" or config.threads is None:
        return  # threads that nobody has counted are for all the cores
    cores = cores_of(
        config.name,
        num_engines=config.data_parallel_size,
        threads=config.threads,
        available=os.sched_getaffinity(0),
    )
    if cores is not None:
        os.sched_setaffinity(0, cores)
        get_logger().info("threads keep to cores", cores=sorted(cores))


def _report_grammar(request_id: int, error: str) -> None:
    """Say that a grammar failed: how, but nothing of what it says."""
    # Behind the kind of error stands its message, which may quote the grammar.
    get_logger().warning("a grammar failed", request_id=request_id, error=error.partition(":")[0])


def _quantization_shown(config: EngineConfig, model_config: ModelConfig) -> str:
    stored = model_config.quantization
    return config.quantization if stored is None else stored.format


def _device(config: EngineConfig, *, has_cuda: bool) -> str:
    if config.device == "cuda" and not has_cuda:
        raise ConfigurationError("--device cuda: this machine's torch sees no GPU")
    if config.device == "auto":
        return "cuda" if has_cuda else "cpu"
    return config.device


class _Progress:
    """Reports the loading of a checkpoint, a quarter at a time."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._report_at = PROGRESS_EVERY

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        share = bytes_done / max(bytes_total, 1)
        if share >= self._report_at:
            self._report_at = share // PROGRESS_EVERY * PROGRESS_EVERY + PROGRESS_EVERY
            get_logger().info(
                "loading weights", model=self._model, percent=round(100 * share), of=bytes_total
            )
