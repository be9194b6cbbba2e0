"""Which model a directory holds, in a few characters: two engines with one digest run one model.

It tells models apart that somebody might mix up; it is no proof against a forger. Free of torch.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple, Self

SAMPLE_BYTES: Final = 1 << 20
SAMPLE_EVERY_BYTES: Final = 64 << 20
"""A file of weights is read in samples, the last at its end: 64 times quicker than all of it."""
_DIGEST_LENGTH: Final = 12


def model_digest(directory: Path) -> str:
    """A digest of a model directory's config and weights; blocks for milliseconds for each GiB."""
    paths = (directory / "config.json", *sorted(directory.glob("*.safetensors")))
    return _digest(tuple(_File.of(path) for path in paths if path.is_file()))


class _File(NamedTuple):
    """A file as it is now."""

    path: Path
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)  # it is asked for more than once in a start
def _digest(files: tuple[_File, ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset in (*range(0, size, SAMPLE_EVERY_BYTES), max(0, size - SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:_DIGEST_LENGTH]
