"""The choices of one HTTP call: each is a request whose tokens become text here.

Knows text and the gateway's core, not HTTP. How a call's choices reach its client is decided by
``http_streams`` and, for answers in one piece, by ``http_collected``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from understudy.actors.gateway import Sink
from understudy.actors.http_containment import ContainedSink
from understudy.actors.http_unattended import Unattended
from understudy.protocol.errors import DeadlineExceeded, NotFound, RequestError
from understudy.protocol.messages import ClusterState, Found, TimelineRequest, Timelines, UsageReply
from understudy.protocol.openai.answer import finish_reason_or_error
from understudy.protocol.openai.deltas import Delta
from understudy.protocol.openai.logprobs import TokenLogprob, behind_first, spell_logprobs
from understudy.protocol.openai.presentation import Presentation
from understudy.protocol.packed_logprobs import unpack_logprobs
from understudy.protocol.request import FinishReason, Request, TokenRow
from understudy.runtime.detokenizer import Detokenizer
from understudy.runtime.parsers.output_parser import OutputParser, marks_of
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

    def attach(self, request_id: int, sink: Sink, position: int) -> None:
        """Join a request that was submitted before, by this gateway or another."""
        ...

    def cancel(self, request_id: int, sink: Sink) -> None:
        """Stop listening to a request; with its last listener it ends."""
        ...

    def leave(self, request_id: int, sink: Sink) -> None:
        """Stop listening to a request, and let it go on."""
        ...

    def park(self, request_id: int, sink: Sink) -> None:
        """Tell a sink nothing more for now."""
        ...

    def unpark(self, request_id: int, sink: Sink) -> None:
        """Tell a parked sink what it has missed, and go on."""
        ...

    def is_answered(self, request_id: int) -> bool:
        """Whether a submitted request was taken or refused."""
        ...

    def look_up(
        self, group_id: int, tenant: str, found: Callable[[Found | None], None], now: float
    ) -> None:
        """Ask which requests a group has."""
        ...

    def timelines(
        self, asked: TimelineRequest, told: Callable[[Timelines | None], None], now: float
    ) -> None:
        """Ask what became of requests."""
        ...

    def end_group(self, group_id: int, tenant: str, *, is_forgotten: bool = False) -> None:
        """End a call for all who listen; perhaps have it forgotten."""
        ...

    def ask_usage(self, tenant: str, told: Callable[[UsageReply | None], None]) -> None:
        """Ask what a tenant has used."""
        ...

    def when_serving(self, tell: Callable[[bool], None], now: float) -> None:
        """Have ``tell`` called once an engine serves, or with false if there is no hope of it."""
        ...


class _Open(NamedTuple):
    """A request that has not ended, as its call sees it."""

    output: ChoiceOutput
    sink: Sink


class OpenRequests:
    """The requests of one HTTP call that have not ended, so that none outlives it unasked."""

    def __init__(self, port: RequestPort, wake: Callable[[], None]) -> None:
        self._port = port
        self._wake = wake
        self._open: dict[int, _Open] = {}

    @property
    def are_answered(self) -> bool:
        """Whether none of them can be refused any more."""
        return all(map(self._port.is_answered, self._open))

    def submit(self, output: ChoiceOutput, sink: Sink, now: float) -> None:
        """Hand in a request. One without room for a token, an echo of its prompt, ends at once."""
        request = output.request
        if request.params.max_tokens == 0:
            sink.deliver(TokenRow(request.request_id, 0, 0, (), 0, FinishReason.LENGTH), "")
            return
        sink = self._hold(output, sink)
        self._port.submit(request, sink, now)
        self._wake()

    def join(self, output: ChoiceOutput, sink: Sink) -> None:
        """Join a request that was submitted before; all of its output comes again."""
        request_id = output.request.request_id
        self._port.attach(request_id, self._hold(output, sink), 0)
        self._wake()

    def close(self, request_id: int, *, has_ended: bool) -> None:
        """A choice is complete. Unless its request has ended by itself, it is cancelled."""
        closed = self._open.pop(request_id, None)
        if closed is not None and not has_ended:
            self._port.cancel(request_id, closed.sink)
            self._wake()

    def park_all(self) -> list[int]:
        """Let those go on unheard whose end does not depend on their text; gives their ids."""
        parked = [number for number, one in self._open.items() if not one.output.may_end_early]
        for request_id in parked:
            self._port.park(request_id, self._open[request_id].sink)
        return parked

    def unpark(self, request_ids: list[int]) -> None:
        """Hear again of those that have not ended meanwhile."""
        for request_id in request_ids:
            if request_id in self._open:
                self._port.unpark(request_id, self._open[request_id].sink)
        self._wake()

    def cancel_all(self) -> None:
        """End what has not ended."""
        for request_id in list(self._open):
            self.close(request_id, has_ended=False)

    def leave_all(self) -> None:
        """Let what has not ended go on without the client, who may come back for it."""
        left, self._open = self._open, {}
        for request_id, (output, sink) in left.items():
            if output.may_end_early:
                unattended = Unattended(output, self._port, self._wake)
                self._port.attach(request_id, unattended, output.num_tokens)
            self._port.leave(request_id, sink)
            self._wake()

    def fail_all(self, error: RequestError, *, go_on: bool) -> None:
        """Tell the client that this is the end here, and end the requests or let them go on."""
        sinks = [sink for _, sink in self._open.values()]
        if go_on:
            self.leave_all()
        else:
            self.cancel_all()
        for sink in sinks:
            sink.fail(error)

    def _hold(self, output: ChoiceOutput, sink: Sink) -> Sink:
        request_id = output.request.request_id
        contained = ContainedSink(sink, lambda: self.close(request_id, has_ended=False))
        self._open[request_id] = _Open(output, contained)
        return contained


class ChoiceOutput:
    """What one choice has come to.

    Args:
        request: The choice's request.
        presentation: How it is answered.
        tokenizer: The model's.
        delivered: How many tokens the client knows already, from an earlier stream.

    Attributes:
        request: The choice's request.
        index: Its number among the call's choices.
        num_tokens: Output tokens that count, the stop token included.
        num_cached_tokens: Tokens of the prompt that its first engine did not have to compute.
        num_reasoning_tokens: Of the output, those that are thoughts.
        finish_reason: OpenAI's word for the end, once it is reached.
        error: What it is told as, if the end is none that OpenAI has a word for.
        logprobs: Of tokens not yet told to the client; ``None`` if it did not ask.
        may_end_early: Whether the text may end before the request does.
        is_parsed: Whether the text is taken apart: then ``take_deltas`` tells it, not ``advance``.
    """

    __slots__ = (
        "_delivered",
        "_deltas",
        "_detokenizer",
        "_is_echoed",
        "_parser",
        "_tells_cancellation",
        "_tokenizer",
        "error",
        "finish_reason",
        "index",
        "is_parsed",
        "logprobs",
        "may_end_early",
        "num_cached_tokens",
        "num_reasoning_tokens",
        "num_tokens",
        "request",
    )

    def __init__(
        self,
        request: Request,
        presentation: Presentation,
        tokenizer: Tokenizer,
        *,
        delivered: int = 0,
    ) -> None:
        self.request = request
        self.index = presentation.index
        self.may_end_early = bool(presentation.stop or presentation.calls_max)
        self.is_parsed = presentation.is_parsed
        self._is_echoed = presentation.echoes_prompt
        self._tells_cancellation = presentation.endpoint == "responses"
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_reasoning_tokens = 0
        self.finish_reason: str | None = None
        self.error: RequestError | None = None
        self.logprobs: list[TokenLogprob] | None = None if request.params.logprobs is None else []
        self._delivered = delivered
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(
            tokenizer,
            prompt=request.prompt,
            stop=presentation.stop,
            include_stop=presentation.include_stop,
            min_tokens=request.params.min_tokens + len(request.params.echoed),
            marks=marks_of(
                tool_parser=presentation.tool_parser,
                reasoning_parser=presentation.reasoning_parser,
            ),
        )
        self._parser = OutputParser(presentation) if self.is_parsed else None
        self._deltas: list[Delta] = []

    @property
    def is_over(self) -> bool:
        """Whether nothing more may come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that it ended at, if it did."""
        return self._detokenizer.stop_string

    @property
    def is_replaying(self) -> bool:
        """Whether the client knows what comes next."""
        return self.num_tokens < self._delivered

    def replay(self, row: TokenRow) -> TokenRow:
        """Take in what the client knows of a row already; give the rest, perhaps nothing.

        It may be over then: the client has had the end, or there is no such position.
        """
        missing = self._delivered - self.num_tokens
        known = row._replace(tokens=row.tokens[:missing], logprobs=row.logprobs[:missing])
        rest = row._replace(
            position=row.position + len(known.tokens),
            tokens=row.tokens[missing:],
            logprobs=row.logprobs[missing:],
        )
        if not self._was_end(rest):
            known = known._replace(finish=0)
        self.advance(known)
        self.take_logprobs()
        self.take_deltas()
        has_ended = self.is_over or (row.finish and not rest.tokens)
        if has_ended and self.is_replaying:
            self.finish_reason = None
            self.error = NotFound("the stream has no such position")
        return rest

    def _was_end(self, rest: TokenRow) -> bool:
        """Whether a client that knows all but ``rest`` of the output has been told of its end.

        The end comes with the last token, unless no engine had room for one more.
        """
        has_room = self._delivered < self.request.params.max_tokens
        return not rest.tokens and (
            rest.finish == FinishReason.STOP
            or (rest.finish == FinishReason.LENGTH and not has_room)
        )

    def advance(self, row: TokenRow) -> str:
        """Take in a row; give the text that it adds."""
        self.num_cached_tokens = self.num_cached_tokens or row.num_cached_tokens
        if self._parser is not None:
            self._advance_parsed(row, self._parser)
            return ""
        return self._advance(row)

    def take_deltas(self) -> list[Delta]:
        """What the text means, since the last call. Each piece is from one token."""
        taken, self._deltas = self._deltas, []
        return taken

    def _advance_parsed(self, row: TokenRow, parser: OutputParser) -> None:
        """The same token by token, so that the pieces do not depend on how tokens came.

        That a last token is the last is told behind it: it may come with its token, or later.
        """
        if not row.finish and len(row.tokens) == 1:
            self._parse(self._advance(row), parser)
        else:
            self._advance_by_tokens(row, parser)
        if self.finish_reason is not None:
            self._deltas += parser.finish()
            if self.finish_reason == "stop" and parser.num_calls:
                self.finish_reason = "tool_calls"

    def _parse(self, text: str, parser: OutputParser) -> None:
        """Find out what the text of one token means."""
        if text:
            self._deltas += parser.push(text)
        self.num_reasoning_tokens += parser.is_thinking
        if parser.is_stopped and not self.is_over:
            self.finish_reason = "stop"

    def _advance_by_tokens(self, row: TokenRow, parser: OutputParser) -> None:
        ends_later = row.finish != FinishReason.STOP
        last = len(row.tokens) - 1
        for place in range(len(row.tokens)):
            single = row._replace(
                tokens=row.tokens[place : place + 1],
                logprobs=row.logprobs[place : place + 1],
                finish=0 if ends_later or place < last else row.finish,
            )
            self._parse(self._advance(single), parser)
            if self.is_over:
                break
        if row.finish and not self.is_over:
            self._deltas += parser.push(self._advance(row._replace(tokens=(), logprobs=())))

    def _advance(self, row: TokenRow) -> str:
        if self.logprobs is not None and row.logprobs:
            return self._advance_with_logprobs(row, self.logprobs)
        text, num_tokens, is_stopped = self._detokenizer.push(row.tokens, row.finish)
        self.num_tokens += num_tokens
        if is_stopped:
            self.finish_reason = "stop"
        elif row.finish:
            self._end(row.finish)
        return text

    def told_logprobs(self) -> list[TokenLogprob] | None:
        """All log probabilities, those of a prompt that is told as well."""
        if self.logprobs is None or not self._is_echoed:
            return self.logprobs
        first = self.request.prompt[0]
        return behind_first(
            self.logprobs, self._tokenizer.spell(first), self._tokenizer.decode([first])
        )

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
        for place, (token, packed) in enumerate(zip(row.tokens, row.logprobs, strict=True)):
            entries.append(
                spell_logprobs(
                    token,
                    unpack_logprobs(packed),
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
        if finish == FinishReason.CANCELLED and self._tells_cancellation:
            self.finish_reason = "cancelled"
            return
        outcome = finish_reason_or_error(FinishReason(finish))
        if finish == FinishReason.DEADLINE and not self.num_tokens:
            outcome = DeadlineExceeded("the deadline passed before there was a token")
        if isinstance(outcome, RequestError):
            self.error = outcome
        else:
            self.finish_reason = outcome
