"""The fake beside the gateway's core: it answers requests as it is told, without a cluster.

For tests and measurements of the HTTP side. Like the real core it brings each sink exactly one
end, and nothing after a cancellation; and it keeps what it has answered, so that streams can be
joined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from understudy.actors.gateway import Sink
from understudy.protocol.errors import AlreadySubmitted, IdempotencyMismatch, RequestError
from understudy.protocol.messages import (
    ClusterState,
    Found,
    TimelineRequest,
    Timelines,
    UsageReply,
)
from understudy.protocol.packed_logprobs import pack_logprobs
from understudy.protocol.request import (
    FinishReason,
    Request,
    TokenLogprobs,
    TokenRow,
    extend_prefix_hash,
)
from understudy.protocol.timeline import (
    ASSIGNED,
    BEGUN,
    ENDED,
    QUEUED,
    RequestTimeline,
    TimelineEvent,
)
from understudy.protocol.usage import DayUsage

SERVING: Final = ClusterState(engines_serving=1, engines_known=1, max_model_len=0)


class _Scripted:
    """A request, how far it was answered, and who listens."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sinks: list[Sink] = []
        self.tokens: list[int] = []
        self.logprobs: list[bytes] = []
        self.prefix_hash = 0
        self.finish = 0
        self.vector = b""

    @property
    def row(self) -> TokenRow:
        """All of the output."""
        return TokenRow(
            request_id=self.request.request_id,
            attempt=1,
            position=0,
            tokens=tuple(self.tokens),
            prefix_hash=self.prefix_hash,
            finish=self.finish,
            logprobs=tuple(self.logprobs),
            vector=self.vector,
        )


