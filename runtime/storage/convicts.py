"""What quarantined requests asked, kept on disk for whoever has to find out why engines died.

A file for each, readable by the service's user alone, because it holds a prompt. The supervisor
writes them, and reads them when it starts; the command line reads and removes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

from understudy.protocol.request import Request, fingerprint

CONVICTS_MAX: Final = 256
"""Of more, the oldest are removed."""
_SUFFIX: Final = ".json"
_BYTES_MAX: Final = 64 << 20
_DIGITS: Final = 64


class Convict(NamedTuple):
    """A quarantined request, as its file has it."""

    fingerprint: str
    """In hexadecimal; also the stem of the file's name."""
    age_s: float
    """Since it was written, by the wall clock."""
    content: Mapping[str, Any]


class ConvictDirectory:
    """The files of all quarantined requests."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, request: Request, *, written_at: float) -> None:
        """Write a request down; a disk that does not take it is borne in silence.

        Args:
            request: What was quarantined.
            written_at: The wall clock's time, in seconds since 1970.
        """
        content = {
            "written_at": written_at,
            "request_id": f"{request.request_id:016x}",
            "tenant": request.tenant,
            "params": asdict(request.params),
            "prompt": list(request.prompt),
        }
        path = self._path(fingerprint(request).hex())
        temporary = path.with_suffix(".new")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
            temporary.rename(path)
            for old in self._paths()[:-CONVICTS_MAX]:
                old.unlink(missing_ok=True)
        except OSError:
            return

    def fingerprints(self) -> list[bytes]:
        """Of all that is kept, the oldest first."""
        return [bytes.fromhex(path.stem) for path in self._paths()]

    def convicts(self, *, now: float) -> list[Convict]:
        """All that is kept, the oldest first; a file that cannot be read is left out."""
        found = []
        for path in self._paths():
            try:
                if path.stat().st_size <= _BYTES_MAX:
                    content = json.loads(path.read_text(encoding="utf-8"))
                    age_s = max(0.0, now - content["written_at"])
                    found.append(Convict(path.stem, age_s, content))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def remove(self, fingerprint_digits: str) -> bool:
        """Forget one; whether it was there."""
        path = self._path(fingerprint_digits)
        existed = path.is_file()
        path.unlink(missing_ok=True)
        return existed

    def _path(self, fingerprint_digits: str) -> Path:
        return self._directory / (fingerprint_digits + _SUFFIX)

    def _paths(self) -> list[Path]:
        paths = [
            path
            for path in self._directory.glob("*" + _SUFFIX)
            if len(path.stem) == _DIGITS and not set(path.stem) - set("0123456789abcdef")
        ]
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.stem))
