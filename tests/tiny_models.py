"""Model directories without weights, small enough to be written by each test that wants one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, TURN_START, TURN_END)
END_OF_TEXT_ID: Final = 0
TURN_END_ID: Final = 2

VOCAB_SIZE: Final = 480
"""The width of the logits; as in many a model, the tokenizer has fewer tokens."""

TEXTS: Final = (
    "the quick brown fox jumps over the lazy dog",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "いろはにほへと ちりぬるを 🦊🦊",
    "one two three four five six seven eight nine ten 0123456789",
)

CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer(*, special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> Tokenizer:
    """GPT-2's kind: byte-level BPE, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's kind: pieces with a mark for the space, and bytes for what no piece spells."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(
        ["\u2581" + text for text in TEXTS[:2]],
        trainers.BpeTrainer(vocab_size=200, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [piece for piece in model["vocab"] if piece not in first]
    vocab = {piece: token_id for token_id, piece in enumerate([*first, *pieces])}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(
    directory: Path,
    *,
    chat_template: str | None = CHATML,
    generation: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write all of a byte-level model that a gateway reads, and give its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer()
    settings: dict[str, Any] = {"eos_token": END_OF_TEXT}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    write_tokenizer(directory, tokenizer, **settings)
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "eos_token_id": END_OF_TEXT_ID,
    }
    (directory / "config.json").write_text(json.dumps(shape | config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory
