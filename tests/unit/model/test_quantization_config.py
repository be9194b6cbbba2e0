"""What a ``quantization_config`` says, and what of it is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.quantized_checkpoints import configured
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.quantization_config import (
    CheckpointQuantization,
    checkpoint_quantization,
)


def test_each_kind_is_understood() -> None:
    found = {
        kind: checkpoint_quantization(configured(kind, 64))
        for kind in ("gptq", "awq", "packed", "packed-asymmetric", "int8", "fp8-tensor")
    }
    head = ("lm_head",)
    assert found == {
        "gptq": CheckpointQuantization("gptq", 64, is_symmetric=False),
        "awq": CheckpointQuantization("awq", 64, is_symmetric=False),
        "packed": CheckpointQuantization("pack-quantized", 64, ignored=head),
        "packed-asymmetric": CheckpointQuantization(
            "pack-quantized", 64, is_symmetric=False, ignored=head
        ),
        "int8": CheckpointQuantization("int-quantized", ignored=head),
        "fp8-tensor": CheckpointQuantization("float-quantized", is_per_tensor=True, ignored=head),
    }


def test_fp8_weights_alone_are_told_from_fp8_rows_and_weights() -> None:
    value = configured("fp8-channel", 64)
    assert not checkpoint_quantization(value).is_weight_only
    value["config_groups"]["group_0"]["input_activations"] = None
    assert checkpoint_quantization(value).is_weight_only


def test_a_group_size_of_minus_one_is_the_whole_row() -> None:
    assert checkpoint_quantization(configured("gptq", -1)).group_size is None


def test_modules_are_ignored_by_name_and_by_pattern() -> None:
    config = configured("int8", 0) | {"ignore": ["lm_head", "re:.*gate_proj$"]}
    found = checkpoint_quantization(config)
    assert not found.covers("lm_head")
    assert not found.covers("model.layers.3.mlp.gate_proj")
    assert found.covers("model.layers.3.mlp.up_proj")
    awq = checkpoint_quantization(configured("awq", 64) | {"modules_to_not_convert": ["layers.1."]})
    assert not awq.covers("model.layers.1.mlp.up_proj")
    assert awq.covers("model.layers.2.mlp.up_proj")
    assert not awq.covers("lm_head")


def with_weights(kind: str, **values: object) -> dict[str, Any]:
    config = copy.deepcopy(configured(kind, 64))
    config["config_groups"]["group_0"]["weights"] |= values
    return config


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "must be an object"),
        ({}, "quant_method None is not supported"),
        ({"quant_method": "bitsandbytes"}, "supported: compressed-tensors, gptq, awq"),
        (configured("gptq", 64) | {"bits": 8}, "bits 8 is not supported"),
        (configured("gptq", 64) | {"bits": True}, "bits True is not supported"),
        (configured("gptq", 64) | {"desc_act": True}, "desc_act True is not supported"),
        (configured("gptq", 64) | {"checkpoint_format": "gptq_v2"}, "'gptq_v2' is not supported"),
        (configured("gptq", 0), "group_size must be"),
        (configured("gptq", 64) | {"group_size": "64"}, "group_size must be"),
        (configured("awq", 64) | {"version": "gemv"}, "version 'gemv' is not supported"),
        (configured("awq", 64) | {"zero_point": False}, "zero_point False is not supported"),
        (configured("int8", 0) | {"format": "marlin-24"}, "format 'marlin-24' is not supported"),
        (configured("int8", 0) | {"config_groups": {}}, "one group"),
        (configured("int8", 0) | {"config_groups": {"a": 1}}, "must hold objects"),
        (configured("int8", 0) | {"ignore": ["re:("]}, "is no pattern"),
        (configured("int8", 0) | {"ignore": "lm_head"}, "must hold names"),
        (configured("int8", 0) | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (configured("int8", 0) | {"transform_config": {"r1": {}}}, "transform_config"),
        (configured("gptq", 64) | {"is_marlin_format": True}, "is_marlin_format True"),
        (configured("int8", 0) | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        (with_weights("int8", strategy="group"), "strategy 'group' is not supported"),
        (with_weights("int8", symmetric=False), "symmetric False is not supported"),
        (with_weights("packed", num_bits=3), "num_bits 3 is not supported"),
        (with_weights("packed", actorder="group"), "actorder 'group' is not supported"),
        (with_weights("packed", symmetric=1), "symmetric must be true or false"),
        (with_weights("fp8-tensor", strategy="block"), "strategy 'block' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(value: object, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        checkpoint_quantization(value)
    (problem,) = caught.value.problems
    assert words in problem
    assert "\n" not in problem


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 200) | st.sampled_from(["Linear", "int", "gptq"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(
    kind=st.sampled_from(["gptq", "awq", "packed", "int8", "fp8-tensor"]),
    data=st.data(),
)
def test_any_value_anywhere_is_understood_or_refused(kind: str, data: st.DataObject) -> None:
    config = configured(kind, 64)
    at: Any = config if kind in {"gptq", "awq"} else config["config_groups"]["group_0"]["weights"]
    at = dict(at)
    at[data.draw(st.sampled_from(sorted(at)))] = data.draw(ANYTHING)
    if kind not in {"gptq", "awq"}:
        group = {**config["config_groups"]["group_0"], "weights": at}
        at = {**config, "config_groups": {"group_0": group}}
    try:
        checkpoint_quantization(at)
    except ConfigurationError as error:
        (problem,) = error.problems
        event(problem.split()[0])
