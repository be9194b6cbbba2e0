"""Which formats of weights, and of keys and values, a device can compute with; refuses others.

==================  =======================  =====================================
weights             CPU                      GPU
==================  =======================  =====================================
int8, int-quantized oneDNN or own kernels    Triton
int4 and its kin    yes                      no
fp8                 no                       Triton, from compute capability 8.9 on
float-quantized     as floating point        as fp8 where there is that, else so
==================  =======================  =====================================

Keys and values of 8 bits need kernels: the CPU's own for int8, Triton's for int8 and fp8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.native.attention import NativeAttention
from understudy.runtime.model.native.library import native_library
from understudy.runtime.model.operations import has_fp8_products, has_kernels
from understudy.runtime.model.quantization_config import (
    CheckpointQuantization,
    KVCacheDtype,
    Quantization,
)

_FOUR_BITS: Final = {"int4", "pack-quantized", "gptq", "awq"}


def check_weights(
    directory: Path,
    stored: CheckpointQuantization | None,
    quantization: Quantization,
    device: torch.device,
) -> None:
    """Refuse what cannot be: quantising twice, or what a device has no kernels for.

    Raises:
        ConfigurationError: one line: what is refused, and what to set.
    """
    is_integer = stored is not None and stored.format != "float-quantized"
    if quantization != "none" and stored is not None and is_integer:
        raise ConfigurationError(
            f"{directory}: --quantization {quantization}: the checkpoint is quantised already"
            f" ({stored.format}); leave the setting out"
        )
    kind = stored.format if stored is not None and is_integer else quantization
    if kind == "fp8" and not has_fp8_products(device):
        raise ConfigurationError(
            f"{directory}: --quantization fp8 needs a GPU that multiplies such numbers (compute"
            " capability 8.9 or later) and Triton; set --quantization int8"
        )
    if device.type == "cpu" or kind == "none":
        return
    if kind in _FOUR_BITS:
        raise ConfigurationError(
            f"{directory}: weights of 4 bits ({kind}) run on the CPU only; set --device cpu"
        )
    if not has_kernels(device):
        raise ConfigurationError(
            f"{directory}: quantised weights ({kind}) need Triton on a GPU; install it, or set"
            " --device cpu"
        )


def keeps_fp8(
    stored: CheckpointQuantization | None, quantization: Quantization, device: torch.device
) -> bool:
    """Whether matrices that a checkpoint has in fp8 are multiplied so; else they are widened."""
    if stored is None or stored.format != "float-quantized" or stored.is_weight_only:
        return False
    return quantization in {"none", "fp8"} and has_fp8_products(device)


def kv_dtype_of(
    config: ModelConfig, wanted: KVCacheDtype, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """What keys and values are kept in.

    Raises:
        ConfigurationError: one line: why the device has none of what is wanted.
    """
    if wanted == "auto":
        return dtype
    if wanted == "fp8":
        if not has_fp8_products(device):
            raise ConfigurationError(
                "--kv-cache-dtype fp8 needs a GPU that knows such numbers (compute capability 8.9"
                " or later) and Triton; set --kv-cache-dtype int8, or leave it out"
            )
        return torch.float8_e4m3fn
    if has_kernels(device):
        return torch.int8
    if native_library(device, dtype) is None or not NativeAttention.takes(config):
        raise ConfigurationError(
            "--kv-cache-dtype int8 needs a GPU with Triton, or the CPU's own kernels, which need a"
            " C++ compiler, a processor with AVX512-VNNI, --dtype float32 and heads of 16 to 256"
            " dimensions; leave it out"
        )
    return torch.int8
