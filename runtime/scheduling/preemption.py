"""Who gives way when the blocks are out, and what that costs it.

The least urgent running sequence does: lowest priority first, among equals the last to arrive. It
has the least work to lose, and since nobody takes blocks from the most urgent one, that one always
gets to its end, so preemption cannot go round in circles.

What it loses is its claim to its blocks, and of what they hold only what is overwritten before it
starts again. Its tokens are kept, prompt and output, and computing them again in a few large chunks
is cheaper than carrying blocks to another memory and back. It had been let in before everyone who
waits, so it goes in again before them, as soon as all of its tokens fit.
"""

from __future__ import annotations

from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.sequence import Sequence, SequenceStatus


def urgency(sequence: Sequence) -> tuple[int, int]:
    """The key that sorts sequences, most urgent first: priority (lower is earlier), arrival."""
    return sequence.priority, sequence.arrival


def preempt_last(running: list[Sequence], kv_cache_manager: KVCacheManager) -> Sequence:
    """Take the last of ``running``, which is sorted by urgency, and with it all of its blocks."""
    victim = running.pop()
    kv_cache_manager.free(victim)
    victim.num_computed_tokens = 0
    victim.status = SequenceStatus.WAITING
    return victim
