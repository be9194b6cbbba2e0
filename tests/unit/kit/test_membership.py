"""Membership: how a session with the supervisor is got, kept, and known to be lost."""

from __future__ import annotations

import pytest

from understudy.protocol.codec import PROTOCOL_VERSION, PROTOCOL_VERSION_OLDEST
from understudy.protocol.messages import ClusterState, Fenced, Hello, Pulse, Role, Welcome
from understudy.runtime.kit.actor import SUPERVISOR, CloseSession, OpenSession, Outbox, Send
from understudy.runtime.kit.membership import (
    HELLO_EVERY_S,
    PULSE_EVERY_S,
    SUPERVISOR_SILENT_S,
    Membership,
    MembershipChange,
)

HELLO = Hello(Role.ENGINE, "engine-0", 41, model="demo", protocol=PROTOCOL_VERSION)
STATE = ClusterState(1, 1, 2048)


class Stage:
    """A membership, and what it says."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.membership = Membership(HELLO, self.outbox)

    def said(self) -> list[object]:
        return [item.message if isinstance(item, Send) else item for item in self.outbox.take()]

    def join(self, epoch: int, now: float) -> None:
        self.membership.decide(now)
        assert self.membership.handle(Welcome(epoch), now) is MembershipChange.JOINED
        self.outbox.take()


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def member() -> Stage:
    """One that joined at time 100 under epoch 7."""
    stage = Stage()
    stage.join(7, 100.0)
    return stage


def test_hello_is_said_at_once_and_again_until_it_is_answered(stage: Stage) -> None:
    for number in range(5):
        now = 50.0 + number * HELLO_EVERY_S
        assert stage.membership.decide(now) is None
        assert stage.said() == [HELLO]
        assert stage.membership.decide(now + HELLO_EVERY_S / 2) is None
        assert stage.said() == []
        assert stage.membership.wake_at == now + HELLO_EVERY_S
    assert not stage.membership.is_open


def test_a_welcome_opens_a_session_and_a_sign_of_life_follows_it(stage: Stage) -> None:
    stage.membership.decide(1.0)
    stage.outbox.take()
    assert stage.membership.handle(Welcome(7), 1.1) is MembershipChange.JOINED
    assert stage.said() == [OpenSession(SUPERVISOR, 7, Welcome(7).protocol)]
    assert stage.membership.is_open
    assert stage.membership.decide(1.1) is None
    assert stage.said() == [Pulse()]


def test_everything_it_says_goes_to_the_supervisor(stage: Stage) -> None:
    stage.membership.decide(1.0)
    stage.membership.handle(Welcome(7), 1.1)
    stage.membership.decide(1.2)
    sends = [item for item in stage.outbox.take() if isinstance(item, Send)]
    assert {send.to for send in sends} == {SUPERVISOR}


def test_a_repeated_welcome_changes_nothing(member: Stage) -> None:
    for epoch in (7, 6, 8):
        assert member.membership.handle(Welcome(epoch), 100.1) is None
    assert member.said() == []
    assert member.membership.is_open


def test_a_member_pulses_regularly(member: Stage) -> None:
    now = 100.0
    for _ in range(20):
        member.membership.decide(now)
        assert member.said() == [Pulse()]
        member.membership.handle(Pulse(), now)
        now = member.membership.wake_at
    assert now == pytest.approx(100.0 + 20 * PULSE_EVERY_S)


def test_a_fence_for_its_epoch_ends_the_session_and_hello_names_the_lost_one(member: Stage) -> None:
    assert member.membership.handle(Fenced(7), 101.0) is MembershipChange.LOST
    assert member.said() == [CloseSession(SUPERVISOR)]
    assert not member.membership.is_open
    assert member.membership.decide(101.0) is None
    (hello,) = member.said()
    assert hello == Hello(
        Role.ENGINE, "engine-0", 41, model="demo", last_epoch=7, protocol=PROTOCOL_VERSION
    )


@pytest.mark.parametrize("epoch", [0, 6, 8])
def test_a_fence_for_another_epoch_is_old_news(member: Stage, epoch: int) -> None:
    assert member.membership.handle(Fenced(epoch), 101.0) is None
    assert member.membership.is_open
    assert member.said() == []


def test_a_session_in_a_version_that_is_not_understood_is_none() -> None:
    stage = Stage()
    assert stage.membership.handle(Welcome(7, PROTOCOL_VERSION_OLDEST - 1), 100.0) is None
    assert not stage.membership.is_open


@pytest.mark.parametrize(("offered", "spoken"), [(0, 0), (1, 0)])
def test_a_session_speaks_the_newest_version_that_both_know(offered: int, spoken: int) -> None:
    """Versions are told from the newest that this release knows."""
    stage = Stage()
    stage.membership.handle(Welcome(7, PROTOCOL_VERSION + offered), 100.0)
    assert stage.said() == [OpenSession(SUPERVISOR, 7, PROTOCOL_VERSION + spoken)]


def test_a_fence_without_a_session_is_old_news(stage: Stage) -> None:
    assert stage.membership.handle(Fenced(0), 1.0) is None
    assert stage.said() == []


@pytest.mark.parametrize("epoch", [1, 6, 7])
def test_a_late_welcome_of_a_lost_session_does_not_open_it_again(member: Stage, epoch: int) -> None:
    member.membership.handle(Fenced(7), 101.0)
    member.said()
    assert member.membership.handle(Welcome(epoch), 101.1) is None
    assert not member.membership.is_open
    assert member.membership.handle(Welcome(8), 101.2) is MembershipChange.JOINED
    assert member.said() == [OpenSession(SUPERVISOR, 8, Welcome(8).protocol)]


def test_a_silent_supervisor_counts_as_lost_and_not_a_moment_earlier(member: Stage) -> None:
    now = 100.0
    while now < 100.0 + SUPERVISOR_SILENT_S:
        assert member.membership.decide(now) is None
        now = member.membership.wake_at
    member.said()
    assert now == 100.0 + SUPERVISOR_SILENT_S
    assert member.membership.decide(now) is MembershipChange.LOST
    close, hello = member.said()
    assert close == CloseSession(SUPERVISOR)
    assert isinstance(hello, Hello)
    assert hello.last_epoch == 7


@pytest.mark.parametrize("message", [Pulse(), STATE, Welcome(3), Fenced(3)])
def test_any_message_shows_that_the_supervisor_lives(
    member: Stage, message: Pulse | ClusterState | Welcome | Fenced
) -> None:
    member.membership.handle(message, 102.0)
    assert member.membership.decide(101.9 + SUPERVISOR_SILENT_S) is None
    assert member.membership.decide(102.0 + SUPERVISOR_SILENT_S) is MembershipChange.LOST


def test_a_loss_is_told_once(member: Stage) -> None:
    assert member.membership.decide(200.0) is MembershipChange.LOST
    assert member.membership.decide(200.0) is None
    assert member.membership.decide(300.0) is None


def test_leaving_asks_for_a_new_session_at_once(member: Stage) -> None:
    assert member.membership.leave(101.0) is MembershipChange.LOST
    assert member.membership.wake_at == 101.0
    member.membership.decide(101.0)
    assert [type(item) for item in member.said()] == [CloseSession, Hello]


def test_a_member_that_joins_again_and_again_names_the_latest_epoch(stage: Stage) -> None:
    for epoch in range(5, 50, 7):
        stage.join(epoch, 1.0 + epoch)
        stage.membership.handle(Fenced(epoch), 2.0 + epoch)
        stage.membership.decide(2.0 + epoch)
        hello = stage.said()[-1]
        assert isinstance(hello, Hello)
        assert hello.last_epoch == epoch
