"""The endpoints that generate: from a body to requests, which ``http_answers`` answers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar

from aiohttp import hdrs, web

from understudy.actors.grammar_checks import GrammarChecks
from understudy.actors.http_access import priority_of, with_rights
from understudy.actors.http_answers import Answers, Call, HttpLimits
from understudy.actors.http_early_refusals import EarlyRefusals
from understudy.actors.http_frames import forget_frames
from understudy.actors.http_meaning import meaning_of, with_calls
from understudy.actors.http_rejoin import (
    StreamEndpoints,
    body_digest,
    idempotency_key,
    is_resumable_call,
    tenant_of,
)
from understudy.actors.http_return_times import ReturnTimes
from understudy.actors.http_thoughts import with_thinking
from understudy.protocol.errors import (
    AlreadySubmitted,
    ContextLengthExceeded,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
)
from understudy.protocol.messages import ClusterState
from understudy.protocol.openai import chat
from understudy.protocol.openai.answer import system_fingerprint
from understudy.protocol.openai.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    PromptInput,
    parse_completion,
)
from understudy.protocol.openai.presentation import (
    EndpointName,
    Presentation,
    encode_presentation,
)
from understudy.protocol.openai.sampling import (
    Generation,
    ModelTraits,
    make_requests,
    telling_prompt,
)
from understudy.protocol.request import Request
from understudy.runtime.parsers.reasoning import begins_inside
from understudy.runtime.served_model import ServedModel

T = TypeVar("T")

INLINE_BYTES_MAX: Final = 16 << 10
"""Prompts of longer bodies are encoded on a thread, so that streams do not wait for them."""


class Prepared(NamedTuple):
    """What a body asks for, before it is settled who will hear of it."""

    endpoint: EndpointName
    generation: Generation
    requests: Sequence[Request]
    """One for each choice, in order."""
    echoes: Sequence[str | None]
    """What each choice's text begins with; ``None`` if not with the prompt."""
    ignored: tuple[str, ...]
    meaning: Mapping[str, Any] = MappingProxyType({})
    """How the text is taken apart: fields of the presentation."""
    repeated: bytes = b""
    is_resumable: bool = False
    """Whether it goes on without its client, whatever the headers say."""


class ChatPrompt(NamedTuple):
    """A conversation as the model reads it."""

    tokens: tuple[int, ...]
    begins_in_reasoning: bool
    """Whether the answer begins inside the model's thoughts."""


