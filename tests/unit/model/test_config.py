"""Model configs: both forms of rope, every refusal, and no trust in any value."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import LLAMA, QWEN2, QWEN3
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.config import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    SamplingDefaults,
    YarnRopeScaling,
)


def read(
    directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None
) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_directory(directory)


def problems(
    directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None
) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        read(directory, config, generation)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_a_llama_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, {**LLAMA, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5})
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_heads, config.num_kv_heads, config.group_size) == (4, 2, 2)
    assert (config.head_dim, config.rms_norm_eps) == (16, 1e-5)
    assert not config.attention_bias
    assert not config.qk_norm
    assert not config.tie_word_embeddings
    assert config.dtype == "bfloat16"
    assert config.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    assert config.max_model_len == 1024


def test_a_qwen2_has_biases_on_queries_keys_and_values_only(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN2)
    assert config.attention_bias
    assert not config.attention_output_bias
    assert config.tie_word_embeddings
    assert config.rope_scaling == LinearRopeScaling(2.0)


def test_a_llama_with_attention_bias_has_it_on_the_output_too(tmp_path: Path) -> None:
    config = read(tmp_path, {**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert config.attention_bias
    assert config.attention_output_bias
    assert config.mlp_bias


def test_a_qwen3_normalises_heads_of_its_own_size(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN3)
    assert config.qk_norm
    assert config.head_dim == 32
    without = {name: value for name, value in QWEN3.items() if name != "head_dim"}
    assert read(tmp_path, without).head_dim == 128


def test_old_configs_name_no_kv_heads(tmp_path: Path) -> None:
    old = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert read(tmp_path, old).num_kv_heads == 4


def test_both_forms_of_rope_say_the_same(tmp_path: Path) -> None:
    older = {**LLAMA, "rope_theta": 500000.0}
    newer = {name: value for name, value in LLAMA.items() if not name.startswith("rope")}
    newer["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert read(tmp_path, older) == read(tmp_path, newer)
    oldest = {**QWEN2, "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read(tmp_path, oldest).rope_scaling == LinearRopeScaling(2.0)


@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "default"}])
def test_rope_may_be_plain(tmp_path: Path, rope: dict[str, Any] | None) -> None:
    config = read(tmp_path, {**LLAMA, "rope_scaling": rope})
    assert config.rope_scaling is None
    assert config.rope_theta == 10000.0


def test_yarn_computes_its_attention_factor(tmp_path: Path) -> None:
    scaling = read(tmp_path, QWEN3).rope_scaling
    assert isinstance(scaling, YarnRopeScaling)
    assert scaling.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)
    rope = {**QWEN3["rope_parameters"], "mscale": 0.7, "mscale_all_dim": 1.4}
    scaling = read(tmp_path, {**QWEN3, "rope_parameters": rope}).rope_scaling
    assert isinstance(scaling, YarnRopeScaling)
    expected = (0.07 * math.log(4.0) + 1.0) / (0.14 * math.log(4.0) + 1.0)
    assert scaling.attention_factor == pytest.approx(expected)
    rope = {**QWEN3["rope_parameters"], "attention_factor": 1.25}
    scaling = read(tmp_path, {**QWEN3, "rope_parameters": rope}).rope_scaling
    assert isinstance(scaling, YarnRopeScaling)
    assert scaling.attention_factor == 1.25


def test_yarn_reaches_further_than_the_config_says(tmp_path: Path) -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    long = {**QWEN2, "rope_parameters": None, "rope_scaling": rope}
    config = read(tmp_path, {**long, "max_position_embeddings": 32768})
    assert config.max_position_embeddings == 32768
    assert config.max_model_len == 131072


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    config = read(tmp_path, {**LLAMA, "eos_token_id": 7}, {"eos_token_id": [9, 7, 3]})
    assert config.eos_token_ids == (3, 7, 9)
    assert read(tmp_path, LLAMA, {}).eos_token_ids == ()


def test_generation_config_gives_defaults(tmp_path: Path) -> None:
    generation = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "do_sample": True,
        "transformers_version": "5.0.0",
    }
    assert read(tmp_path, LLAMA, generation).sampling == SamplingDefaults(
        temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05
    )
    assert read(tmp_path, LLAMA, {}).sampling == SamplingDefaults()


def test_what_is_no_model_directory_is_said_in_one_line(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "absent", "no such directory"),
        (tmp_path, "not a model directory: no config.json"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            ModelConfig.from_directory(path)
        assert caught.value.problems == (f"{path}: {words}",)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\x00", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"]
)
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"config\.json: "):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("names", [["GPT2LMHeadModel"], [], None, ["A", "B"], [7], "Llama"])
def test_other_architectures_are_refused_with_those_that_are_supported(
    tmp_path: Path, names: Any
) -> None:
    (problem,) = problems(tmp_path, {**LLAMA, "architectures": names})
    assert "supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in problem


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    broken = {**LLAMA, "vocab_size": -5, "hidden_size": "64", "rms_norm_eps": math.nan}
    del broken["intermediate_size"]
    found = problems(tmp_path, broken, {"top_p": 7})
    for words in ("vocab_size", "hidden_size", "rms_norm_eps", "intermediate_size", "top_p"):
        assert any(words in problem for problem in found), words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "no multiple of num_attention_heads"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "'bitsandbytes' is not supported",
        ),
        ({"use_sliding_window": True}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be a number"),
        ({"rope_scaling": []}, "rope_scaling must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"eos_token_id": 128}, "token ids below vocab_size 128"),
        ({"bos_token_id": [True]}, "token ids below vocab_size 128"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"vocab_size": 10**400}, "vocab_size must be an integer"),
    ],
)
def test_what_would_go_wrong_later_is_refused_now(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    assert any(words in problem for problem in problems(tmp_path, {**LLAMA, **change}))


def test_llama3_rope_needs_its_factors_in_order(tmp_path: Path) -> None:
    rope = {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}
    (problem,) = problems(tmp_path, {**LLAMA, "rope_scaling": rope})
    assert "high_freq_factor must be above low_freq_factor" in problem


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    changes=st.dictionaries(st.sampled_from(sorted({*LLAMA, *QWEN3, "eos_token_id"})), JSON),
    rope=st.dictionaries(st.sampled_from(sorted(LLAMA["rope_scaling"])), JSON),
)
def test_any_values_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], rope: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    config = {**LLAMA, "rope_scaling": {**LLAMA["rope_scaling"], **rope}, **changes}
    with suppress(ConfigurationError):
        read(directory, config)


def test_reading_a_config_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    program = (
        "import sys; from pathlib import Path\n"
        "from understudy.runtime.model.config import ModelConfig\n"
        f"ModelConfig.from_directory(Path({str(tmp_path)!r}))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
