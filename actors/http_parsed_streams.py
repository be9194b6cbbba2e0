"""The sink of a streamed choice whose text is taken apart: reasoning, content, calls of tools.

Beside the plain sink in ``http_streams``, which knows nothing but text and is the path of nearly
every token of a model without parsers.
"""

from __future__ import annotations

from typing import Protocol

from understudy.actors.http_choices import ChoiceOutput
from understudy.protocol.errors import RequestError
from understudy.protocol.openai.answer import engine_comment
from understudy.protocol.openai.streamed import DeltaEncoder, Told
from understudy.protocol.request import TokenRow


class Stream(Protocol):
    """What a choice uses of its stream."""

    is_flowing: bool

    def write(self, data: bytes) -> None:
        """Write to the connection."""
        ...

    def wake(self) -> None:
        """Have the handler's task look at what is held."""
        ...

    def choice_over(self, output: ChoiceOutput, *, has_ended: bool) -> None:
        """The choice has reached its end."""
        ...


class ParsedChoice:
    """See ``Sink``.

    Args:
        output: What the choice has come to.
        encoder: Shapes what is told.
        stream: Where it is told.
    """

    def __init__(self, output: ChoiceOutput, encoder: DeltaEncoder, stream: Stream) -> None:
        self._output = output
        self._encoder = encoder
        self._stream = stream
        self._engine = ""
        self._comment = b""
        self._is_opened = False
        self._is_complete = False

    @property
    def is_replaying(self) -> bool:
        """Whether the client knows what comes next."""
        return self._output.is_replaying

    def deliver(self, row: TokenRow, engine: str) -> None:
        """See ``Sink``."""
        output, stream = self._output, self._stream
        if output.is_replaying:
            row = output.replay(row)
            if output.is_over:
                self._is_complete = True  # the client had its end, too
                stream.choice_over(output, has_ended=bool(row.finish))
            if output.is_over or not (row.tokens or row.finish):
                stream.wake()
                return
        output.advance(row)
        if engine != self._engine:
            self._engine = engine
            self._comment = engine_comment(engine, output.index) if engine else b""
        if stream.is_flowing:
            self.flush()
        if output.is_over:
            stream.choice_over(output, has_ended=bool(row.finish))
        if not stream.is_flowing:
            stream.wake()

    def fail(self, error: RequestError) -> None:
        """See ``Sink``."""
        self._output.error = error
        self._stream.choice_over(self._output, has_ended=True)

    def flush(self) -> None:
        """Write what is held."""
        events = b""
        output = self._output
        told = Told(
            num_prompt_tokens=len(output.request.prompt),
            num_tokens=output.num_tokens,
            num_cached_tokens=output.num_cached_tokens,
            num_reasoning_tokens=output.num_reasoning_tokens,
            finish_reason=output.finish_reason,
            stop_string=output.stop_string,
        )
        if not self._is_opened:
            self._is_opened = True
            events = self._encoder.opening(told._replace(num_tokens=0, finish_reason=None))
        if not self._is_complete:
            deltas = output.take_deltas()
            logprobs = output.take_logprobs()
            events += self._encoder.encode(deltas, told, logprobs=logprobs)
            self._is_complete = output.finish_reason is not None
        if events:
            self._stream.write(self._comment + events)
            self._comment = b""
