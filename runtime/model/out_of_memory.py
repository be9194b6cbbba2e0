"""What a device says when its memory is short, in one word of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from understudy.runtime.scheduling.decision import OutOfMemory

_WORDS: Final = ("can't allocate memory", "out of memory")
"""The CPU's allocator has no exception class of its own, nor has what CUDA itself allocates."""


@contextmanager
def telling_out_of_memory() -> Iterator[None]:
    """Turn what says on any device that memory is short into ``OutOfMemory``."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        if any(words in str(error) for words in _WORDS):
            raise OutOfMemory(str(error)) from error
        raise
