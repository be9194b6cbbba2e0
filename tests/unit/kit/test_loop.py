"""The loops of production, over real ZeroMQ, with actors that do as little as possible."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Self, TypeAlias

import pytest
import uvloop
import zmq

from understudy.protocol.messages import (
    Accepted,
    Cancel,
    Heartbeat,
    Hello,
    Message,
    Role,
    Welcome,
)
from understudy.runtime.kit.actor import SUPERVISOR, Actor, Outbox
from understudy.runtime.kit.clock import MonotonicClock
from understudy.runtime.kit.driver import Driver
from understudy.runtime.kit.loop import ActorLoop, StepLoop
from understudy.runtime.kit.mailbox import Mailbox
from understudy.runtime.kit.membership import Membership
from understudy.runtime.kit.session import SessionTable

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
PATIENCE_S: Final = 60.0
"""How long a test waits for what must come; nothing is expected to take as long."""
CLOCK: Final = MonotonicClock()


@pytest.fixture
def address() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield f"ipc://{folder}/s.sock"
    shutil.rmtree(folder)


@pytest.fixture
def context() -> Iterator[Context]:
    context: Context = zmq.Context()
    yield context
    context.destroy(linger=0)


class Director:
    """In the supervisor's place: welcomes whoever comes, and keeps what they say."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.heard: list[Message] = []
        self.on_message: Callable[[Message], None] = self.heard.append
        self.turns = 0
        self.wake_at: float | None = None
        self.cues: list[Message] = []
        self._epoch = 0

    def handle(self, message: Message, sender: str, now: float) -> None:
        if isinstance(message, Hello) and message.last_epoch == self._epoch:
            self._epoch += 1
            self.outbox.send(sender, Welcome(self._epoch))
            self.outbox.open_session(sender, self._epoch)
            for cue in self.cues:
                self.outbox.send(sender, cue)
        self.on_message(message)

    def lose(self, peer: str, now: float) -> None:
        raise AssertionError(f"the session with {peer} broke")

    def decide(self, now: float) -> None:
        self.turns += 1


class Performer:
    """In an engine's place: answers every Cancel with an Accepted, in its order."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.membership = Membership(Hello(Role.ENGINE, "engine-0", 1), self.outbox)
        self.heard: list[int] = []
        self.on_decide: Callable[[], None] = lambda: None
        self.beats = 0

    @property
    def wake_at(self) -> float | None:
        return self.membership.wake_at

    def handle(self, message: Message, sender: str, now: float) -> None:
        self.membership.handle(message, now)
        if isinstance(message, Cancel):
            self.heard.append(message.request_id)
            self.outbox.send(SUPERVISOR, Accepted(message.request_id))

    def lose(self, peer: str, now: float) -> None:
        raise AssertionError(f"the session with {peer} broke")

    def decide(self, now: float) -> None:
        self.membership.decide(now)
        self.on_decide()

    def heartbeat(self, now: float) -> Heartbeat:
        self.beats += 1
        return Heartbeat(self.beats, "idle", 0.0, 0, 0, 0)


class Stage:
    """An engine's loop in a thread of its own, as it would be in a process of its own."""

    def __init__(self, context: Context, address: str) -> None:
        self.performer = Performer()
        self.mailbox = Mailbox.connect(context, address, "engine-0.1")
        driver = Driver(self.performer, SessionTable("engine-0.1"), CLOCK)
        self.loop = StepLoop(driver, self.mailbox, self.performer)
        self.thread = threading.Thread(target=self.loop.run)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.stop()
        self.thread.join()
        self.mailbox.close()


def actor_loop(actor: Actor, mailbox: Mailbox, *, fences: bool = False) -> ActorLoop:
    return ActorLoop(Driver(actor, SessionTable("x", fences=fences), CLOCK), mailbox)


@asynccontextmanager
async def directing(director: Director, context: Context, address: str) -> AsyncIterator[ActorLoop]:
    """The supervisor's loop on the running asyncio loop; what fails in it fails the test."""
    loop = actor_loop(director, Mailbox.bind(context, address), fences=True)
    async with asyncio.timeout(PATIENCE_S):
        yield loop
    loop.stop()
    await loop.wait_stopped()


LOOPS = pytest.mark.parametrize(
    "loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"]
)
LoopFactory: TypeAlias = Callable[[], asyncio.AbstractEventLoop]


# ActorLoop


@LOOPS
@pytest.mark.parametrize("count", [1, 20_000])
def test_a_burst_arrives_in_order_there_and_back(
    context: Context, address: str, loop_factory: LoopFactory, count: int
) -> None:
    director = Director()
    director.cues = [Cancel(number) for number in range(count)]
    answers: list[int] = []

    async def direct() -> None:
        all_there = asyncio.Event()

        def note(message: Message) -> None:
            if isinstance(message, Accepted):
                answers.append(message.request_id)
                if len(answers) == count:
                    all_there.set()

        director.on_message = note
        async with directing(director, context, address):
            await all_there.wait()

    with Stage(context, address) as stage, asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(direct())
    assert stage.performer.heard == list(range(count))
    assert answers == list(range(count))


@LOOPS
def test_many_wakes_make_one_turn(
    context: Context, address: str, loop_factory: LoopFactory
) -> None:
    director = Director()

    async def direct() -> None:
        async with directing(director, context, address) as loop:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            turns = director.turns
            for _ in range(1000):
                loop.wake()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert director.turns == turns + 1

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(direct())


