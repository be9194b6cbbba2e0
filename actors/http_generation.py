"""The endpoints that generate: from a body to requests, which ``http_answers`` answers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal, NamedTuple, TypeVar

from aiohttp import hdrs, web

from understudy.actors.http_access import with_rights
from understudy.actors.http_answers import Answers, Call, HttpLimits
from understudy.actors.http_rejoin import (
    StreamEndpoints,
    body_digest,
    idempotency_key,
    is_resumable_call,
)
from understudy.protocol.errors import (
    AlreadySubmitted,
    ContextLengthExceeded,
    InvalidRequest,
    PayloadTooLarge,
)
from understudy.protocol.messages import ClusterState
from understudy.protocol.openai import chat
from understudy.protocol.openai.answer import system_fingerprint
from understudy.protocol.openai.completions import (
    DEFAULT_MAX_TOKENS,
    PromptInput,
    parse_completion,
)
from understudy.protocol.openai.presentation import Presentation, encode_presentation
from understudy.protocol.openai.sampling import Generation, ModelTraits, make_requests
from understudy.protocol.request import Request
from understudy.runtime.served_model import ServedModel

T = TypeVar("T")

INLINE_BYTES_MAX: Final = 16 << 10
"""Prompts of longer bodies are encoded on a thread, so that streams do not wait for them."""


class _Prepared(NamedTuple):
    """What a body asks for, before it is settled who will hear of it."""

    endpoint: Literal["chat", "completions"]
    generation: Generation
    requests: Sequence[Request]
    """One for each choice, in order."""
    echoes: Sequence[str | None]
    """What each choice's text begins with; ``None`` if not with the prompt."""
    ignored: tuple[str, ...]


