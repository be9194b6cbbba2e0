"""The endpoints that generate: from a body to requests, and from choices to a response."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from aiohttp import hdrs, web

from understudy.actors.gateway import Sink
from understudy.actors.http_choices import (
    ChoiceOutput,
    CollectedAnswer,
    OpenRequests,
    RequestPort,
)
from understudy.actors.http_streams import EventStream
from understudy.protocol.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    PayloadTooLarge,
    Unavailable,
)
from understudy.protocol.openai import chat
from understudy.protocol.openai.answer import DONE, ChunkEncoder, Heading, usage, usage_event
from understudy.protocol.openai.completions import (
    CHUNK_KIND,
    DEFAULT_MAX_TOKENS,
    PromptInput,
    completion_chunk_encoder,
    completion_response,
    parse_completion,
)
from understudy.protocol.openai.sampling import Generation, ModelTraits, make_requests
from understudy.protocol.request import Request
from understudy.runtime.kit.clock import Clock
from understudy.runtime.served_model import ServedModel

T = TypeVar("T")

INLINE_BYTES_MAX: Final = 16 << 10
"""Prompts of longer bodies are encoded on a thread, so that streams do not wait for them."""

STOPPING: Final = "the gateway is stopping"


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What one client may take. The defaults are those of production."""

    body_bytes_max: int = 8 << 20
    body_timeout_s: float = 30.0
    keep_alive_s: float = 10.0
    write_timeout_s: float = 30.0
    shutdown_timeout_s: float = 30.0
    """How long open streams may go on when the gateway is told to stop."""


class _Endpoint(NamedTuple):
    """How one endpoint shapes its answers."""

    id_prefix: str
    chunk_kind: str
    respond: Callable[..., dict[str, Any]]
    make_encoder: Callable[..., ChunkEncoder]


_CHAT: Final = _Endpoint("chatcmpl", chat.CHUNK_KIND, chat.chat_response, chat.chat_chunk_encoder)
_COMPLETIONS: Final = _Endpoint(
    "cmpl",
    CHUNK_KIND,
    completion_response,
    completion_chunk_encoder,
)


class _Call(NamedTuple):
    """A call as it is about to be submitted."""

    endpoint: _Endpoint
    generation: Generation
    requests: Sequence[Request]
    """One for each choice, in order."""
    echoes: Sequence[str]
    """What each choice's text begins with."""
    num_prompt_tokens: int
    """Each prompt counted once."""
    ignored: tuple[str, ...]


