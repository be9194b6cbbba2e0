from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import END_OF_TEXT_ID, TURN_END_ID, write_model
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.served_model import ServedModel


def read(directory: Path, *, max_model_len: int | None = None) -> ServedModel:
    return ServedModel.from_directory(directory, name="m", max_model_len=max_model_len)


def test_a_directory_says_all_that_a_gateway_needs(tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_k": 20, "eos_token_id": [END_OF_TEXT_ID, TURN_END_ID]}
    served = read(write_model(tmp_path, generation=generation))
    traits = served.traits(max_model_len=0)
    assert served.chat_template is not None
    assert (traits.name, traits.vocab_size, traits.max_model_len) == ("m", 480, 256)
    assert (traits.temperature, traits.top_k, traits.top_p) == (0.6, 20, 1.0)
    assert traits.eos_token_ids == (END_OF_TEXT_ID, TURN_END_ID)


def test_the_tokenizers_end_of_text_ends_an_answer_too(tmp_path: Path) -> None:
    served = read(write_model(tmp_path, eos_token_id=TURN_END_ID))
    assert served.traits(max_model_len=0).eos_token_ids == (END_OF_TEXT_ID, TURN_END_ID)


def test_the_shortest_of_the_limits_holds(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    assert read(directory).traits(max_model_len=100).max_model_len == 100
    assert read(directory, max_model_len=50).traits(max_model_len=100).max_model_len == 50
    assert read(directory, max_model_len=50).traits(max_model_len=0).max_model_len == 50


def test_more_than_the_model_can_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="more than the model's 256"):
        read(write_model(tmp_path), max_model_len=257)


def test_a_model_may_have_no_chat_template(tmp_path: Path) -> None:
    assert read(write_model(tmp_path, chat_template=None)).chat_template is None


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        read(tmp_path)
