"""The fake beside the gateway's core: it answers requests as it is told, without a cluster.

For tests and measurements of the HTTP side. Like the real core it brings each sink exactly one
end, and nothing after a cancellation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from understudy.actors.gateway import Sink
from understudy.protocol.errors import RequestError
from understudy.protocol.messages import ClusterState
from understudy.protocol.request import (
    FinishReason,
    Request,
    TokenLogprobs,
    TokenRow,
    extend_prefix_hash,
)

SERVING: Final = ClusterState(engines_serving=1, engines_known=1, max_model_len=0)


class _Scripted:
    """An open request, and how far it was answered."""

    def __init__(self, request: Request, sink: Sink) -> None:
        self.request = request
        self.sink = sink
        self.position = 0
        self.prefix_hash = 0


class ScriptedGateway:
    """Takes requests, and delivers what its user says.

    Args:
        script: If given, requests are answered by themselves with the tokens that it gives, one
            in each turn of the loop; an answer ends as an engine would end it.

    Attributes:
        cluster: As in ``Gateway``; to be set.
        is_connected: As in ``Gateway``; to be set.
        submitted: Every request so far.
        cancelled: Request ids, in the order of their cancellation.
    """

    def __init__(self, script: Callable[[Request], Iterable[int]] | None = None) -> None:
        self.cluster = SERVING
        self.is_connected = True
        self.submitted: list[Request] = []
        self.cancelled: list[int] = []
        self._script = script
        self._open: dict[int, _Scripted] = {}
        self._changed = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def wake(self) -> None:
        """What the HTTP side calls after each submission or cancellation."""

    def submit(self, request: Request, sink: Sink, now: float) -> None:  # noqa: ARG002
        """See ``Gateway``."""
        self.submitted.append(request)
        self._open[request.request_id] = _Scripted(request, sink)
        self._changed.set()
        if self._script is not None:
            self._play(request, iter(self._script(request)))

    def cancel(self, request_id: int) -> None:
        """See ``Gateway``."""
        if self._open.pop(request_id, None) is not None:
            self.cancelled.append(request_id)
            self._changed.set()

    async def wait_until(self, is_reached: Callable[[ScriptedGateway], bool]) -> None:
        """Wait until submissions and cancellations have brought about what is asked for."""
        while not is_reached(self):
            self._changed.clear()
            await self._changed.wait()

    def deliver(
        self,
        request: Request,
        *tokens: int,
        finish: int = 0,
        logprobs: tuple[TokenLogprobs, ...] = (),
        engine: str = "engine-0",
    ) -> None:
        """Bring a request its next tokens, and its end if ``finish`` says so."""
        scripted = self._open[request.request_id]
        scripted.prefix_hash = extend_prefix_hash(scripted.prefix_hash, tokens)
        row = TokenRow(
            request_id=request.request_id,
            attempt=1,
            position=scripted.position,
            tokens=tokens,
            prefix_hash=scripted.prefix_hash,
            finish=finish,
            logprobs=logprobs,
        )
        scripted.position += len(tokens)
        if finish:
            del self._open[request.request_id]
        scripted.sink.deliver(row, engine)

    def fail(self, request: Request, error: RequestError) -> None:
        """End a request with an error."""
        self._open.pop(request.request_id).sink.fail(error)

    def _play(self, request: Request, tokens: Iterable[int]) -> None:
        loop = asyncio.get_running_loop()
        params = request.params
        upcoming = iter(tokens)

        def step() -> None:
            scripted = self._open.get(request.request_id)
            if scripted is None:
                return
            token = next(upcoming)
            finish = 0
            if scripted.position >= params.min_tokens and token in params.stop_token_ids:
                finish = FinishReason.STOP
            elif scripted.position + 1 == params.max_tokens:
                finish = FinishReason.LENGTH
            self.deliver(request, token, finish=finish)
            if not finish:
                loop.call_soon(step)

        loop.call_soon(step)
