"""A turn: everything that is there is taken in, and the sessions follow what the actor asks."""

from __future__ import annotations

from understudy.protocol.codec import Envelope, decode, encode
from understudy.protocol.messages import Cancel, Fenced, Hello, Message, Pulse, Role, Welcome
from understudy.runtime.kit import session
from understudy.runtime.kit.actor import SUPERVISOR, Outbox
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.kit.driver import Driver
from understudy.runtime.kit.membership import Membership
from understudy.runtime.kit.session import SessionTable


class Player:
    """A member that writes down what it hears, and works for a while when told to."""

    def __init__(self, clock: VirtualClock) -> None:
        self.outbox = Outbox()
        self.membership = Membership(Hello(Role.GATEWAY, "player", 1), self.outbox)
        self.clock = clock
        self.heard: list[Message] = []
        self.lost: list[str] = []
        self.to_send: list[Message] = []
        self.work_s = 0.0

    @property
    def wake_at(self) -> float | None:
        return self.membership.wake_at

    def handle(self, message: Message, sender: str, now: float) -> None:
        self.heard.append(message)
        self.membership.handle(message, now)

    def lose(self, peer: str, now: float) -> None:
        self.lost.append(peer)
        self.membership.leave(now)

    def decide(self, now: float) -> None:
        self.membership.decide(now)
        self.clock.sleep(self.work_s)
        for message in self.to_send:
            self.outbox.send(SUPERVISOR, message)
        self.to_send = []


class Stage:
    """A player and its driver."""

    def __init__(self) -> None:
        self.clock = VirtualClock(10.0)
        self.player = Player(self.clock)
        self.driver = Driver(self.player, SessionTable("player.1"), self.clock)

    def turn(self, *frames: bytes) -> list[Message]:
        """One turn; gives the messages that go out."""
        outgoing = self.driver.turn([(SUPERVISOR, frame) for frame in frames])
        assert {to for to, _ in outgoing} <= {SUPERVISOR}
        return [decode(frame).message for _, frame in outgoing]


def frame(epoch: int, seq: int, message: Message) -> bytes:
    return encode(Envelope(SUPERVISOR, epoch, seq, 0), message)


def test_a_welcome_opens_the_session_for_what_comes_right_behind_it() -> None:
    stage = Stage()
    stage.turn()
    stage.turn(frame(0, 0, Welcome(5)), frame(5, 1, Cancel(1)), frame(5, 2, Cancel(2)))
    assert stage.player.heard == [Welcome(5), Cancel(1), Cancel(2)]
    assert stage.driver.sessions.stale == 0


def test_a_fence_closes_the_session_for_what_comes_right_behind_it() -> None:
    stage = Stage()
    stage.turn(frame(0, 0, Welcome(5)))
    stage.turn(frame(0, 0, Fenced(5)), frame(5, 1, Cancel(1)))
    assert stage.player.heard == [Welcome(5), Fenced(5)]
    assert stage.driver.sessions.stale == 1


def test_a_new_session_in_one_turn_with_the_end_of_the_old_is_the_one_that_counts() -> None:
    stage = Stage()
    stage.turn(frame(0, 0, Welcome(5)))
    stage.turn(
        frame(5, 1, Cancel(1)),
        frame(0, 0, Fenced(5)),
        frame(0, 0, Welcome(6)),
        frame(5, 2, Cancel(2)),
        frame(6, 1, Cancel(3)),
    )
    cancels = [message for message in stage.player.heard if isinstance(message, Cancel)]
    assert cancels == [Cancel(1), Cancel(3)]


def test_what_comes_of_long_work_is_sent_again_counting_from_its_end() -> None:
    stage = Stage()
    stage.turn(frame(0, 0, Welcome(5)))
    stage.player.work_s = 10 * session.RESEND_AFTER_MAX_S
    stage.player.to_send = [Cancel(1)]
    assert stage.turn().count(Cancel(1)) == 1
    wake_at = stage.driver.wake_at()
    assert wake_at is not None
    stage.player.work_s = 0.0
    stage.clock.sleep(session.RESEND_AFTER_S)
    assert stage.turn(frame(5, 0, Pulse())).count(Cancel(1)) == 1


def test_an_actor_hears_of_a_session_that_broke_and_its_wishes_are_carried_out() -> None:
    stage = Stage()
    stage.turn(frame(0, 0, Welcome(5)))
    stage.player.to_send = [Cancel(1)] * (session.WINDOW_MESSAGES_MAX + 1)
    stage.turn()
    assert stage.player.lost == [SUPERVISOR]
    assert stage.driver.wake_at() == stage.clock.now()
    assert any(isinstance(message, Hello) for message in stage.turn())
    assert stage.player.lost == [SUPERVISOR]


def test_the_next_turn_is_due_when_the_actor_or_a_session_wants_it() -> None:
    stage = Stage()
    assert stage.driver.wake_at() == 0.0
    stage.turn(frame(0, 0, Welcome(5)))
    stage.turn(frame(5, 1, Cancel(1)))
    assert stage.driver.wake_at() == stage.clock.now() + session.ACK_AFTER_S
