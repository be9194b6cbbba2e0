"""Encoders with random weights, saved by ``transformers``, and their families' tokenizers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from tests.tiny_models import TEXTS, write_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import PreTrainedModel

BERT: Final = "BertModel"
ROBERTA: Final = "RobertaModel"
XLM_ROBERTA: Final = "XLMRobertaModel"
BERT_SCORER: Final = "BertForSequenceClassification"
ROBERTA_SCORER: Final = "RobertaForSequenceClassification"
XLM_ROBERTA_SCORER: Final = "XLMRobertaForSequenceClassification"
ENCODERS: Final = (BERT, ROBERTA, XLM_ROBERTA)
SCORERS: Final = (BERT_SCORER, ROBERTA_SCORER, XLM_ROBERTA_SCORER)

VOCAB_SIZE: Final = 480
LENGTH_MAX: Final = 128
_BERT_TOKENS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTA_TOKENS: Final = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def write_encoder(directory: Path, architecture: str, *, seed: int = 0, **settings: Any) -> Path:
    """Write a tiny encoder with its tokenizer, and give its directory."""
    config = encoder_config(architecture, **settings)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, architecture)(config)
        model.save_pretrained(directory)
    write_tokenizer(directory, _tokenizer(architecture))
    return directory


def encoder_config(architecture: str, **settings: Any) -> Any:
    """The configuration of a tiny encoder."""
    is_bert = architecture.startswith("Bert")
    family = architecture.removesuffix("ForSequenceClassification").removesuffix("Model")
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH_MAX if is_bert else LENGTH_MAX + 2,
        "type_vocab_size": 2 if is_bert else 1,
        "pad_token_id": 0 if is_bert else 1,
        "initializer_range": 0.2,
    }
    if architecture in SCORERS:
        shape["num_labels"] = 1
    return getattr(transformers, f"{family}Config")(**{**shape, **settings})


def reference(directory: Path, architecture: str) -> PreTrainedModel:
    """The same as ``transformers`` runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, architecture).from_pretrained(directory)
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


def write_sentence_transformers(directory: Path, mode: str) -> None:
    """Write what sentence-transformers writes beside a model."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
        {
            "idx": 2,
            "name": "2",
            "path": "2_Normalize",
            "type": "sentence_transformers.models.Normalize",
        },
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    names = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    flags = {f"pooling_mode_{name}": name.startswith(mode) for name in names}
    (directory / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": 48, **flags, "include_prompt": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))


def _tokenizer(architecture: str) -> Tokenizer:
    """The kind that an architecture comes with; two that are trained alike may differ."""
    if architecture.startswith("Bert"):
        return _wordpiece()
    return _unigram() if architecture.startswith("XLM") else _byte_level()


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=list(_BERT_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(_ROBERTA_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = _roberta_template()
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=list(_ROBERTA_TOKENS),
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = _roberta_template()
    return tokenizer


def _roberta_template() -> TemplateProcessing:
    return TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
