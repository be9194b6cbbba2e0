"""The choices of one HTTP call: each is a request whose tokens become text here.

Knows text and the gateway's core, not HTTP. How a call's choices reach its client is decided by
``http_streams`` and, for answers in one piece, at the end of this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from understudy.actors.gateway import Sink
from understudy.protocol.errors import RequestError
from understudy.protocol.messages import ClusterState
from understudy.protocol.openai.answer import Answer, finish_reason_or_error
from understudy.protocol.openai.logprobs import TokenLogprob, spell_logprobs
from understudy.protocol.openai.sampling import Generation
from understudy.protocol.request import FinishReason, Request, TokenRow
from understudy.runtime.detokenizer import Detokenizer
from understudy.runtime.tokenizer import Tokenizer


class RequestPort(Protocol):
    """What the HTTP side uses of the gateway's core, and of the fake that stands in for it."""

    @property
    def cluster(self) -> ClusterState:
        """What the supervisor last said of the cluster."""
        ...

    @property
    def is_connected(self) -> bool:
        """Whether there is a session with the supervisor."""
        ...

    def submit(self, request: Request, sink: Sink, now: float) -> None:
        """Hand in a request."""
        ...

    def cancel(self, request_id: int) -> None:
        """End a request; its sink hears nothing more."""
        ...


class OpenRequests:
    """The requests of one HTTP call that have not ended, so that none outlives the call."""

    def __init__(self, port: RequestPort, wake: Callable[[], None]) -> None:
        self._port = port
        self._wake = wake
        self._sinks: dict[int, Sink] = {}

    def submit(self, request: Request, sink: Sink, now: float) -> None:
        """Hand in a request. One without room for a token, an echo of its prompt, ends at once."""
        if request.params.max_tokens == 0:
            sink.deliver(TokenRow(request.request_id, 0, 0, (), 0, FinishReason.LENGTH), "")
            return
        self._sinks[request.request_id] = sink
        self._port.submit(request, sink, now)
        self._wake()

    def close(self, request_id: int, *, has_ended: bool) -> None:
        """A choice is complete. Unless its request has ended by itself, it is cancelled."""
        if self._sinks.pop(request_id, None) is not None and not has_ended:
            self._port.cancel(request_id)
            self._wake()

    def cancel_all(self) -> None:
        """End what has not ended."""
        for request_id in list(self._sinks):
            self.close(request_id, has_ended=False)

    def fail_all(self, error: RequestError) -> None:
        """End what has not ended, and tell the client why."""
        sinks = list(self._sinks.values())
        self.cancel_all()
        for sink in sinks:
            sink.fail(error)


class ChoiceOutput:
    """What one choice has come to.

    Attributes:
        request: The choice's request.
        index: Its number among the call's choices.
        num_tokens: Output tokens that count, the stop token included.
        finish_reason: OpenAI's word for the end, once it is reached.
        error: What it is told as, if the end is none that OpenAI has a word for.
        logprobs: Of tokens not yet told to the client; ``None`` if it did not ask.
    """

    __slots__ = (
        "_detokenizer",
        "_tokenizer",
        "error",
        "finish_reason",
        "index",
        "logprobs",
        "num_tokens",
        "request",
    )

    def __init__(
        self, request: Request, index: int, generation: Generation, tokenizer: Tokenizer
    ) -> None:
        self.request = request
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.error: RequestError | None = None
        self.logprobs: list[TokenLogprob] | None = None if request.params.logprobs is None else []
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(
            tokenizer,
            prompt=request.prompt,
            stop=generation.stop,
            include_stop=generation.include_stop,
            min_tokens=request.params.min_tokens,
        )

    @property
    def is_over(self) -> bool:
        """Whether nothing more may come."""
        return self.finish_reason is not None or self.error is not None

    def advance(self, row: TokenRow) -> str:
        """Take in a row; give the text that it adds."""
        if self.logprobs is not None and row.logprobs:
            return self._advance_with_logprobs(row, self.logprobs)
        text, num_tokens, is_stopped = self._detokenizer.push(row.tokens, row.finish)
        self.num_tokens += num_tokens
        if is_stopped:
            self.finish_reason = "stop"
        elif row.finish:
            self._end(row.finish)
        return text

    def take_logprobs(self) -> list[TokenLogprob] | None:
        """The log probabilities since the last call."""
        taken = self.logprobs
        if taken is not None:
            self.logprobs = []
        return taken

    def _advance_with_logprobs(self, row: TokenRow, entries: list[TokenLogprob]) -> str:
        """The same token by token, since each entry says where its token's text starts."""
        texts = []
        last = len(row.tokens) - 1
        for place, (token, logprobs) in enumerate(zip(row.tokens, row.logprobs, strict=True)):
            entries.append(
                spell_logprobs(
                    token,
                    logprobs,
                    offset=self._detokenizer.num_characters,
                    spell=self._tokenizer.spell,
                )
            )
            finish = row.finish if place == last else 0
            text, _, is_stopped = self._detokenizer.push((token,), finish)
            texts.append(text)
            self.num_tokens += 1
            if is_stopped:
                self.finish_reason = "stop"
                return "".join(texts)
        if row.finish:
            self._end(row.finish)
        return "".join(texts)

    def _end(self, finish: int) -> None:
        outcome = finish_reason_or_error(FinishReason(finish))
        if isinstance(outcome, RequestError):
            self.error = outcome
        else:
            self.finish_reason = outcome


class _CollectedChoice:
    """The sink of a choice that is answered in one piece."""

    def __init__(self, output: ChoiceOutput, text: str, collection: CollectedAnswer) -> None:
        self.output = output
        self._texts = [text]
        self._collection = collection

    def deliver(self, row: TokenRow, engine: str) -> None:  # noqa: ARG002
        """See ``Sink``."""
        self._texts.append(self.output.advance(row))
        if self.output.is_over:
            self._collection.choice_over(self.output, has_ended=bool(row.finish))

    def fail(self, error: RequestError) -> None:
        """See ``Sink``."""
        self.output.error = error
        self._collection.choice_over(self.output, has_ended=True)

    def answer(self) -> Answer:
        """The complete choice."""
        output = self.output
        assert output.finish_reason is not None
        return Answer(
            index=output.index,
            text="".join(self._texts),
            num_tokens=output.num_tokens,
            finish_reason=output.finish_reason,
            logprobs=output.logprobs,
        )


class CollectedAnswer:
    """A call that is answered in one piece, when all its choices are over."""

    def __init__(self, requests: OpenRequests) -> None:
        self._requests = requests
        self._choices: list[_CollectedChoice] = []
        self._num_open = 0
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, output: ChoiceOutput, text: str) -> Sink:
        """Add a choice whose text begins with ``text``; give its sink."""
        choice = _CollectedChoice(output, text, self)
        self._choices.append(choice)
        self._num_open += 1
        return choice

    def choice_over(self, output: ChoiceOutput, *, has_ended: bool) -> None:
        """A choice has reached its end, or met a stop string before its request did."""
        self._requests.close(output.request.request_id, has_ended=has_ended)
        self._num_open -= 1
        if self._over.done():
            return
        if output.error is not None:
            self._over.set_exception(output.error)
        elif self._num_open == 0:
            self._over.set_result(None)

    async def wait(self) -> list[Answer]:
        """The choices in order.

        Raises:
            RequestError: one of them could not go on.
        """
        await self._over
        return [choice.answer() for choice in self._choices]
