"""Files in memory: what is there, and what becomes of one that somebody cuts off."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.mapped_file import MappedFile

NUMBERS = torch.arange(3 << 20, dtype=torch.int32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    path.write_bytes(NUMBERS.numpy().tobytes())
    return path


def test_numbers_are_those_of_the_file_wherever_they_begin(path: Path) -> None:
    mapped = MappedFile(path)
    assert mapped.num_bytes == NUMBERS.nbytes
    mapped.fetch(4 * 1021, 4 * 5000)
    assert torch.equal(mapped.tensor(torch.int32, 5000, 4 * 1021), NUMBERS[1021:6021])


def test_writing_to_it_changes_nothing_elsewhere(path: Path) -> None:
    mapped = MappedFile(path)
    mapped.tensor(torch.int32, 4, 0).zero_()
    assert torch.equal(MappedFile(path).tensor(torch.int32, 4, 0), NUMBERS[:4])


def test_more_than_there_is_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="truncated"):
        MappedFile(path).tensor(torch.int32, len(NUMBERS), 4)


def test_a_file_that_is_cut_off_under_the_map_is_told_of_and_kills_nobody(path: Path) -> None:
    mapped = MappedFile(path)
    os.truncate(path, 8192)
    with pytest.raises(ConfigurationError, match=f"{path}: "):
        mapped.fetch(0, NUMBERS.nbytes)


def test_a_file_outlives_its_name(path: Path) -> None:
    mapped = MappedFile(path)
    path.unlink()
    mapped.fetch(0, mapped.num_bytes)
    assert torch.equal(mapped.tensor(torch.int32, len(NUMBERS), 0), NUMBERS)


def test_large_pages_are_at_most_what_was_fetched(path: Path) -> None:
    mapped = MappedFile(path)
    assert mapped.large_page_bytes == 0
    mapped.fetch(0, mapped.num_bytes)
    assert mapped.large_page_bytes in range(0, mapped.num_bytes + 1, 2 << 20)


def test_an_older_kernel_reads_what_is_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("understudy.runtime.model.mapped_file._MADV_POPULATE_READ", 9999)
    mapped = MappedFile(path)
    mapped.fetch(0, mapped.num_bytes)  # which answers EINVAL
    assert torch.equal(mapped.tensor(torch.int32, len(NUMBERS), 0), NUMBERS)


def test_an_empty_file_cannot_be_mapped(path: Path) -> None:
    os.truncate(path, 0)
    with pytest.raises(OSError, match=str(path)):
        MappedFile(path)
