"""How much of all prompts the prefix cache finds, by the order in which it gives up idle blocks.

The cache itself runs, on traces of skewed reuse, one request after the other, against plain
least-recently-used order: ``python -m understudy.tools.bench.eviction``. Takes a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.kvcache import prefix_cache
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.sequence import Sequence
from understudy.tools.bench.reuse_trace import MIXES, Call, reuse_trace

BLOCK_SIZE = 16
POOLS = (1000, 3000, 8000)
ORDERS = {"lru": 0.0, "ours": prefix_cache.TURNOVERS_PER_DOUBLING}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m understudy.tools.bench.eviction")
    parser.add_argument("--conversations", type=int, default=3000, help="length of a trace (3000)")
    parser.add_argument("--seed", type=int, default=1, help="of the traces (1)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for mix in MIXES:
        calls = reuse_trace(mix, conversations=arguments.conversations, seed=arguments.seed)
        for num_blocks in POOLS:
            found = {
                name: hit_rate(calls, num_blocks=num_blocks, turnovers=turnovers)
                for name, turnovers in ORDERS.items()
            }
            rows.append({"mix": mix.name, "blocks": num_blocks, **found})
            sys.stdout.write(
                f"{mix.name:14} {num_blocks:5} blocks  lru {found['lru']:.3f}"
                f"  ours {found['ours']:.3f}  ({found['ours'] / found['lru'] - 1:+.1%})\n"
            )
            sys.stdout.flush()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def hit_rate(calls: list[Call], *, num_blocks: int, turnovers: float) -> float:
    """The share of all prompt tokens that were found in the cache."""
    manager = KVCacheManager(num_blocks=num_blocks, block_size=BLOCK_SIZE)
    manager.cache.turnovers_per_doubling = turnovers
    num_found = num_tokens = 0
    for number, call in enumerate(calls):
        params = SamplingParams(seed=0, max_tokens=call.num_output_tokens)
        sequence = Sequence(Request(number, number, call.prompt, params), attempt=1)
        if not manager.start(sequence):
            continue
        num_tokens += sequence.num_tokens
        num_found += sequence.num_computed_tokens
        num_left = sequence.num_tokens - sequence.num_computed_tokens
        manager.plan(sequence, num_left)
        sequence.num_computed_tokens += num_left
        manager.settle()
        manager.free(sequence)
        manager.settle()
    return num_found / num_tokens


if __name__ == "__main__":
    sys.exit(main())
