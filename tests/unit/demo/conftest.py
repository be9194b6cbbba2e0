"""A small corpus and a preset that trains on it in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from understudy.tools.demo.corpus import Corpus, SourceFile
from understudy.tools.demo.network import NetworkShape
from understudy.tools.demo.train import Preset
from understudy.tools.demo.training import TrainingPlan

SOURCE = '''\
"""Numbers and what can be done with them, file {number}."""


def add_{number}(first, second):
    """Return the sum of two numbers."""
    return first + second + {number}


class Counter:
    """A counter that starts at a number of your choice."""

    def __init__(self, start={number}):
        self.value = start

    def increment(self):
        """Count one further and return the new value."""
        self.value += 1
        return self.value
'''


@pytest.fixture
def corpus() -> Corpus:
    files = tuple(SourceFile(f"n{i}.py", SOURCE.format(number=i)) for i in range(24))
    return Corpus(training=files[2:], held_out=files[:2])


@pytest.fixture
def preset() -> Preset:
    shape = NetworkShape(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        context_length=32,
    )
    plan = TrainingPlan(
        shape=shape,
        steps=30,
        windows_per_step=4,
        matrix_rate=0.02,
        other_rate=0.02,
        warmup_steps=3,
        decay_share=0.5,
        short_share=0.5,
        short_halvings=1,
        seed=5,
    )
    return Preset(model=plan, draft=replace(plan, shape=replace(shape, num_layers=1), steps=10))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    for name in ("a.py", "package/b.py", "test/test_a.py", "site-packages/c.py", "package/x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"name = {name!r}\n")
    (root / "empty.py").write_text("\n")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe4'\n")
    return root
