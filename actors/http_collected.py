"""Answers in one piece: the choices of a call, collected until all of them are over."""

from __future__ import annotations

import asyncio

from understudy.actors.gateway import Sink
from understudy.actors.http_choices import ChoiceOutput, OpenRequests
from understudy.protocol.errors import RequestError
from understudy.protocol.openai.answer import Answer
from understudy.protocol.openai.deltas import Delta, put_together
from understudy.protocol.request import TokenRow


class _CollectedChoice:
    """The sink of a choice that is answered in one piece."""

    def __init__(self, output: ChoiceOutput, text: str, collection: CollectedAnswer) -> None:
        self.output = output
        self._texts = [text]
        self._tokens: list[int] = []
        self._deltas: list[Delta] = []
        self._collection = collection

    def deliver(self, row: TokenRow, engine: str) -> None:  # noqa: ARG002
        """See ``Sink``."""
        self._tokens += row.tokens
        self._texts.append(self.output.advance(row))
        self._deltas += self.output.take_deltas()
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
        text = "".join(self._texts)
        if output.is_parsed:
            text = put_together(self._deltas).content
        return Answer(
            index=output.index,
            text=text,
            num_tokens=max(0, output.num_tokens - len(output.request.params.echoed)),
            finish_reason=output.finish_reason,
            logprobs=output.told_logprobs(),
            deltas=self._deltas,
            num_reasoning_tokens=output.num_reasoning_tokens,
            stop_string=output.stop_string,
            request_id=output.request.request_id,
            num_cached_tokens=output.num_cached_tokens,
            token_ids=self._tokens[: output.num_tokens],
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
            self._requests.cancel_all()
        elif self._num_open == 0:
            self._over.set_result(None)

    def raise_error(self) -> None:
        """Raise what one of them could not go on for, if it is known already.

        Raises:
            RequestError: that.
        """
        if self._over.done():
            self._over.result()

    async def wait(self) -> list[Answer]:
        """The choices in order.

        Raises:
            RequestError: one of them could not go on.
        """
        try:
            await self._over
            return [choice.answer() for choice in self._choices]
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the choices, which know their collection: only a collector would free that."""
        self._choices.clear()
