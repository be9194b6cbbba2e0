"""Where things are kept that make the next start faster, and which of them are trusted."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from understudy.runtime.cache import cache_directory, is_ours, note_use, remove_unused


def test_the_cache_is_where_systemd_says_or_else_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    assert cache_directory() == tmp_path / "user" / "understudy"
    assert cache_directory().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path / 'service'}:/elsewhere")
    assert cache_directory() == tmp_path / "service"


def test_what_others_may_write_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    assert not is_ours(path)
    path.write_text("x")
    path.chmod(0o600)
    assert is_ours(path)
    path.chmod(0o620)
    assert not is_ours(path)


def test_a_link_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="remove it"):
        is_ours(tmp_path / "link")


def test_what_was_of_no_use_for_a_month_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    old = time.time() - 31 * 86400
    for name in ("costs-unused", "costs-used", "costs-new", "somebody-elses"):
        (tmp_path / name).touch()
    for name in ("costs-unused", "costs-used", "somebody-elses"):
        os.utime(tmp_path / name, (old, old))
    note_use(tmp_path / "costs-used")
    remove_unused()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["costs-new", "costs-used", "somebody-elses"]
