"""The door: whether a request is taken in, and who has to go for it. Pure.

The reasons against it, in the order in which they are looked for: it was convicted; its tenant has
reached a limit of its own (429); it would miss its deadline (504); the queue is full, and nobody in
it has less of a claim (503). A call is taken as a whole: only the first request of a
group is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from understudy.protocol.errors import (
    DeadlineExceeded,
    Overloaded,
    Quarantined,
    RateLimited,
    RequestError,
)
from understudy.protocol.request import Request, fingerprint
from understudy.runtime.control.accounts import Accounts
from understudy.runtime.control.admission import Admission
from understudy.runtime.control.forecast import Load, Promise
from understudy.runtime.control.quarantine import Quarantine
from understudy.runtime.control.request_queue import RequestQueue

FORECAST_EVERY: Final = 4
"""Of requests without a deadline every fourth is forecast, to learn how good forecasts are."""


class Places(NamedTuple):
    """What engines have."""

    num_places: int
    """Sequences that all that serve run at once."""
    num_running: int
    """Requests that are with engines."""


class Answer(NamedTuple):
    """What the door says."""

    error: RequestError | None = None
    """Why the request is not taken."""
    victim: int | None = None
    """The waiting request that has to go for it."""
    forecast: Promise | None = None
    """When it is expected to be served."""


class Door:
    """Decides about each request that comes."""

    def __init__(
        self,
        admission: Admission,
        queue: RequestQueue,
        accounts: Accounts,
        quarantine: Quarantine,
    ) -> None:
        self._admission = admission
        self._queue = queue
        self._accounts = accounts
        self._quarantine = quarantine

    def ask(self, request: Request, places: Callable[[], Places], now: float) -> Answer:
        """Whether a request may come in; ``places`` tells what engines have."""
        if self._quarantine.is_convicted(fingerprint(request), now):
            return Answer(Quarantined("engines died of this very request not long ago"))
        own = self._accounts.limits.reached(request.tenant, num_requests=1, now=now)
        if own is not None:
            return Answer(RateLimited(own.message, retry_after_s=own.retry_after_s))
        has_deadline = request.deadline_s is not None or request.first_token_s is not None
        if not has_deadline and request.request_id % FORECAST_EVERY:
            return self._room_for(request, None, now)
        found = places()
        forecast = self._forecast(request, found)
        if has_deadline:
            late = self._too_late(request, forecast, found)
            if late is not None:
                return Answer(late)
        return self._room_for(request, forecast, now)

    def _forecast(self, request: Request, places: Places) -> Promise | None:
        """When a request that is taken now is expected to be served."""
        num_ahead = self._queue.num_ahead(tenant=request.tenant, priority=request.priority)
        return self._accounts.forecast.forecast(
            num_prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.max_answer_tokens,
            load=Load(places.num_places, places.num_running, num_ahead),
        )

    def _too_late(
        self, request: Request, forecast: Promise | None, places: Places
    ) -> RequestError | None:
        deadline_s, first_token_s = request.deadline_s, request.first_token_s
        if 0.0 in {deadline_s, first_token_s}:
            return DeadlineExceeded("the deadline has passed")
        # Who finds everything idle is taken whatever was learnt: so a forecast that has become
        # wrong can be put right.
        if forecast is None or not places.num_running:
            return None
        promise = self._accounts.forecast.promise(forecast)
        if promise is None:
            return None
        if deadline_s is not None and promise.finish_s > deadline_s:
            return _missed("the answer would not be complete", promise.finish_s)
        if first_token_s is not None and promise.first_token_s > first_token_s:
            return _missed("its first token would not be there", promise.first_token_s)
        return None

    def _room_for(self, request: Request, forecast: Promise | None, now: float) -> Answer:
        """Whether there is room in the queue, or can be made."""
        queue = self._queue
        size = size_of(request)
        refusal = self._admission.refusal(
            num_tokens=size.num_tokens,
            num_bytes=size.num_bytes,
            requests_waiting=len(queue),
            tokens_waiting=queue.num_tokens,
            bytes_waiting=queue.num_bytes,
            now=now,
        )
        if refusal is None:
            return Answer(forecast=forecast)
        victim = queue.victim(tenant=request.tenant, priority=request.priority)
        if victim is not None:
            num_tokens, num_bytes = queue.size_of(victim)
            still = self._admission.refusal(
                num_tokens=size.num_tokens,
                num_bytes=size.num_bytes,
                requests_waiting=len(queue) - 1,
                tokens_waiting=queue.num_tokens - num_tokens,
                bytes_waiting=queue.num_bytes - num_bytes,
                now=now,
            )
            if still is None:
                return Answer(victim=victim, forecast=forecast)
        return Answer(Overloaded(refusal.message, retry_after_s=refusal.retry_after_s))

    def shed_error(self, now: float) -> RequestError:
        """What a request is told that has to go for another."""
        retry_after_s = self._admission.retry_after_s(len(self._queue), now)
        return Overloaded("more urgent work took its place", retry_after_s=retry_after_s)


class Size(NamedTuple):
    """How large a request is while it waits."""

    num_tokens: int
    num_bytes: int


def size_of(request: Request) -> Size:
    """How much of the queue a request takes."""
    num_tokens = request.num_prompt_tokens
    texts = len(request.presentation) + len(request.params.grammar)
    return Size(num_tokens, 8 * num_tokens + texts + _REQUEST_BYTES)


_REQUEST_BYTES = 1024
"""What a request takes beside its prompt, about."""


def _missed(what: str, promised_s: float) -> RequestError:
    return DeadlineExceeded(f"{what}: that takes about {promised_s:.3g} s at present")
