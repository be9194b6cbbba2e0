"""What an engine process loads, from the settings that an operator gives."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.encoders import BERT, LENGTH_MAX, write_encoder
from tests.unit.model.native.kernels import needs_native
from understudy.actors import loading
from understudy.actors.loading import Loaded, keep_to_cores, load_runner
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.config import EngineConfig, engine_config
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.model import loader
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.settings import Defaults, resolve
from understudy.tools.demo.paths import demo_model_directory


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def configured(**flags: str) -> EngineConfig:
    common = {"config": "/dev/null", "threads": "1", "device": "cpu", "dtype": "float32"}
    defaults = Defaults(model=demo_model_directory(), run_dir=Path("/run/understudy"))
    settings = resolve(flags=common | flags, environ={}, defaults=defaults)
    return engine_config(settings, name="engine-0")


def test_each_of_several_engines_keeps_to_its_own_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    kept: list[set[int]] = []

    def keep(name: str) -> None:
        config = replace(configured(data_parallel_size=str(len(cores))), name=name)
        keep_to_cores(config, "cpu")
        kept.append(os.sched_getaffinity(0))

    for name in ("engine-0", "engine-1", "solo"):
        thread = threading.Thread(target=keep, args=(name,))  # it is a thread that keeps to cores
        thread.start()
        thread.join()
    one, other = {cores[0]}, {cores[1 % len(cores)]}
    assert kept == ([one, other, set(cores)] if len(cores) > 1 else [set(cores)] * 3)
    assert sorted(os.sched_getaffinity(0)) == cores


def load(**flags: str) -> Loaded:
    return load_runner(configured(kv_cache_memory="16MiB", **flags), VirtualClock())


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_an_engine_with_quantised_weights_proves_its_numerics_and_names_them(
    quantization: str,
) -> None:
    loaded = load(quantization=quantization, max_model_len="256")
    assert f"/exact/float32+{quantization}/cpu/" in loaded.numerics
    assert loaded.max_model_len == 256


@needs_native
def test_keys_and_values_of_8_bits_take_a_quarter_of_the_memory_and_are_named() -> None:
    plain, narrow = (load(max_model_len="1024", kv_cache_dtype=kind) for kind in ("auto", "int8"))
    assert "/exact/float32+kv-int8/cpu/" in narrow.numerics
    assert narrow.num_blocks > 3 * plain.num_blocks


def test_keys_and_values_of_8_bits_need_kernels_that_read_them() -> None:
    with pytest.raises(ConfigurationError, match="C\\+\\+ compiler"):
        load(kv_cache_dtype="int8", dtype="bfloat16")


def test_weights_stay_as_they_are_unless_something_is_said() -> None:
    assert "/exact/float32/cpu/" in load(max_model_len="256").numerics


@pytest.mark.parametrize(("dtype", "is_read"), [("float32", True), ("bfloat16", False)])
def test_kept_weights_are_read_early_and_unmapped_before_memory_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, dtype: str, *, is_read: bool
) -> None:
    events: list[object] = []
    load_model = loader.load_model

    def fetch_early(directory: Path, quantization: str) -> threading.Thread:
        def fetch() -> None:
            load_began.wait(0.2)
            events.append((directory, quantization))

        thread = threading.Thread(target=fetch)
        thread.start()
        return thread

    def noting(*arguments: Any, **named: Any) -> Transformer:
        load_began.set()
        events.append("load")
        return load_model(*arguments, **named)

    load_began = threading.Event()
    monkeypatch.setattr(loading, "fetch_early", fetch_early)
    monkeypatch.setattr(loader, "load_model", noting)
    load(max_model_len="256", quantization="int8", dtype=dtype)
    assert events == [(demo_model_directory(), "int8"), "load"][not is_read :]


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected one of none, int8, int4"):
        configured(quantization="int2")


# Encoders


def test_an_encoder_is_loaded_in_float32_and_says_that_it_makes_no_tokens(tmp_path: Path) -> None:
    directory = str(write_encoder(tmp_path, BERT))
    loaded = load(model=directory, dtype="auto", max_num_seqs="4")
    assert loaded.pools_only
    assert "/exact/float32/cpu/" in loaded.numerics
    assert loaded.max_model_len == LENGTH_MAX
    assert loaded.num_blocks == 4 * LENGTH_MAX // 16
    assert not load(max_model_len="256").pools_only


def test_what_is_not_for_encoders_is_refused_all_at_once(tmp_path: Path) -> None:
    directory = str(write_encoder(tmp_path, BERT))
    with pytest.raises(ConfigurationError) as raised:
        load(model=directory, quantization="int8", kv_cache_dtype="int8")
    assert [line.rpartition(": ")[2] for line in raised.value.problems] == [
        "--quantization is not for encoders; leave it out",
        "--kv-cache-dtype is not for encoders; leave it out",
    ]
    with pytest.raises(ConfigurationError, match="beyond what the model reaches"):
        load(model=directory, max_model_len=str(LENGTH_MAX + 1))


def test_an_echo_stands_in_for_an_encoder_too(tmp_path: Path) -> None:
    loaded = load(model=str(write_encoder(tmp_path, BERT)), engine="echo")
    assert loaded.pools_only
    assert loaded.numerics == "echo"
