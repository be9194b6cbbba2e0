from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from tests.encoders import BERT, ROBERTA, XLM_ROBERTA, write_encoder
from tests.tiny_models import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    SPECIAL_TOKENS,
    TURN_START,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    write_tokenizer,
)
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.tokenizer import Tokenizer, read_settings

LLAMA3_KIND = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
TEXTS = (
    "",
    " ",
    "the quick brown fox",
    "  two spaces\n\n\ttabs ",
    "größe 🦊 いろは e\u0301",
    f"{TURN_START}user\nhello<|im_end|>",
    f"a{END_OF_TEXT}b",
    "\x00 and \u2581 and \ufffd",
)


def written(directory: Path, backend: Backend, **settings: Any) -> Path:
    write_tokenizer(directory, backend, **settings)
    return directory


def llama3_kind(directory: Path) -> Path:
    backend = byte_level_tokenizer(special_tokens=("<|begin|>", "<|end|>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return written(directory, backend, **LLAMA3_KIND)


def qwen_kind(directory: Path) -> Path:
    """Tokens beyond ``tokenizer.json``, and a normaliser."""
    backend = byte_level_tokenizer(special_tokens=(END_OF_TEXT,))
    backend.normalizer = normalizers.NFC()
    size = backend.get_vocab_size()
    added = {
        str(size + place): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": is_special,
        }
        for place, (token, is_special) in enumerate(
            [(TURN_START, True), ("<|im_end|>", True), ("<think>", False)]
        )
    }
    return written(
        directory,
        backend,
        add_bos_token=False,
        eos_token="<|im_end|>",
        pad_token=END_OF_TEXT,
        added_tokens_decoder=added,
        additional_special_tokens=[TURN_START, "<|im_end|>"],
    )


def llama2_kind(directory: Path) -> Path:
    backend = sentencepiece_tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return written(
        directory,
        backend,
        add_eos_token=True,  # means nothing beside a tokenizer.json
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def gpt_kind(directory: Path) -> Path:
    return written(directory, byte_level_tokenizer(), eos_token=END_OF_TEXT)


KINDS = (gpt_kind, llama3_kind, qwen_kind, llama2_kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_encoding_equals_that_of_transformers(
    kind: Any, add_special_tokens: bool, tmp_path: Path
) -> None:
    directory = kind(tmp_path)
    ours = Tokenizer.from_directory(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=add_special_tokens)
        assert ours.encode(text, add_special_tokens=add_special_tokens) == expected, text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_those_of_transformers(kind: Any, tmp_path: Path) -> None:
    directory = kind(tmp_path)
    ours = Tokenizer.from_directory(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids >= set(theirs.all_special_ids)
    named = {name: str(token) for name, token in theirs.special_tokens_map.items()}
    assert dict(ours.special_tokens) == {
        name: token for name, token in named.items() if name.endswith("_token")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_that_of_transformers(kind: Any, tmp_path: Path) -> None:
    directory = kind(tmp_path)
    ours = Tokenizer.from_directory(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        token_ids = theirs.encode(text)
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_the_pieces_of_its_tokens(kind: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(kind(tmp_path))
    for text in TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=True)
        pieces = [tokenizer.pieces[token_id] for token_id in token_ids]
        spelled = b"".join(
            piece if isinstance(piece, bytes) else piece.encode() for piece in pieces
        ).decode()
        if tokenizer.drops_first_space:
            spelled = spelled.removeprefix(" ")
        assert spelled == tokenizer.decode(token_ids)


def test_a_special_token_is_spelled_but_adds_no_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(gpt_kind(tmp_path))
    assert tokenizer.spell(END_OF_TEXT_ID) == END_OF_TEXT.encode()
    assert tokenizer.pieces[END_OF_TEXT_ID] == ""


def test_an_id_beyond_the_vocabulary_spells_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(gpt_kind(tmp_path))
    assert tokenizer.spell(10**6) == b""
    assert tokenizer.pieces[10**6] == ""


def test_a_file_that_truncates_and_pads_does_neither_here(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_directory(written(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode(TEXTS[2], add_special_tokens=True)) == TEXTS[2]


@given(text=st.text(max_size=200))
def test_no_text_has_fewer_tokens_than_the_bound_says(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for kind in KINDS:
        tokenizer = _cached(kind, tmp_path_factory)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(token_ids) >= tokenizer.fewest_tokens(text)


def test_the_bound_is_worth_asking_for(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(gpt_kind(tmp_path))
    assert tokenizer.fewest_tokens("a" * 10**6) > 10**4


def test_there_is_no_bound_where_an_added_token_takes_the_space_around_it(tmp_path: Path) -> None:
    token = {"content": "<x>", "lstrip": True}
    directory = written(tmp_path, byte_level_tokenizer(), added_tokens_decoder={"477": token})
    assert Tokenizer.from_directory(directory).fewest_tokens(" " * 10**6) == 0


def test_the_template_named_default_is_taken_of_several(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template=templates)
    assert read_settings(tmp_path).chat_template == "d"


def test_older_files_name_special_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    assert Tokenizer.from_directory(tmp_path).eos_token_id == END_OF_TEXT_ID


def test_a_special_token_may_be_written_with_its_flags(tmp_path: Path) -> None:
    token = {"__type": "AddedToken", "content": END_OF_TEXT, "lstrip": False}
    directory = written(tmp_path, byte_level_tokenizer(), eos_token=token)
    assert Tokenizer.from_directory(directory).eos_token_id == END_OF_TEXT_ID


def test_a_directory_without_a_tokenizer_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}', "\udcff"])
def test_a_file_that_is_no_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "settings",
    ["[]", "{", '{"eos_token": 3}', '{"added_tokens_decoder": {"x": {}}}', '{"chat_template": 1}'],
)
def test_settings_that_are_malformed_are_refused(settings: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ConfigurationError, match=r"tokenizer_config\.json"):
        Tokenizer.from_directory(tmp_path)


def test_a_way_of_spelling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigurationError, match="decoder WordPiece is not supported"):
        Tokenizer.from_directory(written(tmp_path, backend))


def test_special_tokens_have_the_ids_that_the_file_gives_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(gpt_kind(tmp_path))
    for token_id, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.encode(token, add_special_tokens=False) == [token_id]


_CACHE: dict[Any, Tokenizer] = {}


def _cached(kind: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if kind not in _CACHE:
        _CACHE[kind] = Tokenizer.from_directory(kind(tmp_path_factory.mktemp("tokenizer")))
    return _CACHE[kind]


# Pairs, for models that make no tokens


@pytest.mark.parametrize("architecture", [BERT, ROBERTA, XLM_ROBERTA])
def test_pairs_are_put_together_as_transformers_does(tmp_path: Path, architecture: str) -> None:
    directory = write_encoder(tmp_path, architecture)
    tokenizer = Tokenizer.from_directory(directory, spells=False)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.tells_pairs
    for first, second in [("the quick fox", "a lazy dog"), ("a", "b " * 40), ("größe", "🦊")]:
        pair = tokenizer.encode_pair(first, second)
        expected = theirs(first, second)
        assert pair.ids == expected["input_ids"]
        assert tokenizer.encode(first, add_special_tokens=True) == theirs(first)["input_ids"]
        kinds = Backend.from_file(str(directory / "tokenizer.json")).encode(first, second).type_ids
        second_at = pair.second_at or len(kinds)
        assert kinds == [0] * second_at + [1] * (len(kinds) - second_at)
        assert bool(pair.second_at) == (architecture == BERT)


def test_a_pair_that_cannot_be_told_by_where_its_second_begins_is_noticed(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A:1 $B:0", special_tokens=[]
    )
    written(tmp_path, backend)
    assert not Tokenizer.from_directory(tmp_path).tells_pairs


def test_a_way_of_spelling_does_not_matter_where_nothing_is_spelled(tmp_path: Path) -> None:
    write_encoder(tmp_path, BERT)
    with pytest.raises(ConfigurationError, match="WordPiece"):
        Tokenizer.from_directory(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path, spells=False)
    tokens = tokenizer.encode("the quick fox", add_special_tokens=False)
    assert tokenizer.decode(tokens) == "the quick fox"
