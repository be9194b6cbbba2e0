"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``: the model's tokenizer over HTTP."""

from __future__ import annotations

from aiohttp import web

from understudy.actors.http_answers import json_response
from understudy.actors.http_generation import GenerationEndpoints
from understudy.protocol.openai.tokenization import parse_detokenize, parse_tokenize
from understudy.runtime.served_model import ServedModel


class TokenizationEndpoints:
    """The model's tokenizer.

    Args:
        served: The model.
        generation: Reads bodies, and renders conversations.
    """

    def __init__(self, served: ServedModel, generation: GenerationEndpoints) -> None:
        self._served = served
        self._generation = generation

    async def tokenize(self, http_request: web.Request) -> web.Response:
        """Answer ``POST /tokenize``."""
        raw = await self._generation.read(http_request)
        model = self._generation.model()
        asked = parse_tokenize(raw, model)
        if asked.chat is not None:
            prompt = await self._generation.chat_prompt(asked.chat, model, size=len(raw))
            tokens = list(prompt.tokens)
        else:
            assert asked.prompt is not None
            tokens = await self._generation.encode(
                asked.prompt, model, size=len(raw), add_special_tokens=asked.add_special_tokens
            )
        tokenizer = self._served.tokenizer
        strings = list(map(tokenizer.token_text, tokens)) if asked.with_strings else None
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": model.max_model_len,
                "tokens": tokens,
                "token_strs": strings,
            }
        )

    async def detokenize(self, http_request: web.Request) -> web.Response:
        """Answer ``POST /detokenize``. Special tokens are part of the text."""
        raw = await self._generation.read(http_request)
        tokens = parse_detokenize(raw, self._generation.model())
        text = self._served.tokenizer.decode(tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    async def info(self, _: web.Request) -> web.Response:
        """Answer ``GET /tokenizer_info``."""
        served = self._served
        tokenizer = served.tokenizer
        template = served.chat_template
        return json_response(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": None,
                "eos_token": None,
                **tokenizer.special_tokens,
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": served.max_model_len,
                "chat_template": None if template is None else template.source,
            }
        )