class GenerationEndpoints:
    """``POST /v1/chat/completions`` and ``POST /v1/completions``.

    Args:
        port: The gateway's core.
        wake: Has the core's messages sent soon; called after each submission or cancellation.
        served: The model.
        limits: What a client may take.
        clock: Time for the core.
        wall_clock: Seconds since 1970, for ``created``.
        draw: Gives a random number of so many bits, for ids and seeds.
    """

    def __init__(
        self,
        port: RequestPort,
        wake: Callable[[], None],
        served: ServedModel,
        *,
        limits: HttpLimits,
        clock: Clock,
        wall_clock: Callable[[], float],
        draw: Callable[[int], int],
    ) -> None:
        self._port = port
        self._wake = wake
        self._served = served
        self._limits = limits
        self._clock = clock
        self._wall_clock = wall_clock
        self._draw = draw
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")
        self._calls: set[OpenRequests] = set()
        self._all_over = asyncio.Event()
        self._is_stopping = False

    async def stop(self) -> None:
        """Wait for the calls that are open, up to a limit; then end them with an error.

        No further ones are taken.
        """
        self._is_stopping = True
        try:
            async with asyncio.timeout(self._limits.shutdown_timeout_s):
                while self._calls:
                    self._all_over.clear()
                    await self._all_over.wait()
        except TimeoutError:
            for call in self._calls:
                call.fail_all(Unavailable(STOPPING))
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
        echoes = [""] * len(requests)
        return await self._answer(
            http_request,
            _Call(_CHAT, body.generation, requests, echoes, len(prompt), body.ignored),
        )

    async def completions(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``POST /v1/completions``."""
        model = self._model()
        raw = await self._read(http_request)
        body = parse_completion(raw, model)
        requests: list[Request] = []
        echoes: list[str] = []
        num_prompt_tokens = 0
        for given in body.prompts:
            prompt = await self._prompt(given, model, size=len(raw))
            num_prompt_tokens += len(prompt)
            requests += make_requests(
                body.generation,
                prompt,
                model,
                draw=self._draw,
                default_max_tokens=DEFAULT_MAX_TOKENS,
            )
            echo = ""
            if body.echo:
                echo = given if isinstance(given, str) else self._served.tokenizer.decode(given)
            echoes += [echo] * body.generation.n
        return await self._answer(
            http_request,
            _Call(_COMPLETIONS, body.generation, requests, echoes, num_prompt_tokens, body.ignored),
        )

    def _model(self) -> ModelTraits:
        return self._served.traits(max_model_len=self._port.cluster.max_model_len)

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

    async def _answer(self, http_request: web.Request, call: _Call) -> web.StreamResponse:
        if self._is_stopping:
            raise Unavailable(STOPPING)
        cluster = self._port.cluster
        needs_engine = any(request.params.max_tokens for request in call.requests)
        if needs_engine and cluster.engines_serving == 0:
            raise Unavailable(f"none of {cluster.engines_known} engines is serving")
        heading = Heading(
            f"{call.endpoint.id_prefix}-{call.requests[0].group_id:016x}",
            int(self._wall_clock()),
            self._served.name,
        )
        open_requests = OpenRequests(self._port, self._wake)
        self._calls.add(open_requests)
        try:
            if call.generation.stream:
                return await self._stream(http_request, call, heading, open_requests)
            return await self._collect(call, heading, open_requests)
        finally:
            open_requests.cancel_all()
            self._calls.discard(open_requests)
            if not self._calls:
                self._all_over.set()

    async def _collect(
        self, call: _Call, heading: Heading, open_requests: OpenRequests
    ) -> web.Response:
        """Answer in one piece."""
        collected = CollectedAnswer(open_requests)
        outputs = self._outputs(call)
        sinks = [
            collected.add(output, echo) for output, echo in zip(outputs, call.echoes, strict=True)
        ]
        self._submit(open_requests, call, sinks)
        answers = await collected.wait()
        body = call.endpoint.respond(heading, answers, num_prompt_tokens=call.num_prompt_tokens)
        return json_response(body, headers=_ignored_header(call.ignored))

    async def _stream(
        self,
        http_request: web.Request,
        call: _Call,
        heading: Heading,
        open_requests: OpenRequests,
    ) -> web.StreamResponse:
        """Answer as server-sent events."""
        generation = call.generation
        stream = EventStream(
            http_request,
            open_requests,
            headers=_ignored_header(call.ignored),
            keep_alive_s=self._limits.keep_alive_s,
            write_timeout_s=self._limits.write_timeout_s,
        )
        has_usage = generation.include_usage or generation.continuous_usage
        outputs = self._outputs(call)
        sinks = []
        for output, echo in zip(outputs, call.echoes, strict=True):
            encoder = call.endpoint.make_encoder(
                heading, output.request.request_id, output.index, has_usage=has_usage
            )
            sinks.append(
                stream.add(output, echo, encoder, reports_usage=generation.continuous_usage)
            )

        def last_event() -> bytes:
            if not generation.include_usage:
                return DONE
            counts = usage(call.num_prompt_tokens, sum(output.num_tokens for output in outputs))
            return usage_event(heading, call.endpoint.chunk_kind, counts) + DONE

        self._submit(open_requests, call, sinks)
        return await stream.run(last_event)

    def _outputs(self, call: _Call) -> list[ChoiceOutput]:
        return [
            ChoiceOutput(request, index, call.generation, self._served.tokenizer)
            for index, request in enumerate(call.requests)
        ]

    def _submit(self, open_requests: OpenRequests, call: _Call, sinks: Sequence[Sink]) -> None:
        now = self._clock.now()
        for request, sink in zip(call.requests, sinks, strict=True):
            open_requests.submit(request, sink, now)


def json_response(
    body: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """A response in one piece."""
    return web.Response(
        body=msgspec.json.encode(body),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def _ignored_header(ignored: tuple[str, ...]) -> dict[str, str]:
    return {"X-Ignored-Fields": ", ".join(ignored)} if ignored else {}