class ScriptedGateway:
    """Takes requests, and delivers what its user says.

    Args:
        script: If given, requests are answered by themselves with the tokens that it gives, one
            in each turn of the loop; an answer ends as an engine would end it.

    Attributes:
        cluster: As in ``Gateway``; to be set.
        is_connected: As in ``Gateway``; to be set. Without a connection nothing is answered.
        is_hopeful: Whether there is hope for an engine while none serves; to be set.
        submitted: Every request so far that was taken.
        cancelled: Request ids, in the order of their cancellation.
        used: What each tenant has used; to be set.
        left: Request ids, in the order in which clients left them to themselves.
        parked: Sinks that are told nothing for now, and from which position on.
    """

    def __init__(self, script: Callable[[Request], Iterable[int]] | None = None) -> None:
        self.cluster = SERVING
        self.is_connected = True
        self.is_hopeful = False
        self.submitted: list[Request] = []
        self.cancelled: list[int] = []
        self.left: list[int] = []
        self.parked: dict[Sink, int] = {}
        self.used: dict[str, tuple[DayUsage, ...]] = {}
        self._script = script
        self._open: dict[int, _Scripted] = {}
        self._groups: dict[int, list[_Scripted]] = {}
        self._keys: dict[bytes, Request] = {}
        self._waiting: list[Callable[[bool], None]] = []
        self._unanswered: list[_Scripted] = []
        self._changed = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Calls that wait for an engine."""
        return len(self._waiting)

    def is_open(self, request: Request) -> bool:
        """Whether a request has not ended."""
        return request.request_id in self._open

    def num_listeners(self, request: Request) -> int:
        """How many sinks hear what comes of a request that has not ended."""
        return len(self._open[request.request_id].sinks)

    def wake(self) -> None:
        """What the HTTP side calls after each submission or cancellation."""

    def submit(self, request: Request, sink: Sink, now: float) -> None:  # noqa: ARG002
        """See ``Gateway``."""
        scripted = _Scripted(request)
        scripted.sinks.append(sink)
        self._open[request.request_id] = scripted
        if self.is_connected:
            self._take(scripted)
        else:
            self._unanswered.append(scripted)
        self._changed.set()

    def connect(self) -> None:
        """Have a session again, and hand in what was submitted meanwhile."""
        self.is_connected = True
        unanswered, self._unanswered = self._unanswered, []
        for scripted in unanswered:
            self._take(scripted)
        self._changed.set()

    def attach(self, request_id: int, sink: Sink, position: int) -> None:
        """See ``Gateway``. All that was delivered before comes in the next turn of the loop."""
        scripted = next(
            scripted
            for group in self._groups.values()
            for scripted in group
            if scripted.request.request_id == request_id
        )

        def catch_up() -> None:
            row = scripted.row._replace(
                position=position,
                tokens=tuple(scripted.tokens[position:]),
                logprobs=tuple(scripted.logprobs[position:]),
            )
            if not row.finish:
                scripted.sinks.append(sink)
                self._changed.set()
            if row.tokens or row.finish:
                sink.deliver(row, "")

        asyncio.get_running_loop().call_soon(catch_up)

    def cancel(self, request_id: int, sink: Sink) -> None:
        """See ``Gateway``."""
        scripted = self._open.get(request_id)
        if scripted is None or sink not in scripted.sinks:
            return
        scripted.sinks.remove(sink)
        if not scripted.sinks:
            del self._open[request_id]
            scripted.finish = FinishReason.CANCELLED
            self.cancelled.append(request_id)
            self._changed.set()

    def leave(self, request_id: int, sink: Sink) -> None:
        """See ``Gateway``."""
        scripted = self._open.get(request_id)
        if scripted is not None:
            scripted.sinks.remove(sink)
            self.left.append(request_id)
            self._changed.set()

    def park(self, request_id: int, sink: Sink) -> None:
        """See ``Gateway``."""
        if request_id in self._open:
            self.parked[sink] = len(self._open[request_id].tokens)
            self._changed.set()

    def unpark(self, request_id: int, sink: Sink) -> None:
        """See ``Gateway``."""
        if (position := self.parked.pop(sink, None)) is not None:
            if request_id in self._open:
                self._open[request_id].sinks.remove(sink)
            self.attach(request_id, sink, position)

    def is_answered(self, request_id: int) -> bool:
        """See ``Gateway``."""
        return all(scripted.request.request_id != request_id for scripted in self._unanswered)

    def look_up(
        self,
        group_id: int,
        tenant: str,
        found: Callable[[Found | None], None],
        now: float,  # noqa: ARG002
    ) -> None:
        """See ``Gateway``. The answer comes behind refusals of what was submitted before."""
        group = [one for one in self._groups.get(group_id, []) if one.request.tenant == tenant]
        requests = tuple(scripted.request for scripted in group)
        lengths = tuple(len(scripted.tokens) for scripted in group)
        finishes = tuple(scripted.finish for scripted in group)
        answer = Found(group_id, tenant, requests, lengths, finishes)
        told = answer if self.is_connected else None
        asyncio.get_running_loop().call_soon(found, told)

    def timelines(
        self,
        asked: TimelineRequest,
        told: Callable[[Timelines | None], None],
        now: float,  # noqa: ARG002
    ) -> None:
        """See ``Gateway``. Time stands still here: each event is a second after the one before."""
        groups = (
            [self._groups.get(asked.group_id, [])]
            if asked.group_id
            else [*reversed(self._groups.values())]
        )
        found = [
            _timeline(scripted)
            for group in groups
            for scripted in group
            if scripted.request.tenant == asked.tenant
        ]
        answer = Timelines(
            asked.tenant, asked.group_id, asked.requests_max, tuple(found[: asked.requests_max])
        )
        told(answer if self.is_connected else None)

    def end_group(self, group_id: int, tenant: str, *, is_forgotten: bool = False) -> None:
        """See ``Gateway``."""
        if not self.is_connected:
            return
        for scripted in list(self._groups.get(group_id, [])):
            if scripted.request.tenant == tenant and not scripted.finish:
                self.deliver(scripted.request, finish=FinishReason.CANCELLED, engine="")
        if is_forgotten:
            self._groups.pop(group_id, None)

    def ask_usage(self, tenant: str, told: Callable[[UsageReply | None], None]) -> None:
        """See ``Gateway``."""
        told(UsageReply(tenant, self.used.get(tenant, ())) if self.is_connected else None)

    def when_serving(self, tell: Callable[[bool], None], now: float) -> None:  # noqa: ARG002
        """See ``Gateway``."""
        if self.cluster.engines_serving or not self.is_hopeful:
            tell(bool(self.cluster.engines_serving))
        else:
            self._waiting.append(tell)
            self._changed.set()

    def settle(self, cluster: ClusterState) -> None:
        """Tell those who wait for an engine how it ended."""
        self.cluster = cluster
        waiting, self._waiting = self._waiting, []
        for tell in waiting:
            tell(bool(cluster.engines_serving))

    async def wait_until(self, is_reached: Callable[[ScriptedGateway], bool]) -> None:
        """Wait until submissions and cancellations have brought about what is asked for."""
        while not is_reached(self):
            self._changed.clear()
            await self._changed.wait()

    def keep(self, request: Request) -> None:
        """Know a request as if another gateway had submitted it."""
        scripted = _Scripted(request)
        self._open[request.request_id] = scripted
        self._groups.setdefault(request.group_id, []).append(scripted)

    def forget(self) -> None:
        """Forget all output, but not the idempotency keys."""
        self._groups.clear()

    def deliver(
        self,
        request: Request,
        *tokens: int,
        finish: int = 0,
        logprobs: tuple[TokenLogprobs, ...] = (),
        vector: bytes = b"",
        engine: str = "engine-0",
    ) -> None:
        """Bring a request its next tokens or its vector, and its end if ``finish`` says so."""
        scripted = self._open[request.request_id]
        position = len(scripted.tokens)
        scripted.prefix_hash = extend_prefix_hash(scripted.prefix_hash, tokens)
        scripted.tokens += tokens
        packed = tuple(map(pack_logprobs, logprobs))
        scripted.logprobs += packed
        scripted.finish = finish
        scripted.vector = vector
        if finish:
            del self._open[request.request_id]
        row = TokenRow(
            request_id=request.request_id,
            attempt=1,
            position=position,
            tokens=tokens,
            prefix_hash=scripted.prefix_hash,
            finish=finish,
            logprobs=packed,
            vector=vector,
        )
        for sink in list(scripted.sinks):
            if sink not in self.parked:
                sink.deliver(row, engine)
            elif finish:
                self.unpark(request.request_id, sink)

    def fail(self, request: Request, error: RequestError) -> None:
        """End a request with an error."""
        for sink in list(self._open.pop(request.request_id).sinks):
            sink.fail(error)

    def _take(self, scripted: _Scripted) -> None:
        """Take a request in as a supervisor would, unless its idempotency key is known."""
        request = scripted.request
        original = self._keys.get(request.idempotency_key)
        if original is not None and original.group_id != request.group_id:
            error: RequestError = AlreadySubmitted(original.group_id)
            if original.body_digest != request.body_digest:
                error = IdempotencyMismatch("this idempotency key was used with another body")
            self._unanswered.append(scripted)
            asyncio.get_running_loop().call_soon(self._refuse, scripted, error)
            return
        if request.idempotency_key:
            self._keys[request.idempotency_key] = request
        self._groups.setdefault(request.group_id, []).append(scripted)
        self.submitted.append(request)
        if self._script is not None:
            self._play(request, iter(self._script(request)))

    def _refuse(self, scripted: _Scripted, error: RequestError) -> None:
        self._unanswered.remove(scripted)
        if self._open.pop(scripted.request.request_id, None) is not None:
            for sink in list(scripted.sinks):
                sink.fail(error)

    def _play(self, request: Request, tokens: Iterable[int]) -> None:
        loop = asyncio.get_running_loop()
        params = request.params
        upcoming = iter(tokens)

        def step() -> None:
            scripted = self._open.get(request.request_id)
            if scripted is None:
                return
            token = next(upcoming)
            position = len(scripted.tokens)
            finish = 0
            if position >= params.min_tokens and token in params.stop_token_ids:
                finish = FinishReason.STOP
            elif position + 1 == params.max_tokens:
                finish = FinishReason.LENGTH
            self.deliver(request, token, finish=finish)
            if not finish:
                loop.call_soon(step)

        loop.call_soon(step)


def _timeline(scripted: _Scripted) -> RequestTimeline:
    request = scripted.request
    happened = [QUEUED, ASSIGNED]
    happened += [BEGUN] if scripted.tokens else []
    happened += [ENDED] if scripted.finish else []
    events = tuple(TimelineEvent(float(second), what) for second, what in enumerate(happened))
    return RequestTimeline(
        request.request_id,
        request.group_id,
        len(request.prompt),
        len(scripted.tokens),
        0,
        0,
        0,
        scripted.finish,
        "",
        events,
    )
