"""Anthropic's Messages API: ``/v1/messages`` and the count of a conversation's tokens."""

from __future__ import annotations

from aiohttp import web

from understudy.actors.http_answers import json_response
from understudy.actors.http_generation import GenerationEndpoints
from understudy.protocol.anthropic.messages import parse_messages

PATH = "/v1/messages"


class MessageEndpoints:
    """``POST /v1/messages`` and ``POST /v1/messages/count_tokens``.

    Args:
        generation: Makes calls of conversations, and answers them.
    """

    def __init__(self, generation: GenerationEndpoints) -> None:
        self._generation = generation

    async def create(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``POST /v1/messages``."""
        raw = await self._generation.read(http_request)
        chat = parse_messages(raw, self._generation.model())
        self._generation.refuse_early(http_request, chat.generation, size=len(raw))
        prepared = await self._generation.prepare_chat(chat, size=len(raw), endpoint="messages")
        return await self._generation.answer(http_request, raw, prepared)

    async def count_tokens(self, http_request: web.Request) -> web.Response:
        """Answer ``POST /v1/messages/count_tokens``."""
        raw = await self._generation.read(http_request)
        model = self._generation.model()
        chat = parse_messages(raw, model, needs_max_tokens=False)
        prompt = await self._generation.chat_prompt(chat, model, size=len(raw))
        return json_response({"input_tokens": len(prompt.tokens)})