@LOOPS
def test_a_turn_comes_at_the_time_the_actor_asked_for(
    context: Context, address: str, loop_factory: LoopFactory
) -> None:
    woken = asyncio.Event()

    class Sleeper(Director):
        def decide(self, now: float) -> None:
            if self.wake_at is not None and now >= self.wake_at:
                self.wake_at = None
                woken.set()

    director = Sleeper()
    director.wake_at = asked_for = CLOCK.now() + 0.05

    async def direct() -> None:
        async with directing(director, context, address):
            await woken.wait()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(direct())
    assert CLOCK.now() >= asked_for


@LOOPS
def test_a_turn_that_fails_ends_the_loop_with_its_error(
    context: Context, address: str, loop_factory: LoopFactory
) -> None:
    class Stumbler(Director):
        def decide(self, now: float) -> None:
            self.turns += 1
            if self.turns == 3:
                raise ZeroDivisionError("on the third turn")

    async def direct() -> None:
        mailbox = Mailbox.bind(context, address)
        stumbler = Stumbler()
        loop = actor_loop(stumbler, mailbox)
        async with asyncio.timeout(PATIENCE_S):
            while stumbler.turns < 3:
                loop.wake()
                await asyncio.sleep(0)
            with pytest.raises(ZeroDivisionError, match="third"):
                await loop.wait_stopped()
        loop.wake()
        await asyncio.sleep(0.01)
        assert stumbler.turns == 3
        loop.stop()
        with pytest.raises(zmq.ZMQError):
            mailbox.has_frames()  # it is closed, and nothing reads its descriptor

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(direct())


@LOOPS
def test_a_loop_may_be_stopped_twice_and_takes_no_further_turn(
    context: Context, address: str, loop_factory: LoopFactory
) -> None:
    director = Director()

    async def direct() -> None:
        async with directing(director, context, address) as loop:
            await asyncio.sleep(0)
            loop.wake()
            loop.stop()
            turns = director.turns
            loop.wake()
            loop.stop()
            await asyncio.sleep(0.01)
            assert director.turns == turns

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(direct())


# StepLoop


def test_a_step_loop_stops_when_a_signal_says_so(context: Context, address: str) -> None:
    performer = Performer()
    mailbox = Mailbox.connect(context, address, "engine-0.1")
    loop = StepLoop(Driver(performer, SessionTable("engine-0.1"), CLOCK), mailbox, performer)
    previous = signal.signal(signal.SIGUSR1, lambda *_: loop.stop())
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        loop.run()
    finally:
        signal.signal(signal.SIGUSR1, previous)
        timer.join()
        mailbox.close()


def test_a_second_signal_inside_the_first_does_no_harm(context: Context, address: str) -> None:
    performer = Performer()
    mailbox = Mailbox.connect(context, address, "engine-0.1")
    loop = StepLoop(Driver(performer, SessionTable("engine-0.1"), CLOCK), mailbox, performer)
    previous = signal.signal(signal.SIGALRM, lambda *_: loop.stop())
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(200_000):
            loop.stop()
        loop.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        mailbox.close()


def test_a_stopped_step_loop_leaves_no_thread_behind(context: Context, address: str) -> None:
    with Stage(context, address):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_turn_that_fails_ends_the_step_loop_and_its_heartbeat(
    context: Context, address: str
) -> None:
    performer = Performer()
    mailbox = Mailbox.connect(context, address, "engine-0.1")
    loop = StepLoop(Driver(performer, SessionTable("engine-0.1"), CLOCK), mailbox, performer)

    def fail() -> None:
        raise ZeroDivisionError

    performer.on_decide = fail
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    mailbox.close()


def test_beats_keep_flowing_while_a_step_takes_its_time(context: Context, address: str) -> None:
    """The step lasts until the supervisor has heard so many beats made during it."""
    director = Director()
    step_began, step_may_end = threading.Event(), threading.Event()
    beats_heard = 0

    async def direct(stage: Stage) -> None:
        nonlocal beats_heard
        enough = asyncio.Event()

        def note(message: Message) -> None:
            nonlocal beats_heard
            if isinstance(message, Heartbeat) and step_began.is_set():
                beats_heard += 1
                if beats_heard == 5:
                    enough.set()

        director.on_message = note
        async with directing(director, context, address):
            await enough.wait()
            assert not step_may_end.is_set()
            step_may_end.set()

    def step() -> None:
        if stage.performer.membership.is_open and not step_began.is_set():
            step_began.set()
            assert step_may_end.wait(PATIENCE_S), "no beats came during the step"

    with Stage(context, address) as stage:
        stage.performer.on_decide = step
        asyncio.run(direct(stage))
    assert beats_heard >= 5


def test_a_message_ends_the_wait_of_an_idle_step_loop(context: Context, address: str) -> None:
    """Each of many rounds would take a quarter of a second if the wake-up were lost."""
    director = Director()
    rounds = 200
    done: list[float] = []

    async def direct() -> None:
        finished = asyncio.Event()

        def next_round(message: Message) -> None:
            if isinstance(message, Accepted):
                done.append(CLOCK.now())
                if len(done) == rounds:
                    finished.set()
                else:
                    director.outbox.send("engine-0.1", Cancel(len(done)))

        director.cues = [Cancel(0)]
        director.on_message = next_round
        async with directing(director, context, address):
            await finished.wait()

    with Stage(context, address) as stage:
        asyncio.run(direct())
    assert stage.performer.heard == list(range(rounds))
