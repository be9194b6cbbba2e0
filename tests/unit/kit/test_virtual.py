"""The virtual loop: exact repetition, faults as asked for, and nothing that happens by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from understudy.protocol.messages import Dying, Heartbeat, Message
from understudy.runtime.kit.actor import SUPERVISOR, Actor, Outbox
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.kit.loop import BEAT_EVERY_S
from understudy.runtime.kit.virtual import (
    TURN_DELAY_S,
    NetworkFaults,
    VirtualLoop,
    VirtualNetwork,
)


class Talker:
    """Sends numbered datagrams to one peer, so many a second, and notes what it hears."""

    def __init__(
        self, clock: VirtualClock, to: str, *, every_s: float | None = None, work_s: float = 0.0
    ) -> None:
        self.outbox = Outbox()
        self.clock = clock
        self.heard: list[tuple[float, str, str]] = []
        self.decided_at: list[float] = []
        self._to = to
        self._every_s = every_s
        self._work_s = work_s
        self._said = 0
        self._speak_at = clock.now()

    @property
    def wake_at(self) -> float | None:
        return None if self._every_s is None else self._speak_at

    def handle(self, message: Message, sender: str, now: float) -> None:
        if isinstance(message, Dying):
            self.heard.append((now, sender, message.reason))

    def lose(self, peer: str, now: float) -> None:
        raise AssertionError("no session is ever opened")

    def decide(self, now: float) -> None:
        self.decided_at.append(now)
        if self._every_s is None or now < self._speak_at:
            return
        self._speak_at = now + self._every_s
        self._said += 1
        self.clock.sleep(self._work_s)
        self.outbox.send(self._to, Dying(str(self._said)))


class BeatingTalker(Talker):
    """A talker whose loop sends heartbeats beside its turns."""

    def heartbeat(self, now: float) -> Heartbeat:
        return Heartbeat(0, "idle", 0.0, 0, 0, 0)


def listener(_incarnation: int, clock: VirtualClock) -> Actor:
    return Talker(clock, "a.1")


def talker(*, every_s: float, work_s: float = 0.0) -> Callable[[int, VirtualClock], Actor]:
    return lambda _, clock: Talker(clock, SUPERVISOR, every_s=every_s, work_s=work_s)


def heard_by(loop: VirtualLoop, name: str) -> list[str]:
    actor = loop.actor(name)
    assert isinstance(actor, Talker)
    return [reason for _, _, reason in actor.heard]


def a_busy_run(seed: int, faults: NetworkFaults | None) -> VirtualLoop:
    loop = VirtualLoop(VirtualNetwork(seed, faults))
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=0.01))
    loop.add("b", talker(every_s=0.007, work_s=0.003))
    loop.at(0.5, lambda: loop.crash("b"))
    loop.at(0.7, lambda: loop.restart("b"))
    loop.run_until(2.0)
    return loop


FAULTS = NetworkFaults(loss=0.1, duplication=0.1, reorder=0.2)


@pytest.mark.parametrize("faults", [None, FAULTS])
def test_equal_seeds_make_equal_runs_to_the_last_frame(faults: NetworkFaults | None) -> None:
    one, other = a_busy_run(7, faults), a_busy_run(7, faults)
    assert one.trace_hash() == other.trace_hash()
    assert one.frames == other.frames > 300
    assert heard_by(one, SUPERVISOR) == heard_by(other, SUPERVISOR)


def test_another_seed_or_another_fault_makes_another_run() -> None:
    hashes = {a_busy_run(seed, FAULTS).trace_hash() for seed in range(5)}
    hashes.add(a_busy_run(0, NetworkFaults(loss=0.1, duplication=0.1)).trace_hash())
    assert len(hashes) == 6


def test_without_faults_everything_arrives_once_in_order_and_soon() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=0.01))
    loop.run_until(0.995)
    supervisor = loop.actor(SUPERVISOR)
    assert isinstance(supervisor, Talker)
    assert [reason for _, _, reason in supervisor.heard] == [str(n) for n in range(1, 101)]
    assert {sender for _, sender, _ in supervisor.heard} == {"a.1"}
    for at, _, reason in supervisor.heard:
        delay = at - (int(reason) - 1) * 0.01
        assert 20e-6 <= delay <= 200e-6 + 2 * TURN_DELAY_S


def test_shares_of_loss_duplication_and_reordering_are_about_what_was_asked_for() -> None:
    faults = NetworkFaults(loss=0.2, duplication=0.1, reorder=0.3, reorder_delay_max_s=0.05)
    loop = VirtualLoop(VirtualNetwork(3, faults))
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=0.001))
    loop.run_until(5.0)
    heard = [int(reason) for reason in heard_by(loop, SUPERVISOR)]
    assert 0.75 < len(set(heard)) / 5000 < 0.85
    assert 0.07 < len(heard) / len(set(heard)) - 1 < 0.13
    assert heard != sorted(heard)


def test_a_network_that_loses_everything_delivers_nothing_and_counts_it() -> None:
    network = VirtualNetwork(3, NetworkFaults(loss=1.0))
    loop = VirtualLoop(network)
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=0.01))
    loop.run_until(0.999)
    assert heard_by(loop, SUPERVISOR) == []
    assert network.lost == 100


@pytest.mark.parametrize(
    ("source", "target", "is_cut"),
    [("a", SUPERVISOR, True), (SUPERVISOR, "a", False), ("b", SUPERVISOR, False)],
)
def test_a_cut_has_a_direction_two_names_and_an_end(
    source: str, target: str, *, is_cut: bool
) -> None:
    network = VirtualNetwork(1)
    loop = VirtualLoop(network)
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=0.1))
    loop.at(0.25, lambda: network.cut(source, target, until=0.65))
    loop.run_until(0.95)
    missing = ["4", "5", "6", "7"] if is_cut else []
    assert heard_by(loop, SUPERVISOR) == [str(n) for n in range(1, 11) if str(n) not in missing]


def test_a_cut_holds_for_the_next_incarnation_too() -> None:
    network = VirtualNetwork(1)
    loop = VirtualLoop(network)
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=0.1))
    network.cut("a", SUPERVISOR, until=100.0)
    loop.crash("a")
    loop.restart("a")
    loop.run_until(1.0)
    assert heard_by(loop, SUPERVISOR) == []


@pytest.mark.parametrize(("crash_at", "heard"), [(0.999, []), (1.0005, ["1"])])
def test_a_crash_loses_what_a_step_in_progress_would_have_sent(
    crash_at: float, heard: list[str]
) -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=5.0, work_s=1.0))
    loop.at(crash_at, lambda: loop.crash("a"))
    loop.run_until(2.0)
    assert heard_by(loop, SUPERVISOR) == heard


def test_what_was_sent_before_a_crash_still_arrives() -> None:
    loop = VirtualLoop(VirtualNetwork(1, NetworkFaults(delay_min_s=0.1, delay_max_s=0.1)))
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=5.0))
    loop.at(0.05, lambda: loop.crash("a"))
    loop.run_until(1.0)
    assert heard_by(loop, SUPERVISOR) == ["1"]


def test_what_is_on_its_way_to_the_dead_does_not_reach_their_successor() -> None:
    loop = VirtualLoop(VirtualNetwork(1, NetworkFaults(delay_min_s=0.1, delay_max_s=0.1)))
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=5.0))
    loop.at(0.05, lambda: loop.crash(SUPERVISOR))
    loop.at(0.06, lambda: loop.restart(SUPERVISOR))
    loop.run_until(1.0)
    assert heard_by(loop, SUPERVISOR) == []


def test_each_incarnation_has_an_identity_of_its_own_and_starts_from_nothing() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    loop.add(SUPERVISOR, listener)
    first = loop.add("a", talker(every_s=0.1))
    loop.at(0.45, lambda: loop.crash("a"))
    loop.at(0.55, lambda: loop.restart("a"))
    loop.run_until(0.8)
    assert loop.actor("a") is not first
    supervisor = loop.actor(SUPERVISOR)
    assert isinstance(supervisor, Talker)
    said = [(sender, reason) for _, sender, reason in supervisor.heard]
    assert said == [
        *(("a.1", str(n)) for n in range(1, 6)),
        *(("a.2", str(n)) for n in range(1, 4)),
    ]


def test_one_actors_long_work_delays_nobody_else() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    loop.add(SUPERVISOR, listener)
    loop.add("slow", talker(every_s=0.1, work_s=3.0))
    loop.add("quick", talker(every_s=0.1))
    loop.run_until(2.95)
    supervisor = loop.actor(SUPERVISOR)
    assert isinstance(supervisor, Talker)
    assert [sender for _, sender, _ in supervisor.heard] == ["quick.1"] * 30


def test_work_in_a_turn_delays_the_actors_own_next_turn() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    loop.add(SUPERVISOR, listener)
    loop.add("slow", talker(every_s=0.1, work_s=1.0))
    loop.run_until(4.5)
    slow = loop.actor("slow")
    assert isinstance(slow, Talker)
    assert slow.decided_at == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0])


def test_beats_go_on_while_a_turn_takes_its_time() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    beats: list[float] = []

    class Counter(Talker):
        def handle(self, message: Message, sender: str, now: float) -> None:
            if isinstance(message, Heartbeat):
                beats.append(now)

    loop.add(SUPERVISOR, lambda _, clock: Counter(clock, "a.1"))
    loop.add("a", lambda _, clock: BeatingTalker(clock, SUPERVISOR, every_s=0.1, work_s=2.0))
    loop.at(1.01, lambda: loop.crash("a"))
    loop.run_until(5.0)
    assert len(beats) == int(1.01 / BEAT_EVERY_S)


class Worker(Talker):
    """Tells in its heartbeats how long its present piece of work has taken so far."""

    def __init__(self, clock: VirtualClock, *, work_s: float) -> None:
        super().__init__(clock, SUPERVISOR, every_s=100.0)
        self._sleep_s = work_s
        self._steps = 0
        self._phase, self._phase_since = "idle", clock.now()

    def decide(self, now: float) -> None:
        super().decide(now)
        if self._steps:
            return
        self._phase, self._phase_since = "step", now
        self.clock.sleep(self._sleep_s)
        self._steps += 1
        self._phase, self._phase_since = "idle", self.clock.now()

    def heartbeat(self, now: float) -> Heartbeat:
        return Heartbeat(self._steps, self._phase, now - self._phase_since, 0, 0, 0)


class BeatWatcher(Talker):
    """Keeps the heartbeats that it hears."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock, "a.1")
        self.beats: list[tuple[float, Heartbeat]] = []

    def handle(self, message: Message, sender: str, now: float) -> None:
        super().handle(message, sender, now)
        if isinstance(message, Heartbeat):
            self.beats.append((now, message))


