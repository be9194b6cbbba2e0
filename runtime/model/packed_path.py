"""Where the packed weights of a model are kept, and having them in memory by when they are needed.

Free of torch: an engine has a disk read while it imports torch, which takes as long as reading the
weights of a small model.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.cache import cache_directory, is_ours
from understudy.runtime.model.mapped_file import MappedFile
from understudy.runtime.model.model_digest import model_digest
from understudy.runtime.model.native.sources import kernels_version
from understudy.runtime.model.quantization_config import Quantization


def packed_path(directory: Path, quantization: Quantization) -> Path:
    """The file for a model directory's weights as the CPU's kernels read them; it may not be there.

    Raises:
        OSError: nothing can be kept, or the model cannot be read.
    """
    name = "\0".join((*_fingerprints(directory), quantization, kernels_version()))
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return cache_directory() / f"weights-{digest}.safetensors"


def fetch_early(directory: Path, quantization: Quantization) -> threading.Thread:
    """Begin to read a model's packed weights, if some are kept; they are mapped until that is done.

    What cannot be read is left to those who load the model and can say so.
    """

    def fetch() -> None:
        with suppress(OSError, ConfigurationError):
            path = packed_path(directory, quantization)
            if is_ours(path):
                file = MappedFile(path)
                file.fetch(0, file.num_bytes)

    thread = threading.Thread(target=fetch, name="packed-weights", daemon=True)
    thread.start()
    return thread


def _fingerprints(directory: Path) -> Iterator[str]:
    """What tells one checkpoint from another, and from itself after an edit in place."""
    yield model_digest(directory)
    for path in sorted(directory.glob("*.safetensors")):
        status = path.stat()
        yield f"{path.name} {status.st_size} {status.st_mtime_ns}"