class GenerationEndpoints:
    """``POST /v1/chat/completions`` and ``POST /v1/completions``.

    Args:
        served: The model.
        answers: Where calls are answered.
        streams: Where calls are joined that came before.
        cluster: Tells what is known of the cluster.
        limits: What a client may take.
        wall_clock: Seconds since 1970, for ``created``.
        draw: Gives a random number of so many bits, for ids and seeds.
    """

    def __init__(
        self,
        served: ServedModel,
        answers: Answers,
        streams: StreamEndpoints,
        *,
        cluster: Callable[[], ClusterState],
        limits: HttpLimits,
        wall_clock: Callable[[], float],
        draw: Callable[[int], int],
    ) -> None:
        self._served = served
        self._answers = answers
        self._streams = streams
        self._cluster = cluster
        self._limits = limits
        self._wall_clock = wall_clock
        self._draw = draw
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")

    def close(self) -> None:
        """Give the threads back."""
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def chat_completions(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``POST /v1/chat/completions``."""
        model = self._model()
        raw = await self._read(http_request)
        body = chat.parse_chat(raw, model)
        prompt = await self._chat_prompt(body, model, size=len(raw))
        requests = make_requests(
            body.generation, prompt, model, draw=self._draw, default_max_tokens=None
        )
        echoes = [None] * len(requests)
        prepared = _Prepared("chat", body.generation, requests, echoes, body.ignored)
        return await self._answer(http_request, raw, prepared)

    async def completions(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``POST /v1/completions``."""
        model = self._model()
        raw = await self._read(http_request)
        body = parse_completion(raw, model)
        requests: list[Request] = []
        echoes: list[str | None] = []
        for given in body.prompts:
            prompt = await self._prompt(given, model, size=len(raw))
            requests += make_requests(
                body.generation,
                prompt,
                model,
                draw=self._draw,
                default_max_tokens=DEFAULT_MAX_TOKENS,
                group_id=requests[0].group_id if requests else None,
            )
            echo = None
            if body.echo:
                echo = given if isinstance(given, str) else self._served.tokenizer.decode(given)
            echoes += [echo] * body.generation.n
        prepared = _Prepared("completions", body.generation, requests, echoes, body.ignored)
        return await self._answer(http_request, raw, prepared)

    def _model(self) -> ModelTraits:
        return self._served.traits(max_model_len=self._cluster().max_model_len)

    async def _read(self, http_request: web.Request) -> bytes:
        """The body, if it is one that can be JSON."""
        has_type = hdrs.CONTENT_TYPE in http_request.headers
        if has_type and http_request.content_type != "application/json":
            raise InvalidRequest("the content type must be application/json")
        if http_request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
            raise InvalidRequest("a compressed body is not supported")
        length = http_request.content_length
        if length is not None and length > self._limits.body_bytes_max:
            raise PayloadTooLarge(f"the body is larger than {self._limits.body_bytes_max} bytes")
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                return await http_request.read()
        except TimeoutError:
            raise InvalidRequest("the body did not arrive in time") from None
        except web.RequestPayloadError as error:
            raise InvalidRequest(f"the body cannot be read: {error}") from None

    async def _chat_prompt(
        self, body: chat.ChatCompletion, model: ModelTraits, *, size: int
    ) -> tuple[int, ...]:
        template = self._served.chat_template
        if template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )

        def render_and_encode() -> list[int]:
            text = template.render(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                kwargs=body.template_kwargs,
            )
            return self._encode(text, model, add_special_tokens=False)

        prompt = await self._run(render_and_encode, size=size)
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="messages")
        return self._checked(prompt, model)

    async def _prompt(
        self, given: PromptInput, model: ModelTraits, *, size: int
    ) -> tuple[int, ...]:
        if not isinstance(given, str):
            return given

        def encode() -> list[int]:
            return self._encode(given, model, add_special_tokens=True)

        prompt = await self._run(encode, size=size)
        if not prompt:
            # An empty prompt begins a text, or follows the end of one.
            tokenizer = self._served.tokenizer
            ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            prompt = [token for token in ends if token is not None][:1]
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        return self._checked(prompt, model)

    def _encode(self, text: str, model: ModelTraits, *, add_special_tokens: bool) -> list[int]:
        fewest = self._served.tokenizer.fewest_tokens(text)
        if fewest > model.max_model_len:
            raise ContextLengthExceeded(
                f"the model's context is {model.max_model_len} tokens; "
                f"the prompt has at least {fewest}",
                param="prompt",
            )
        return self._served.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _checked(self, prompt: list[int], model: ModelTraits) -> tuple[int, ...]:
        """The prompt, if the model has an embedding for each token: tokenizers may know more."""
        if max(prompt) >= model.vocab_size:
            raise InvalidRequest("the prompt has a token that the model lacks", param="prompt")
        return tuple(prompt)

    async def _run(self, work: Callable[[], T], *, size: int) -> T:
        """Do ``work`` for a body of ``size`` bytes, here or where it holds nobody up."""
        if size <= INLINE_BYTES_MAX:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    async def _answer(
        self, http_request: web.Request, raw: bytes, prepared: _Prepared
    ) -> web.StreamResponse:
        """Submit and answer a call, or join the one that it repeats."""
        key = idempotency_key(http_request)
        presentations = self._presentations(
            prepared, is_resumable=bool(key) or is_resumable_call(http_request)
        )
        digest = body_digest(http_request, raw) if key else b""
        requests = [
            dataclasses.replace(
                request,
                presentation=encode_presentation(presentation),
                idempotency_key=key,
                body_digest=digest,
            )
            for request, presentation in zip(prepared.requests, presentations, strict=True)
        ]
        requests = with_rights(http_request, requests)
        call = Call(
            requests=requests,
            presentations=presentations,
            echoes=[echo or "" for echo in prepared.echoes],
            ignored=prepared.ignored,
        )
        try:
            return await self._answers.answer(http_request, call)
        except AlreadySubmitted as submitted:
            original_group_id = submitted.original_group_id
        return await self._streams.join(http_request, original_group_id, prepared.ignored)

    def _presentations(self, prepared: _Prepared, *, is_resumable: bool) -> list[Presentation]:
        """How each choice will be answered, here or elsewhere."""
        generation = prepared.generation
        created = int(self._wall_clock())
        fingerprint = system_fingerprint(self._cluster().numerics)
        presentations = []
        for index, (request, echo) in enumerate(
            zip(prepared.requests, prepared.echoes, strict=True)
        ):
            kept_echo = None
            if echo and index % generation.n == 0:
                spelled = self._served.tokenizer.decode(request.prompt)
                kept_echo = None if echo == spelled else echo
            presentations.append(
                Presentation(
                    endpoint=prepared.endpoint,
                    created=created,
                    model=self._served.name,
                    index=index,
                    num_choices=len(prepared.requests),
                    n=generation.n,
                    stop=generation.stop,
                    include_stop=generation.include_stop,
                    stream=generation.stream,
                    include_usage=generation.include_usage,
                    continuous_usage=generation.continuous_usage,
                    is_resumable=is_resumable,
                    echoes_prompt=echo is not None,
                    echo=kept_echo,
                    system_fingerprint=fingerprint,
                )
            )
        return presentations
