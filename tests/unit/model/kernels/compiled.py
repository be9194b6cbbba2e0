"""Compiles every kernel for a Hopper GPU, which needs none, and prints what each one takes.

Run by ``test_compiled`` in a process of its own: where kernels are interpreted, none compiles.
"""

# No annotations from the future here and in the kernels: Triton reads them.
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from understudy.runtime.model.kernels import (
    activation,
    fp8_product,
    int8_product,
    normalisation,
    paged_attention,
    quantisation,
    rotation,
    sampling,
)

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    "bf16": "query keys values output heads qk_norm hidden delta weight added gate_and_up bias x",
    "fp32": "key_scales value_scales split_values split_peaks split_sums cosines sines x_scales"
    " weight_scales logits",
    "fp64": "temperatures top_ps log_min_ps leasts bests",
    "i32": "tile_sequences tile_first_rows starts num_tokens_of positions block_tables sums"
    " arrivals",
    "i64": "slots top_ks tokens keys_of_noise",
}
FLOATS = {"scale", "eps"}


def kernels() -> dict[str, tuple[Any, dict[str, Any], int, dict[str, str]]]:
    """By name: kernel, constants, warps, pointer types that are others than usual."""
    int8, fp8 = ({"x": kind, "weight": kind} for kind in ("i8", "fp8e4nv"))
    narrow = dict.fromkeys(("normed", "output", "values"), "fp8e4nv") | {"scales": "fp32"}
    quantised = dict.fromkeys(("normed", "output", "values"), "i8") | {"scales": "fp32"}
    shapes: dict[str, tuple[Any, dict[str, Any], int, dict[str, str]]] = {}
    for rows in (16, 64, 128):
        for dims in (128,):
            for is_split in (True, False):
                heads = {"num_kv_heads": 8, "group": 7, "head_dim": dims, "dims": dims}
                sizes = {"tile_rows": rows, "tile_keys": 64, "split_keys": 512, "block_size": 16}
                warps = paged_attention._num_warps(rows, dims, torch.bfloat16)
                for kind in ("bf16", "i8", "fp8e4nv"):
                    options = {"is_split": is_split, "num_stages": 3, "is_narrow": kind != "bf16"}
                    cached = {"keys": kind, "values": kind}
                    shapes[f"attend {rows} {dims} {is_split} {kind}"] = (
                        paged_attention._attend_kernel, heads | sizes | options, warps, cached
                    )  # fmt: skip
    # In float32 registers may spill, so this one is no wider than the bundled model's heads.
    sizes = {"tile_rows": 64, "tile_keys": 64, "split_keys": 512, "block_size": 16}
    shapes["attend float32"] = (
        paged_attention._attend_kernel,
        {"num_kv_heads": 2, "group": 2, "head_dim": 64, "dims": 64, "is_split": True}
        | {"is_narrow": False}
        | sizes
        | {"num_stages": paged_attention._num_stages(torch.float32)},
        paged_attention._num_warps(64, 64, torch.float32),
        dict.fromkeys(("query", "keys", "values", "output"), "fp32"),
    )
    joined = {"num_kv_heads": 8, "group": 7, "head_dim": 128, "dims": 128}
    joined |= {"joined_rows": 4, "split_keys": 512}
    shapes["join"] = (paged_attention._join_kernel, joined, 1, {})
    for num_rows in (1, 256, 2048):
        shape = int8_product._shape(num_rows)
        constants = {
            "num_shares": 1 if num_rows > 256 else 2, "has_bias": True, "is_whole": True,
            "tile_rows": shape.rows, "tile_columns": shape.columns, "tile_depth": shape.depth,
            "group_tiles": 8, "num_stages": shape.num_stages,
        }  # fmt: skip
        shapes[f"int8 {num_rows}"] = (
            int8_product._int8_kernel, constants, shape.num_warps, int8
        )  # fmt: skip
    for num_rows in (1, 2048):
        shape = fp8_product._cut(num_rows, 6144, 4).shape
        constants = {
            "num_segments": 4, "is_shared": num_rows == 1, "has_bias": True, "is_whole": True,
            "tile_rows": shape.rows, "tile_columns": shape.columns, "tile_depth": shape.depth,
            "group_tiles": 8, "num_stages": shape.num_stages,
        }  # fmt: skip
        shapes[f"fp8 {num_rows}"] = (
            fp8_product._fp8_kernel, constants, shape.num_warps, fp8 | {"sums": "fp32"}
        )  # fmt: skip
    rotated = {"num_heads": 32, "num_kv_heads": 8, "half": 64, "padded_half": 64}
    rotated |= {"heads_each": 8, "has_norm": True}
    for kind in ("bf16", "i8", "fp8e4nv"):
        options = rotated | {"is_narrow": kind != "bf16"}
        cached = {"keys": kind, "values": kind}
        shapes[f"rotate {kind}"] = (rotation._rotate_kernel, options, 4, cached)
    shapes["silu"] = (activation._silu_kernel, {"block": 1024}, 4, {})
    for kind, types in (("int8", quantised), ("fp8", narrow)):
        norm = {"block": 4096, "has_delta": True, "quantise": True}
        shapes[f"norm {kind}"] = (normalisation._add_rms_norm_kernel, norm, 8, types)
        silu = {"block": 8192}
        shapes[f"silu {kind}"] = (activation._silu_quantise_kernel, silu, 8, types)
        shapes[f"quantise {kind}"] = (quantisation._quantise_kernel, {"block": 4096}, 4, types)
    shapes["least"] = (sampling._least_kernel, {"block": 4096}, 16, {})
    shapes["draw"] = (sampling._draw_kernel, {"block": 4096}, 8, {"keys": "i64"})
    return shapes


def compiled(
    kernel: Any, constants: dict[str, Any], num_warps: int, types: dict[str, str]
) -> dict[str, int]:
    """Registers, bytes of stack (where spilled registers go) and bytes of shared memory."""
    pointers = {name: kind for kind, names in TYPES.items() for name in names.split()} | types
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    aligned = [
        (place,)
        for place, kind in enumerate(signature.values())
        if kind[0] == "*" or kernel.arg_names[place] in {"depth", "segment", "query_stride"}
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): each for name, each in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    result = triton.compile(source, target=HOPPER, options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        dump = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    found = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return found | {"SHARED": result.metadata.shared}


if __name__ == "__main__":
    print(json.dumps({name: compiled(*kernel) for name, kernel in kernels().items()}))
