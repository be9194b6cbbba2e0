"""The registry: sessions by epoch, and names by their latest incarnation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.messages import Capacity, Hello, Role
from understudy.runtime.control.registry import (
    EPOCH_MAX,
    MEMBERS_MAX,
    Greeting,
    MemberState,
    Registry,
)

CAPACITY = Capacity(8, 2048, 512, 16)


def hello(
    name: str = "engine-0", *, pid: int = 41, last_epoch: int = 0, role: Role = Role.ENGINE
) -> Hello:
    return Hello(role, name, pid, last_epoch, "demo", "127.0.0.1:80", CAPACITY)


def greet(registry: Registry, said: Hello, identity: str, now: float) -> Greeting:
    greeting = registry.greet(said, identity, now)
    assert greeting is not None
    return greeting


@pytest.fixture
def registry() -> Registry:
    return Registry(first_epoch=100)


def test_a_first_hello_opens_a_session_with_all_that_it_says(registry: Registry) -> None:
    member, is_new, replaced = greet(registry, hello(), "engine-0.1", 5.0)
    assert is_new
    assert replaced is None
    assert (member.name, member.identity, member.role) == ("engine-0", "engine-0.1", Role.ENGINE)
    assert (member.pid, member.epoch, member.heard_at) == (41, 100, 5.0)
    assert (member.address, member.capacity) == ("127.0.0.1:80", CAPACITY)
    assert member.state is MemberState.SERVING
    assert registry.get("engine-0.1") is member
    assert registry.named("engine-0") is member


def test_a_repeated_hello_gets_the_same_answer(registry: Registry) -> None:
    member = greet(registry, hello(), "engine-0.1", 5.0).member
    again = greet(registry, hello(), "engine-0.1", 6.0)
    assert again == (member, False, None)
    assert member.heard_at == 6.0
    assert member.epoch == 100


def test_a_hello_after_a_loss_opens_a_new_epoch_for_the_same_member(registry: Registry) -> None:
    first = greet(registry, hello(), "engine-0.1", 5.0).member
    second, is_new, replaced = greet(registry, hello(last_epoch=100), "engine-0.1", 6.0)
    assert is_new
    assert replaced is None
    assert second is first
    assert (second.epoch, second.heard_at, second.restarts) == (101, 6.0, 0)


def test_late_repetitions_of_earlier_hellos_do_not_end_the_present_session(
    registry: Registry,
) -> None:
    greet(registry, hello(), "engine-0.1", 5.0)
    second = greet(registry, hello(last_epoch=100), "engine-0.1", 6.0).member
    for late in (hello(), hello(last_epoch=100)):
        assert greet(registry, late, "engine-0.1", 7.0) == (second, False, None)


def test_a_new_incarnation_replaces_the_old_and_counts_as_a_restart(registry: Registry) -> None:
    first = greet(registry, hello(), "engine-0.1", 5.0).member
    second, is_new, replaced = greet(registry, hello(pid=42), "engine-0.2", 6.0)
    assert is_new
    assert replaced is first
    assert second.restarts == 1
    assert registry.get("engine-0.1") is None
    assert registry.named("engine-0") is second


def test_a_late_hello_of_an_earlier_incarnation_does_not_take_the_name(registry: Registry) -> None:
    greet(registry, hello(), "engine-0.9", 5.0)
    second = greet(registry, hello(pid=42), "engine-0.10", 6.0).member
    assert registry.greet(hello(), "engine-0.9", 7.0) is None
    assert registry.named("engine-0") is second
    assert registry.get("engine-0.9") is None
    assert second.state is MemberState.SERVING
    assert second.heard_at == 6.0


def test_an_earlier_incarnation_may_serve_when_the_later_one_is_dead(registry: Registry) -> None:
    greet(registry, hello(), "engine-0.9", 5.0)
    second = greet(registry, hello(pid=42), "engine-0.10", 6.0).member
    registry.bury(second)
    assert greet(registry, hello(), "engine-0.9", 7.0).is_new_session


def test_a_dead_member_that_says_hello_gets_a_new_session_and_nothing_to_clear_up(
    registry: Registry,
) -> None:
    first = greet(registry, hello(), "engine-0.1", 5.0).member
    registry.bury(first)
    for epoch, late in ((101, hello(last_epoch=100)), (102, hello(last_epoch=101))):
        member, is_new, replaced = greet(registry, late, "engine-0.1", 6.0)
        assert (member.epoch, is_new, replaced) == (epoch, True, None)
        registry.bury(member)


def test_members_are_listed_by_part_and_name(registry: Registry) -> None:
    for name in ("engine-2", "engine-0", "engine-1"):
        greet(registry, hello(name), f"{name}.1", 5.0)
    greet(registry, hello("gateway-0", role=Role.GATEWAY), "gateway-0.1", 5.0)
    dead = registry.named("engine-1")
    assert dead is not None
    registry.bury(dead)
    assert [m.name for m in registry.members(Role.ENGINE)] == ["engine-0", "engine-1", "engine-2"]
    assert [m.name for m in registry.serving(Role.ENGINE)] == ["engine-0", "engine-2"]
    assert [m.name for m in registry.serving(Role.GATEWAY)] == ["gateway-0"]


def test_who_drains_or_is_tested_lives_and_takes_no_work(registry: Registry) -> None:
    member = greet(registry, hello(), "engine-0.1", 5.0).member
    for state, is_alive, serves in (
        (MemberState.TESTING, True, False),
        (MemberState.DRAINING, True, False),
        (MemberState.SERVING, True, True),
        (MemberState.DEAD, False, False),
        (MemberState.BROKEN, False, False),
    ):
        member.state = state
        assert member.is_alive == is_alive
        assert (registry.serving(Role.ENGINE) == [member]) == serves
        assert (registry.alive(Role.ENGINE) == [member]) == is_alive


def test_an_engine_may_break_down_before_it_ever_joined(registry: Registry) -> None:
    broken = registry.break_down("engine-7", 77, 5.0)
    assert broken.state is MemberState.BROKEN
    assert registry.named("engine-7") is broken
    assert registry.members(Role.ENGINE) == [broken]
    back = greet(registry, hello("engine-7", pid=78), "engine-7.2", 6.0)
    assert back.is_new_session
    assert back.replaced is None
    assert registry.members(Role.ENGINE) == [back.member]


def test_a_supervisor_that_started_again_gives_later_epochs_than_its_members_had(
    registry: Registry,
) -> None:
    """Its clock may have started anew, with the machine; its members' need not have."""
    member = greet(registry, hello(last_epoch=5000), "engine-0.1", 5.0).member
    assert member.epoch == 5001
    other = greet(registry, hello("engine-1"), "engine-1.1", 5.0).member
    assert other.epoch == 5002


