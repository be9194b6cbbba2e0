"""The random model that comparisons run on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from understudy.runtime.model.config import ModelConfig
from understudy.runtime.tokenizer import Tokenizer
from understudy.tools.bench import int8_checkpoint, make_model
from understudy.tools.demo.paths import demo_model_directory


def test_the_whole_model_has_half_a_billion_parameters() -> None:
    assert make_model.num_parameters(make_model.NUM_LAYERS) == 494_032_768


def test_the_configuration_is_one_that_we_serve(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_model.config_object(24)))
    config = ModelConfig.from_directory(tmp_path)
    assert (config.num_layers, config.hidden_size, config.head_dim) == (24, 896, 64)
    assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (14, 2, 151_936)
    assert config.tie_word_embeddings
    assert config.attention_bias
    assert config.eos_token_ids == (0,) or set(config.eos_token_ids) == {0}


def test_a_widened_tokenizer_makes_the_same_tokens_and_spells_the_new_ones(tmp_path: Path) -> None:
    bundled = demo_model_directory()
    file = json.loads((bundled / "tokenizer.json").read_text(encoding="utf-8"))
    wide = make_model.widen_tokenizer(file, 5_000)
    (tmp_path / "tokenizer.json").write_text(json.dumps(wide), encoding="utf-8")
    settings = (bundled / "tokenizer_config.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    before, after = Tokenizer.from_directory(bundled), Tokenizer.from_directory(tmp_path)
    text = "The actor leaves; another w4999 takes the part."
    tokens = after.encode(text, add_special_tokens=False)
    assert tokens == before.encode(text, add_special_tokens=False)
    assert after.vocab_size == 5_000
    assert after.decode([4_999]) == " w4999"


def test_weights_are_the_same_for_the_same_seed_and_never_end_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    for name, size in (("HIDDEN_SIZE", 28), ("INTERMEDIATE_SIZE", 40), ("VOCAB_SIZE", 4_100)):
        monkeypatch.setattr(make_model, name, size)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model.write_model(tmp_path / name, num_layers=1, seed=seed)
    first, again, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c")
    )
    assert first == again
    assert first != other
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert not weights["model.embed_tokens.weight"][0].any()
    assert all(tensor.isfinite().all() for tensor in weights.values())
    int8_checkpoint.write_int8(tmp_path / "a", tmp_path / "int8")
    quantized = load_file(tmp_path / "int8" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    restored = quantized[name].float() * quantized[f"{name}_scale"].float()
    torch.testing.assert_close(restored, weights[name].float(), atol=1e-3, rtol=0.0)
    quantization = ModelConfig.from_directory(tmp_path / "int8").quantization
    assert quantization is not None
    assert quantization.format == "int-quantized"
