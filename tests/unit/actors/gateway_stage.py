"""A gateway's core without HTTP, and who listens to it."""

from __future__ import annotations

from collections.abc import Callable

from understudy.actors.gateway import Gateway
from understudy.protocol.errors import RequestError
from understudy.protocol.messages import Accepted, ClusterState, Message, Pulse, Submit, Welcome
from understudy.protocol.request import Request, SamplingParams, TokenRow
from understudy.runtime.kit.actor import SUPERVISOR, Effect, Send

PARAMS = SamplingParams(seed=1, max_tokens=10)
STATE = ClusterState(2, 2, 2048)


def request(request_id: int) -> Request:
    return Request(request_id, request_id, (1, 2, 3), PARAMS)


def row(request_id: int, position: int, *tokens: int, finish: int = 0) -> TokenRow:
    return TokenRow(request_id, 1, position, tokens, 0, finish)


class Listener:
    """A sink that keeps what it hears, and insists on hearing nothing after the end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.engines: list[str] = []
        self.finish = 0
        self.error: RequestError | None = None
        self.on_deliver: Callable[[], None] = lambda: None

    @property
    def has_ended(self) -> bool:
        return bool(self.finish) or self.error is not None

    def deliver(self, row: TokenRow, engine: str) -> None:
        assert not self.has_ended
        self.tokens += row.tokens
        self.engines.append(engine)
        self.finish = row.finish
        self.on_deliver()

    def fail(self, error: RequestError) -> None:
        assert not self.has_ended
        self.error = error


class Stage:
    """A gateway, and what it sends."""

    def __init__(self) -> None:
        self.now = 100.0
        self.gateway = Gateway("gateway-0", pid=41, model="demo", address="127.0.0.1:80")

    def turn(self, *messages: Message, after_s: float = 0.0) -> list[Effect]:
        self.now += after_s
        for message in messages:
            self.gateway.handle(message, SUPERVISOR, self.now)
        self.gateway.decide(self.now)
        return self.gateway.outbox.take()

    def said(self, *messages: Message, after_s: float = 0.0) -> list[Message]:
        """One turn; gives the messages sent, signs of life left out."""
        effects = self.turn(*messages, after_s=after_s)
        sent = [effect.message for effect in effects if isinstance(effect, Send)]
        return [message for message in sent if not isinstance(message, Pulse)]

    def submit(self, request_id: int) -> Listener:
        listener = Listener()
        self.gateway.submit(request(request_id), listener, self.now)
        return listener

    def submit_accepted(self, request_id: int) -> Listener:
        listener = self.submit(request_id)
        assert self.said(Accepted(request_id)) == [Submit(request(request_id))]
        return listener


def joined_stage() -> Stage:
    """A gateway with a session of epoch 5."""
    stage = Stage()
    stage.turn()
    stage.turn(Welcome(5), STATE)
    return stage