class GenerationEndpoints:
    """``POST /v1/chat/completions`` and ``POST /v1/completions``.

    Args:
        served: The model.
        answers: Where calls are answered.
        streams: Where calls are joined that came before.
        grammars: Where grammars are checked.
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
        grammars: GrammarChecks,
        *,
        cluster: Callable[[], ClusterState],
        limits: HttpLimits,
        wall_clock: Callable[[], float],
        draw: Callable[[int], int],
    ) -> None:
        self._served = served
        self._answers = answers
        self._streams = streams
        self._grammars = grammars
        self._cluster = cluster
        self._limits = limits
        self._wall_clock = wall_clock
        self._draw = draw
        self._early_refusals = EarlyRefusals()
        self._return_times = ReturnTimes()
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")

    def close(self) -> None:
        """Give threads and processes back."""
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._grammars.close()

    async def chat_completions(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``POST /v1/chat/completions``."""
        raw = await self.read(http_request)
        body = chat.parse_chat(raw, self.model())
        self.refuse_early(http_request, body.generation, size=len(raw))
        prepared = await self.prepare_chat(body, size=len(raw))
        return await self.answer(http_request, raw, prepared)

    def refuse_early(self, http_request: web.Request, generation: Generation, *, size: int) -> None:
        """Refuse a call of ``size`` bytes before its prompt is read, if that can be told.

        Raises:
            Overloaded: the queue was full a moment ago.
        """
        if idempotency_key(http_request):
            return  # it may join a call that is there already
        now = asyncio.get_running_loop().time()
        refusal = self._early_refusals.find(
            tenant=tenant_of(http_request),
            priority=priority_of(http_request, generation.priority),
            num_bytes=size,
            now=now,
        )
        if refusal is not None:
            raise self._return_times.in_line(refusal, now)

    async def prepare_chat(
        self,
        body: chat.ChatCompletion,
        *,
        size: int,
        endpoint: EndpointName = "chat",
        repeated: bytes = b"",
    ) -> Prepared:
        """Make requests of a conversation, from whichever endpoint.

        Args:
            body: The conversation.
            size: Of the body that it came in, in bytes.
            endpoint: How it is to be answered.
            repeated: What the answer says again of the request.

        Raises:
            InvalidRequest: and its kinds; ``param`` names the field.
        """
        model = self.model()
        model.check_generates()
        prompt = await self.chat_prompt(body, model, size=size)
        generation = with_calls(body, model, begins_in_reasoning=prompt.begins_in_reasoning)
        generation = await self._with_grammar(generation)
        generation = with_thinking(
            generation,
            body,
            model,
            self._served.tokenizer,
            begins_in_reasoning=prompt.begins_in_reasoning,
        )
        requests = make_requests(
            generation, prompt.tokens, model, draw=self._draw, default_max_tokens=None
        )
        return Prepared(
            endpoint,
            generation,
            requests,
            [None] * len(requests),
            (*body.ignored, *self._unseen(body)),
            meaning=meaning_of(body, model, begins_in_reasoning=prompt.begins_in_reasoning),
            repeated=repeated,
        )

    def _unseen(self, body: chat.ChatCompletion) -> tuple[str, ...]:
        """Fields that do not reach the model, because its template has no place for them."""
        template = self._served.chat_template
        sees_tools = template is None or template.shows_tools or body.tool_use is None
        return () if sees_tools else ("tools",)

    async def completions(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``POST /v1/completions``."""
        raw = await self.read(http_request)
        body = parse_completion(raw, self.model())
        self.refuse_early(http_request, body.generation, size=len(raw))
        prepared = await self.prepare_completion(body, size=len(raw))
        return await self.answer(http_request, raw, prepared)

    async def prepare_completion(self, body: Completion, *, size: int) -> Prepared:
        """Make requests of prompts that came in a body of this size.

        Raises:
            InvalidRequest: and its kinds; ``param`` names the field.
        """
        model = self.model()
        model.check_generates()
        generation = await self._with_grammar(body.generation)
        requests: list[Request] = []
        echoes: list[str | None] = []
        for given in body.prompts:
            prompt = await self._prompt(given, model, size=size)
            made = make_requests(
                generation,
                prompt,
                model,
                draw=self._draw,
                default_max_tokens=DEFAULT_MAX_TOKENS,
                group_id=requests[0].group_id if requests else None,
            )
            is_told = body.echo and generation.sampling.logprobs is not None
            requests += map(telling_prompt, made) if is_told else made
            echo = None
            if body.echo:
                echo = given if isinstance(given, str) else self._served.tokenizer.decode(given)
            if is_told:  # the rest of it is output
                echo = self._served.tokenizer.decode(prompt[:1])
            echoes += [echo] * generation.n
        return Prepared("completions", generation, requests, echoes, body.ignored)

    async def _with_grammar(self, generation: Generation) -> Generation:
        """What a body asks for, with its grammar checked and settled."""
        if generation.grammar is None:
            return generation
        text = await self._grammars.check(generation.grammar)
        sampling = dataclasses.replace(generation.sampling, grammar=text)
        return dataclasses.replace(generation, sampling=sampling)

    def model(self) -> ModelTraits:
        """What requests are checked against."""
        return self._served.traits(max_model_len=self._cluster().max_model_len)

    async def read(self, http_request: web.Request) -> bytes:
        """The body, if it is one that can be JSON.

        Raises:
            InvalidRequest: it is not, or did not come in time.
            PayloadTooLarge: it is too large.
        """
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

    async def chat_prompt(
        self, body: chat.ChatCompletion, model: ModelTraits, *, size: int
    ) -> ChatPrompt:
        """A conversation of a body of this size, as the model reads it.

        Raises:
            InvalidRequest: the template refuses it, or it does not fit the context.
        """
        template = self._served.chat_template
        if template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )

        def render_and_encode() -> tuple[str, list[int]]:
            text = template.render(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                tools=None if body.tool_use is None else body.tool_use.shown(),
                kwargs=body.template_kwargs,
            )
            return text, self._encode(text, model, add_special_tokens=False)

        text, prompt = await self.run(render_and_encode, size=size)
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="messages")
        begins_in_reasoning = False
        if model.reasoning_parser:
            begun = body.messages[-1]["content"] if body.continue_final_message else None
            begins_in_reasoning = begins_inside(
                model.reasoning_parser, text, begun=begun if isinstance(begun, str) else None
            )
        return ChatPrompt(self._checked(prompt, model), begins_in_reasoning)

    async def _prompt(
        self, given: PromptInput, model: ModelTraits, *, size: int
    ) -> tuple[int, ...]:
        if not isinstance(given, str):
            return given

        prompt = await self.encode(given, model, size=size, add_special_tokens=True)
        if not prompt:
            # An empty prompt begins a text, or follows the end of one.
            tokenizer = self._served.tokenizer
            ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            prompt = [token for token in ends if token is not None][:1]
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        return self._checked(prompt, model)

    async def encode(
        self, text: str, model: ModelTraits, *, size: int, add_special_tokens: bool
    ) -> list[int]:
        """The tokens of a text, from a body of this size.

        Raises:
            ContextLengthExceeded: they are more than the context by far.
        """

        def encode() -> list[int]:
            return self._encode(text, model, add_special_tokens=add_special_tokens)

        return await self.run(encode, size=size)

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

    async def run(self, work: Callable[[], T], *, size: int) -> T:
        """Do ``work`` for a body of ``size`` bytes, here or where it holds nobody up."""
        if size <= INLINE_BYTES_MAX:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    async def answer(
        self, http_request: web.Request, raw: bytes, prepared: Prepared
    ) -> web.StreamResponse:
        """Submit and answer a call, or join the one that it repeats."""
        loop = asyncio.get_running_loop()
        try:
            response = await self._answers.answer(
                http_request, self.call(http_request, raw, prepared)
            )
        except AlreadySubmitted as submitted:
            original_group_id = submitted.original_group_id
            forget_frames(submitted)
        except Overloaded as error:
            self._early_refusals.note(
                error,
                tenant=tenant_of(http_request),
                priority=priority_of(http_request, prepared.generation.priority),
                num_bytes=len(raw),
                now=loop.time(),
            )
            raise self._return_times.in_line(error, loop.time()) from None
        else:
            self._return_times.call_ended(loop.time())
            return response
        return await self._streams.join(http_request, original_group_id, prepared.ignored)

    def call(self, http_request: web.Request, raw: bytes, prepared: Prepared) -> Call:
        """A call, with all that is needed to answer it here or elsewhere."""
        key = idempotency_key(http_request)
        is_resumable = prepared.is_resumable or bool(key) or is_resumable_call(http_request)
        presentations = self._presentations(prepared, is_resumable=is_resumable)
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
        return Call(
            requests=with_rights(http_request, requests),
            presentations=presentations,
            echoes=[echo or "" for echo in prepared.echoes],
            ignored=prepared.ignored,
        )

    def _presentations(self, prepared: Prepared, *, is_resumable: bool) -> list[Presentation]:
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
                    repeated=prepared.repeated,
                    **prepared.meaning,
                )
            )
        return presentations
