"""Text to tokens and back over HTTP, in vLLM's shapes."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.body import parse_body
from understudy.protocol.openai.chat import ChatCompletion, ChatFields, Message, check_chat
from understudy.protocol.openai.sampling import ModelTraits, check_model, check_token_ids
from understudy.protocol.openai.tools import Tool

TOKENS_MAX: Final = 1 << 20
"""Tokens that are spelled in one call."""


class TokenizeFields(msgspec.Struct, kw_only=True, frozen=True):
    """The JSON fields of ``POST /tokenize``: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeFields(msgspec.Struct, kw_only=True, frozen=True):
    """The JSON fields of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[int] | None = None


class Tokenize(NamedTuple):
    """What is to be tokenised: one of the two."""

    prompt: str | None
    chat: ChatCompletion | None
    add_special_tokens: bool
    with_strings: bool


def parse_tokenize(raw: bytes, model: ModelTraits) -> Tokenize:
    """Read and check the body of ``POST /tokenize``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, ignored = parse_body(raw, TokenizeFields)
    check_model(fields.model, model)
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    chat = None
    if fields.messages is not None:
        chat_fields = ChatFields(
            messages=fields.messages,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            chat_template_kwargs=fields.chat_template_kwargs,
            tools=fields.tools,
        )
        chat = check_chat(chat_fields, model, ignored=ignored)
    default = chat is None
    return Tokenize(
        fields.prompt,
        chat,
        default if fields.add_special_tokens is None else fields.add_special_tokens,
        fields.return_token_strs or False,
    )


def parse_detokenize(raw: bytes, model: ModelTraits) -> tuple[int, ...]:
    """Read and check the body of ``POST /detokenize``.

    Raises:
        InvalidRequest: and its kinds; ``param`` names the field.
    """
    fields, _ = parse_body(raw, DetokenizeFields)
    check_model(fields.model, model)
    if fields.tokens is None:
        raise InvalidRequest("tokens is missing", param="tokens")
    if len(fields.tokens) > TOKENS_MAX:
        raise InvalidRequest(f"tokens: at most {TOKENS_MAX}", param="tokens")
    return check_token_ids("tokens", fields.tokens, model.vocab_size)
