"""One thread for torch, and each family's random model, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Protocol

import pytest
import torch

from tests.checkpoints import FAMILIES, write_checkpoint
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.native import library
from understudy.runtime.model.numerics import Numerics
from understudy.runtime.model.transformer import Transformer

CPU = torch.device("cpu")


class LoadModel(Protocol):
    """A model by family, dtype and numerics; not ``native`` is as where there is no compiler."""

    def __call__(
        self, family: str, dtype: torch.dtype, numerics: Numerics, *, native: bool = True
    ) -> Transformer: ...


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> LoadModel:
    """Loads each model once."""

    @cache
    def load(
        family: str, dtype: torch.dtype, numerics: Numerics, *, native: bool = True
    ) -> Transformer:
        directory = write_checkpoint(tmp_path_factory.mktemp(family), FAMILIES[family])
        with pytest.MonkeyPatch.context() as patch:
            if not native:
                patch.setattr(library, "_library", lambda: None)
            return load_model(directory, dtype=dtype, device=CPU, numerics=numerics)

    return load