@pytest.mark.parametrize("last_epoch", [EPOCH_MAX + 1, 2**64 - 1])
def test_an_epoch_that_cannot_be_is_not_answered(registry: Registry, last_epoch: int) -> None:
    assert registry.greet(hello(last_epoch=last_epoch), "engine-0.1", 5.0) is None
    assert greet(registry, hello(last_epoch=EPOCH_MAX), "engine-0.1", 5.0).member.epoch < 2**64


def test_no_stranger_can_use_epochs_up(registry: Registry) -> None:
    greet(registry, hello("stranger", last_epoch=EPOCH_MAX), "stranger.1", 5.0)
    for _ in range(3):
        member = greet(registry, hello(), "engine-0.1", 6.0).member
        again = greet(registry, hello(last_epoch=member.epoch), "engine-0.1", 7.0)
        assert again.is_new_session
        assert again.member.epoch < 2**64


def test_no_crowd_of_strangers_makes_it_grow_without_end(registry: Registry) -> None:
    engine = greet(registry, hello("engine-0"), "engine-0.1", 1.0).member
    gone = greet(registry, hello("engine-1"), "engine-1.1", 2.0).member
    registry.bury(gone)
    strangers = [
        greet(registry, hello(f"stranger-{n}", role=Role.GATEWAY), f"stranger-{n}.1", 3.0 + n)
        for n in range(MEMBERS_MAX - 1)
    ]
    assert registry.named("engine-1") is None, "the dead give way first"
    assert registry.get("engine-1.1") is None
    assert registry.greet(hello("late"), "late.1", 9.0) is None, "the living do not"
    assert greet(registry, hello("engine-0"), "engine-0.2", 9.0).replaced is engine
    for n in (7, 5):
        registry.bury(strangers[n].member)
    assert greet(registry, hello("late"), "late.1", 9.0).is_new_session
    assert registry.named("stranger-5") is None, "who was heard of last longest ago"
    assert registry.named("stranger-7") is not None
    assert len(registry.members(Role.GATEWAY)) + len(registry.members(Role.ENGINE)) == MEMBERS_MAX


@pytest.mark.parametrize("identity", ["engine-0", "", ".", "engine-0.x", "e." + "9" * 99])
def test_an_identity_without_a_number_is_taken_as_it_comes(
    registry: Registry, identity: str
) -> None:
    assert greet(registry, hello(), identity, 5.0).is_new_session
    assert greet(registry, hello(), "engine-0.1", 6.0).is_new_session


names = st.sampled_from(["engine-0", "engine-1"])


@given(
    st.lists(st.tuples(names, st.integers(1, 3), st.integers(95, 110), st.booleans()), max_size=30)
)
def test_epochs_grow_whatever_is_said(
    hellos: list[tuple[str, int, int, bool]],
) -> None:
    registry = Registry(first_epoch=100)
    latest = 0
    for number, (name, incarnation, last_epoch, buries) in enumerate(hellos):
        said = hello(name, pid=incarnation, last_epoch=last_epoch)
        greeting = registry.greet(said, f"{name}.{incarnation}", float(number))
        if greeting is None:
            continue
        member = greeting.member
        assert registry.named(name) is registry.get(member.identity) is member
        assert member.epoch > last_epoch or not greeting.is_new_session
        if greeting.is_new_session:
            assert member.epoch > latest
            latest = member.epoch
        if buries:
            registry.bury(member)
    assert len(registry.members(Role.ENGINE)) <= 2
