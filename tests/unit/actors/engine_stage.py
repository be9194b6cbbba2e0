"""An engine alone, with the echo runner and time as it is told."""

from __future__ import annotations

from typing import Any

from tests.simulation.stage import VirtualCard
from understudy.actors.engine import Engine, engine_hello
from understudy.protocol.messages import Message, StepOutput, Welcome
from understudy.protocol.request import Request, SamplingParams, TokenRow
from understudy.runtime.echo import EchoRunner
from understudy.runtime.kit.actor import SUPERVISOR, Effect
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.scheduling.decision import OverlappingRunner, Runner
from understudy.runtime.scheduling.scheduler import SchedulerConfig

NUM_BLOCKS = 16
CONFIG = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, block_size=4)


def request(
    request_id: int, *, prompt: int = 3, max_tokens: int = 5, seed: int = 7, **params: Any
) -> Request:
    sampling = SamplingParams(seed=seed, max_tokens=max_tokens, **params)
    return Request(request_id, request_id, tuple(range(1, prompt + 1)), sampling)


def make_engine(runner: Runner | OverlappingRunner, clock: VirtualClock) -> Engine:
    hello = engine_hello(
        "engine-0",
        pid=41,
        start_time=7,
        model="demo",
        numerics="echo",
        scheduler_config=CONFIG,
        num_blocks=NUM_BLOCKS,
    )
    return Engine(
        hello,
        scheduler_config=CONFIG,
        num_blocks=NUM_BLOCKS,
        runner=runner,
        card=VirtualCard(),
        clock=clock,
    )


class Stage:
    """An engine, and what it sends."""

    def __init__(self, *, step_s: float = 0.0) -> None:
        self.clock = VirtualClock(100.0)
        self.engine = make_engine(
            EchoRunner(self.clock, vocab_size=1000, step_s=step_s), self.clock
        )
        self.steps: list[int] = []

    def turn(self, *messages: Message) -> list[Effect]:
        for message in messages:
            self.engine.handle(message, SUPERVISOR, self.clock.now())
        self.engine.decide(self.clock.now())
        self.engine.check_integrity()
        return self.engine.outbox.take()

    def rows(self, *messages: Message) -> list[TokenRow]:
        """One turn; gives the rows that it reported."""
        rows: list[TokenRow] = []
        for effect in self.turn(*messages):
            message = getattr(effect, "message", None)
            if isinstance(message, StepOutput):
                self.steps.append(message.step)
                rows += message.rows
        return rows

    def join(self, epoch: int) -> None:
        self.turn()
        self.turn(Welcome(epoch))

    def run(self, *messages: Message) -> dict[int, list[int]]:
        """Turns until nothing more comes; the tokens of each request that ended."""
        outputs: dict[int, list[int]] = {}
        rows = self.rows(*messages)
        while rows:
            for row in rows:
                outputs.setdefault(row.request_id, []).extend(row.tokens)
            rows = self.rows()
        return outputs

    @property
    def blocks_free(self) -> int:
        return self.engine.heartbeat(self.clock.now()).blocks_free

    @property
    def num_sequences(self) -> int:
        beat = self.engine.heartbeat(self.clock.now())
        return beat.running + beat.waiting