def a_long_step(work_s: float) -> tuple[VirtualLoop, BeatWatcher]:
    """A worker that begins at once with a step of so many seconds, and who hears its beats."""
    loop = VirtualLoop(VirtualNetwork(1))
    watcher = loop.add(SUPERVISOR, lambda _, clock: BeatWatcher(clock))
    assert isinstance(watcher, BeatWatcher)
    loop.add("a", lambda _, clock: Worker(clock, work_s=work_s))
    return loop, watcher


def test_beats_within_a_step_tell_of_the_step_and_those_after_it_of_its_end() -> None:
    loop, watcher = a_long_step(1.01)
    loop.run_until(2.0)
    during = [beat for at, beat in watcher.beats if at < 1.01]
    after = [beat for at, beat in watcher.beats if at > 1.01]
    assert [(beat.phase, beat.step) for beat in during] == [("step", 0)] * 20
    assert [(beat.phase, beat.step) for beat in after] == [("idle", 1)] * 19
    assert [beat.phase_for_s for beat in during] == pytest.approx(
        [BEAT_EVERY_S * number for number in range(1, 21)]
    )
    assert [beat.phase_for_s for beat in after] == pytest.approx(
        [BEAT_EVERY_S * number - 1.01 for number in range(21, 40)]
    )


def test_what_a_frozen_process_has_made_leaves_it_when_it_goes_on_and_in_its_order() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    supervisor = loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=0.5, work_s=1.0))
    loop.at(0.5, lambda: loop.freeze("a", 2.0))
    loop.run_until(2.4)
    assert isinstance(supervisor, Talker)
    assert supervisor.heard == []
    loop.run_until(4.0)
    assert [reason for _, _, reason in supervisor.heard] == ["1", "2"]


