"""The engine: runs the sequences that it is given, a step at a time, and reports every step.

One process for each GPU. Knows nothing of text, tenants or HTTP, and keeps nothing that cannot be
made again from a request and the output it already has: when it dies, another goes on.
"""

from __future__ import annotations

from understudy.protocol.messages import (
    Assign,
    Cancel,
    Capacity,
    Heartbeat,
    Hello,
    Message,
    Role,
    StepOutput,
)
from understudy.runtime.kit.actor import SUPERVISOR, Outbox
from understudy.runtime.kit.clock import Clock
from understudy.runtime.kit.membership import Membership, MembershipChange
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.decision import Runner
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence


class Engine:
    """The engine actor: scheduler, KV blocks and runner, and the session with the supervisor."""

    def __init__(
        self,
        name: str,
        *,
        pid: int,
        model: str,
        scheduler_config: SchedulerConfig,
        num_blocks: int,
        runner: Runner,
        clock: Clock,
    ) -> None:
        self.outbox = Outbox()
        self._config = scheduler_config
        self._num_blocks = num_blocks
        self._runner = runner
        self._clock = clock
        self._step = 0
        self._phase = "idle"
        self._phase_since = clock.now()
        capacity = Capacity(
            max_num_seqs=scheduler_config.max_num_seqs,
            max_model_len=scheduler_config.max_model_len,
            num_blocks=num_blocks,
            block_size=scheduler_config.block_size,
        )
        hello = Hello(Role.ENGINE, name, pid, model=model, capacity=capacity)
        self._membership = Membership(hello, self.outbox)
        self._start_empty()

    @property
    def wake_at(self) -> float | None:
        """At once while there is work."""
        return self._clock.now() if self._scheduler.has_work else self._membership.wake_at

    def handle(self, message: Message, sender: str, now: float) -> None:  # noqa: ARG002
        """Take in a message from the supervisor, the only one who speaks to an engine."""
        if self._membership.handle(message, now) is not None:
            self._start_empty()
        match message:
            case Assign(request, attempt, output):
                self._scheduler.add(Sequence(request, attempt=attempt, output=output))
            case Cancel(request_id):
                self._scheduler.cancel(request_id)
            case _:
                pass

    def lose(self, peer: str, now: float) -> None:  # noqa: ARG002
        """Give everything up: the supervisor has not listened for too long."""
        self._membership.leave(now)
        self._start_empty()

    def decide(self, now: float) -> None:
        """Run one step, if there is work, and report it."""
        if self._membership.decide(now) is MembershipChange.LOST:
            self._start_empty()
        plan = self._scheduler.schedule()
        if plan is None:
            return
        self._enter("step")
        sampled = self._runner.execute(plan)
        rows = self._scheduler.update(plan, sampled)
        self._step += 1
        self._enter("idle")
        if rows and self._membership.is_open:
            self.outbox.send(SUPERVISOR, StepOutput(self._step, tuple(rows)))

    def heartbeat(self, now: float) -> Heartbeat:
        """What the engine is doing. Called from another thread, and changes nothing."""
        return Heartbeat(
            step=self._step,
            phase=self._phase,
            phase_for_s=now - self._phase_since,
            blocks_free=self._kv_cache_manager.num_free_blocks,
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
        )

    def check_integrity(self) -> None:
        """Assert that scheduler and KV cache agree with themselves and each other."""
        self._scheduler.check_integrity()

    def _start_empty(self) -> None:
        """Forget every sequence: with a session, whatever belonged to it ends.

        The supervisor gives out anew what it still wants; keys and values that lie in the blocks
        are overwritten.
        """
        self._kv_cache_manager = KVCacheManager(
            num_blocks=self._num_blocks, block_size=self._config.block_size
        )
        self._scheduler = Scheduler(self._config, self._kv_cache_manager)

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._phase_since = self._clock.now()
