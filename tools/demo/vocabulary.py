"""The demo model's tokenizer: a byte-level BPE (Sennrich et al., 2016; Radford et al., 2019).

Knows text and token ids, and the chat turns around them; nothing of torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from understudy.tools.demo.corpus import Message

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
ASSISTANT_TURN = f"{TURN_START}assistant\n"
END_OF_TEXT_ID = SPECIAL_TOKENS.index(END_OF_TEXT)

# Words keep the one mark before them (`_file`, `.path`, ` name`), numbers are cut into threes, and
# an indentation is one piece with the line breaks before it left apart.
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The model answers code, so an assistant's turn ends the text instead of opening another turn; in a
# conversation that goes on, the end of the text stands between the turns as it did in training.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for part in message['content'] or [] -%}
{{- part['text'] if part['type'] == 'text' else '' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|endoftext|>' if message['role'] == 'assistant' else '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a tokenizer whose first ids are `SPECIAL_TOKENS`, in that order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def render_conversation(messages: Sequence[Message]) -> str:
    """What `CHAT_TEMPLATE` makes of `messages` without a generation prompt."""
    return "".join(
        f"{TURN_START}{message.role}\n{message.content.strip()}"
        + (END_OF_TEXT if message.role == "assistant" else f"{TURN_END}\n")
        for message in messages
    )


def write_tokenizer(tokenizer: Tokenizer, directory: Path, *, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for text in SPECIAL_TOKENS
        },
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