def test_a_frozen_process_that_is_killed_says_nothing_more() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=5.0, work_s=1.0))
    loop.at(0.5, lambda: loop.freeze("a", 2.0))
    loop.at(2.0, lambda: loop.crash("a"))
    loop.run_until(4.0)
    assert heard_by(loop, SUPERVISOR) == []


def test_nothing_to_do_makes_no_events() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    actor = loop.add(SUPERVISOR, listener)
    loop.run_until(1_000_000.0)
    assert loop.now == 1_000_000.0
    assert isinstance(actor, Talker)
    assert actor.decided_at == [0.0]
    assert loop.frames == 1


def test_an_idle_actor_gets_one_turn_for_each_of_its_timers() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    loop.add(SUPERVISOR, listener)
    actor = loop.add("a", talker(every_s=0.5))
    loop.run_until(100.25)
    assert isinstance(actor, Talker)
    assert len(actor.decided_at) == 201


def test_frames_that_arrive_together_make_one_turn() -> None:
    loop = VirtualLoop(
        VirtualNetwork(1, NetworkFaults(delay_min_s=0.001, delay_max_s=0.001 + TURN_DELAY_S / 2))
    )
    supervisor = loop.add(SUPERVISOR, listener)
    for name in "abcdefgh":
        loop.add(name, talker(every_s=10.0))
    loop.run_until(1.0)
    assert isinstance(supervisor, Talker)
    assert len(supervisor.heard) == 8
    assert len(supervisor.decided_at) == 2


def test_a_run_stops_when_its_condition_holds_and_goes_on_from_there() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    loop.add(SUPERVISOR, listener)
    loop.add("a", talker(every_s=0.1))
    loop.run_until(10.0, stop_when=lambda: len(heard_by(loop, SUPERVISOR)) == 3)
    assert 0.2 < loop.now < 0.3
    loop.run_until(0.95)
    assert loop.now == 0.95
    assert len(heard_by(loop, SUPERVISOR)) == 10


def test_a_wake_from_outside_makes_a_turn_now() -> None:
    loop = VirtualLoop(VirtualNetwork(1))
    actor = loop.add(SUPERVISOR, listener)
    loop.at(3.0, lambda: loop.wake(SUPERVISOR))
    loop.at(4.0, lambda: loop.wake("nobody"))
    loop.run_until(5.0)
    assert isinstance(actor, Talker)
    assert actor.decided_at == [0.0, 3.0]
