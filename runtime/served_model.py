"""What a gateway knows of the model that it offers: its name, its text side and its limits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from understudy.protocol.errors import ConfigurationError
from understudy.protocol.openai.sampling import ModelTraits
from understudy.protocol.request import PoolingKind
from understudy.runtime.chat_template import ChatTemplate
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.encoder_config import EncoderConfig, read_config
from understudy.runtime.model.pooling_config import pooling_of
from understudy.runtime.parsers.output_parser import marks_of
from understudy.runtime.tokenizer import Tokenizer, read_settings

N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model directory, read as far as a gateway needs it. Imports no torch."""

    name: str
    directory: Path
    config: ModelConfig | EncoderConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    max_model_len: int
    """The longest prompt and answer together, in tokens."""
    created: int
    """When it was read, in seconds since 1970."""
    tool_parser: str = ""
    """The format in which the model calls tools; empty: none that is known."""
    reasoning_parser: str = ""
    """The format in which it thinks before it answers."""
    pooling: PoolingKind = PoolingKind.LAST
    """How it turns a prompt into a vector."""

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        *,
        name: str,
        max_model_len: int | None,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> ServedModel:
        """Read a model directory; ``max_model_len`` ``None`` is as long as the model can.

        Raises:
            ConfigurationError: this directory cannot be served.
        """
        config = read_config(directory)
        longest = config.max_model_len
        if max_model_len is not None and max_model_len > longest:
            raise ConfigurationError(
                f"max_model_len {max_model_len} is more than the model's {longest}"
            )
        generates = isinstance(config, ModelConfig)
        tokenizer = Tokenizer.from_directory(directory, spells=generates)
        pooling = pooling_of(directory, config)
        if pooling is PoolingKind.SCORE and not tokenizer.tells_pairs:
            raise ConfigurationError(f"{directory}: the tokenizer's pairs are not supported")
        template = ChatTemplate.from_directory(
            directory,
            configured=read_settings(directory).chat_template,
            special_tokens=tokenizer.special_tokens,
        )
        return cls(
            name=name,
            directory=directory,
            config=config,
            tokenizer=tokenizer,
            chat_template=template,
            max_model_len=max_model_len or longest,
            created=int(time.time()),
            tool_parser=tool_parser or "",
            reasoning_parser=reasoning_parser or "",
            pooling=pooling,
        )

    def traits(self, *, max_model_len: int) -> ModelTraits:
        """What a request is checked against; ``max_model_len`` 0 is not known."""
        sampling = self.config.sampling
        marks = marks_of(tool_parser=self.tool_parser, reasoning_parser=self.reasoning_parser)
        eos = {*self.config.eos_token_ids}
        if self.tokenizer.eos_token_id is not None:
            eos.add(self.tokenizer.eos_token_id)
        return ModelTraits(
            name=self.name,
            vocab_size=self.config.vocab_size,
            max_model_len=min(self.max_model_len, max_model_len or self.max_model_len),
            eos_token_ids=tuple(sorted(eos)),
            temperature=_or(sampling.temperature, 1.0),
            top_p=_or(sampling.top_p, 1.0),
            top_k=_or(sampling.top_k, 0),
            min_p=_or(sampling.min_p, 0.0),
            repetition_penalty=_or(sampling.repetition_penalty, 1.0),
            tool_parser=self.tool_parser,
            reasoning_parser=self.reasoning_parser,
            mark_ids=tuple(self.tokenizer.special_marks(marks).items()),
            pooling=self.pooling,
            hidden_size=self.config.hidden_size,
            generates=isinstance(self.config, ModelConfig),
        )


def _or(value: N | None, default: N) -> N:
    return default if value is None else value
